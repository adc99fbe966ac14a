"""The answers of a batch as its caller takes them."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from types import TracebackType
from typing import Self

from vllm_unified.batch.answer import BatchAnswer
from vllm_unified.batch.metrics import BatchMetrics
from vllm_unified.batch.runner import BatchRun
from vllm_unified.errors import ClientClosedError, VllmError


class BatchStream:
    """The answers of a batch, as they come: an asynchronous iterator of :class:`BatchAnswer`, and
    a context manager.

    Prompts are read and sent as answers are taken: whoever takes none holds all of it back. It
    begins with the first answer that is asked for. Leaving the block early ends what is under way.
    """

    def __init__(self, run: BatchRun) -> None:
        self._run = run
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def metrics(self) -> BatchMetrics:
        """The figures so far."""
        return self._run.metrics

    @property
    def trouble(self) -> VllmError | None:
        """Why prompts fail at this moment, while none succeeds; ``None`` while all is well."""
        return self._run.trouble

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BatchAnswer:
        if self._closed:
            raise ClientClosedError("this batch was closed before its end")
        self._loop = self._loop or asyncio.get_running_loop()
        answer = await self._run.next()
        if answer is None:
            raise StopAsyncIteration
        return answer

    async def read_ready(self) -> list[BatchAnswer]:
        """All answers that are there, at least one; an empty list at the end."""
        first = await anext(self, None)
        return [] if first is None else [first, *self._run.take_ready()]

    async def close(self) -> None:
        """End what is under way, and read no more prompts. May be called twice."""
        self._closed = self._closed or not self._run.ended
        await self._run.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if self._loop is None or self._loop.is_closed() or self._run.ended:
            return
        # The collector may run in any thread; the workers belong to the loop's.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._run.cancel)
        warnings.warn(
            f"{self!r} was left without being closed; use 'async with'",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )

    def __repr__(self) -> str:
        figures = self._run.metrics
        state = "ended" if self._run.ended else "open"
        return (
            f"<BatchStream {state}, {figures.succeeded} answers, {figures.failed} errors "
            f"of {figures.prompts} prompts>"
        )
