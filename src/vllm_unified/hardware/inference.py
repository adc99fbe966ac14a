"""One inference on its way: from backend to backend until one answers, and what came out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from vllm_unified.errors import Attempt, ContextLengthError, NoBackendError, VllmError
from vllm_unified.hardware.failures import as_failure, attempts_of, may_go_elsewhere
from vllm_unified.hardware.member import Member, Use
from vllm_unified.hardware.request import InferenceRequest
from vllm_unified.hardware.selection import Selection, choose

T = TypeVar("T")


class InferenceResult(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, where it is from, and what was tried."""

    output: Any
    """What the backend gave: of a client a :class:`GenerationResult`, :class:`ChatResult` or
    :class:`EmbeddingResult`; of a callable whatever it returned."""
    backend: str
    """Name of the backend that answered."""
    selection: Selection
    """Why that one was chosen first."""
    attempts: tuple[Attempt, ...]
    """Every try, in order, at whatever backend; the last one succeeded."""

    @property
    def text(self) -> str:
        """The text of the answer.

        Raises:
            AttributeError: it has none.
        """
        return self.output if isinstance(self.output, str) else str(self.output.text)


class Inference:
    """A request, and the backends that it was tried at."""

    def __init__(
        self, members: Sequence[Member], request: InferenceRequest, *, streaming: bool = False
    ) -> None:
        """``members`` are those that are registered for the request's task."""
        self.request = request
        self.attempts: list[Attempt] = []
        self.failovers = 0
        self._members = {member.name: member for member in members}
        self._streaming = streaming
        self._selection: Selection | None = None
        self._failed: dict[str, VllmError] = {}
        self._longer_than: int | None = None
        self._use: Use | None = None

    async def attempt(self, once: Callable[[Member], Awaitable[T]]) -> T:
        """Try until a backend succeeds, or none is left; the request is in flight there until
        :meth:`succeed`, :meth:`fail` or :meth:`leave`.

        Raises:
            VllmError: the last one, with all attempts.
        """
        while True:
            member = await self._next()
            self._use = member.begin()
            try:
                return await once(member)
            except Exception as error:  # noqa: BLE001 - of a foreign backend it may be any
                failure = self.fail(error)
                if not may_go_elsewhere(failure):
                    raise failure from failure.__cause__
            except BaseException:
                self.leave()
                raise

    async def select(self) -> Selection:
        """The backends in the order in which they would be tried now."""
        asking = {task for each in self._members.values() if (task := each.prepare()) is not None}
        if asking:
            await asyncio.wait(asking)
        now = time.monotonic()
        facts = [
            member.facts(self.request.task, now, failed=name in self._failed)
            for name, member in self._members.items()
        ]
        return choose(self.request, facts, streaming=self._streaming, longer_than=self._longer_than)

    async def _next(self) -> Member:
        selection = await self.select()
        if self._selection is None:
            self._selection = selection
        if selection.chosen is None:
            raise self._nobody(selection)
        self.failovers += bool(self._failed)
        return self._members[selection.chosen]

    def _nobody(self, selection: Selection) -> VllmError:
        if not self._failed:
            model = f" with {self.request.model}" if self.request.model else ""
            return NoBackendError(
                f"no backend can take this request for {self.request.task!r}{model}",
                hint=str(selection).partition("\n")[2],
                model=self.request.model,
            )
        *before, last = self._failed.items()
        for name, error in before:
            last[1].add_note(f"Before that, {name}: {type(error).__name__}: {error.message}")
        return last[1]

    def succeed(self, output: Any, told: Sequence[Attempt] = ()) -> InferenceResult:
        """It is answered."""
        use = self._use
        assert use is not None
        assert self._selection is not None
        name = use.member.name
        self.attempts += attempts_of(told, name, use.started_at, use.elapsed)
        use.succeed(taken_over=bool(self._failed))
        return InferenceResult(
            output=output,
            backend=name,
            selection=self._selection,
            attempts=tuple(self.attempts),
        )

    def fail(self, error: Exception) -> VllmError:
        """The backend failed; the error, with all attempts."""
        use = self._use
        assert use is not None
        name = use.member.name
        failure = as_failure(error, name)
        self.attempts += attempts_of(failure, name, use.started_at, use.elapsed)
        failure.attempts = tuple(self.attempts)
        use.fail(failure)
        self._failed[name] = failure
        if isinstance(failure, ContextLengthError):
            context = use.member.capabilities.context(self.request.model)
            self._longer_than = max(self._longer_than or 0, context or 0)
        return failure

    def leave(self) -> None:
        """The caller left."""
        if self._use is not None:
            self._use.leave()


def told_attempts(output: object) -> tuple[Attempt, ...]:
    """The tries that a client's result tells."""
    found = getattr(getattr(output, "metadata", None), "attempts", ())
    return found if isinstance(found, tuple) else ()
