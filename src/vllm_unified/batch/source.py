"""The prompts of a batch, read as they are needed."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
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

READ_AHEAD = 64
"""Prompts of an asynchronous iterable that are read before they are asked for."""


class Source:
    """Prompts with their positions.

    What is iterated synchronously is read when it is asked for. What comes asynchronously is read
    by a task of its own, always the same, a little ahead.
    """

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
        self._now: Iterator[tuple[int, GenerationInput]] = iter(())
        self._later: AsyncIterator[GenerationInput] | None = None
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
        self.is_empty = False
        """Whether it is known to have no more."""
        self.task: asyncio.Task[None] | None = None
        """What reads ahead."""
        self._ahead: deque[tuple[int, GenerationInput]] = deque()
        self._is_read = False
        self._error: BaseException | None = None
        self._room = asyncio.Event()

    def begin(self, arrived: Callable[[], None]) -> None:
        """Read ahead, where prompts come asynchronously; ``arrived`` is called when there is one
        after there was none, or no more."""
        if self._later is not None:
            work = self._read_ahead(self._later, arrived)
            self.task = asyncio.get_running_loop().create_task(work)

    @property
    def waits(self) -> bool:
        """Whether the next prompt, or the end, is yet to come."""
        return self._later is not None and not self._ahead and not self._is_read

    def next(self) -> tuple[int, GenerationInput] | None:
        """The next prompt and its position; ``None`` where there is none, or none yet.

        Raises:
            Exception: whatever the caller's own iterable raises; it is then empty.
        """
        if self._later is not None:
            return self._next_of_ahead()
        try:
            found = next(self._now, None)
        except BaseException:
            self.is_empty = True
            raise
        if found is None:
            self.is_empty = True
        return found

    def _next_of_ahead(self) -> tuple[int, GenerationInput] | None:
        if self._ahead:
            if len(self._ahead) <= READ_AHEAD // 2:
                self._room.set()
            return self._ahead.popleft()
        if self._is_read:
            self.is_empty = True
            if self._error is not None:
                error, self._error = self._error, None
                raise error
        return None

    async def _read_ahead(
        self, prompts: AsyncIterator[GenerationInput], arrived: Callable[[], None]
    ) -> None:
        number = 0
        try:
            async for prompt in prompts:
                self._ahead.append((number, prompt))
                number += 1
                if len(self._ahead) == 1:
                    arrived()
                if len(self._ahead) >= READ_AHEAD:
                    self._room.clear()
                    await self._room.wait()
        except Exception as error:  # noqa: BLE001 - raised where the prompt would be taken
            self._error = error
        self._is_read = True
        arrived()

    async def close(self) -> None:
        """Read nothing more. A generator is closed, whose end nobody else would wait for."""
        self.is_empty = True
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
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
    priority: Any = prompt.get("priority", 0) if isinstance(prompt, Mapping) else 0
    if isinstance(priority, str):
        return PRIORITIES.get(priority, 0)
    return priority if isinstance(priority, int | float) and priority == priority else 0
