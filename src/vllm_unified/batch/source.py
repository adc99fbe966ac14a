"""The prompts of a batch, read as they are needed."""

from __future__ import annotations

import inspect
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from operator import length_hint
from typing import Any

from vllm_unified.errors import BadRequestError
from vllm_unified.settings import PRIORITIES
from vllm_unified.wire.requests import GenerationInput

Prompts = Iterable[GenerationInput] | AsyncIterable[GenerationInput]

END: Any = object()
"""In place of a prompt: there is none left."""


class Source:
    """Prompts with their positions. One reader at a time."""

    def __init__(self, prompts: Prompts, *, by_priority: bool) -> None:
        """``by_priority``: of a list, the urgent ones first.

        Raises:
            BadRequestError: it is one prompt, or nothing that can be read.
        """
        if isinstance(prompts, str | bytes | Mapping):
            raise BadRequestError(
                f"prompts must be several prompts, not one {type(prompts).__name__}",
                hint="One prompt is what generate() and make_request() are for.",
            )
        self._prompts = prompts
        self._later: AsyncIterator[GenerationInput] | None = None
        self._now: Iterator[tuple[int, GenerationInput]] = iter(())
        self._read = 0
        if isinstance(prompts, AsyncIterable):
            self._later = aiter(prompts)
        elif isinstance(prompts, Iterable):
            self._now = _numbered(prompts, by_priority=by_priority)
        else:
            raise BadRequestError(
                f"prompts must be an iterable of prompts, not {type(prompts).__name__}"
            )
        self.size = length_hint(prompts) or None
        """About how many prompts there are, where that is known."""
        self.is_busy = False
        """Whether somebody waits for the next prompt."""
        self.is_empty = False
        """Whether it is known to have no more."""

    @property
    def waits(self) -> bool:
        """Whether a prompt may take its time: :meth:`wait_for_next` is to be used."""
        return self._later is not None

    def next(self) -> tuple[int, GenerationInput]:
        """The next prompt and its position; :data:`END` where there is none.

        Raises:
            Exception: whatever the caller's own iterable raises; it is then empty.
        """
        try:
            index, found = next(self._now, (-1, END))
        except BaseException:
            self.is_empty = True
            raise
        if found is END:
            self.is_empty = True
        return index, found

    async def wait_for_next(self) -> tuple[int, GenerationInput]:
        """As :meth:`next`, where the prompts come asynchronously."""
        assert self._later is not None
        self.is_busy = True
        try:
            found = await anext(self._later, END)
        except BaseException:
            self.is_empty = True
            raise
        finally:
            self.is_busy = False
        if found is END:
            self.is_empty = True
            return -1, END
        self._read += 1
        return self._read - 1, found

    async def close(self) -> None:
        """Read nothing more. A generator is closed, whose end nobody else would wait for."""
        self.is_empty = True
        if inspect.isasyncgen(self._prompts):
            await self._prompts.aclose()
        elif inspect.isgenerator(self._prompts) and not self._prompts.gi_running:
            self._prompts.close()


def _numbered(
    prompts: Iterable[GenerationInput], *, by_priority: bool
) -> Iterator[tuple[int, GenerationInput]]:
    if by_priority and isinstance(prompts, Sequence):
        ranks = [_rank(prompt) for prompt in prompts]
        if any(ranks):
            order = sorted(range(len(ranks)), key=ranks.__getitem__)
            return ((index, prompts[index]) for index in order)
    return enumerate(prompts)


def _rank(prompt: GenerationInput) -> float:
    """Its priority as a number; 0 where it has none, or one that will be refused."""
    priority = prompt.get("priority", 0) if isinstance(prompt, Mapping) else 0
    if isinstance(priority, str):
        return PRIORITIES.get(priority, 0)
    return priority if isinstance(priority, int | float) and priority == priority else 0
