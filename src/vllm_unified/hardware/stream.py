"""An inference as it happens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

from vllm_unified.errors import (
    ClientClosedError,
    PartialOutput,
    StreamEnding,
    StreamTruncatedError,
    VllmError,
)
from vllm_unified.hardware.inference import Inference, InferenceResult, told_attempts
from vllm_unified.hardware.member import Member
from vllm_unified.results import StreamChunk, Usage


class InferenceStream:
    """An async iterator of :class:`StreamChunk`, and a context manager.

    Nothing is sent before the first iteration or ``async with``. Backends are tried until a first
    piece has come; from then on an error ends the stream, and its ``partial`` has the text so far.
    Leaving the ``async with`` block early ends the work.
    """

    def __init__(
        self, begin: Callable[[], Inference], ended: Callable[[Inference, str], None]
    ) -> None:
        self._begin = begin
        self._ended = ended
        self._inference: Inference | None = None
        self._source: AsyncIterator[StreamChunk | str] | None = None
        self._first: StreamChunk | None = None
        self._parts: list[str] = []
        self._ending: StreamEnding | None = None
        self._result: InferenceResult | None = None

    @property
    def ending(self) -> StreamEnding | None:
        """How the stream ended; ``None`` while it has not."""
        return self._ending

    @property
    def text(self) -> str:
        """Text of choice 0 that has come so far."""
        return "".join(self._parts)

    @property
    def usage(self) -> Usage | None:
        """Tokens taken, where the backend tells; known at the end."""
        output = None if self._result is None else self._result.output
        usage = getattr(output, "usage", None)
        return usage if isinstance(usage, Usage) else None

    @property
    def result(self) -> InferenceResult:
        """The whole answer.

        Raises:
            StreamTruncatedError: the stream is not complete.
        """
        if self._result is None:
            state = self._ending or "not at its end"
            raise StreamTruncatedError(f"there is no result: the stream is {state}")
        return self._result

    async def collect(self) -> InferenceResult:
        """Run to the end; the whole answer. The stream is closed, whatever happens."""
        async with self:
            async for _ in self:
                pass
        return self.result

    async def texts(self) -> AsyncIterator[str]:
        """The text of choice 0 only, piece by piece."""
        async for chunk in self:
            if chunk.text and chunk.index == 0:
                yield chunk.text

    async def read_ready(self) -> list[StreamChunk]:
        """The next chunk; an empty list at the end."""
        chunk = await anext(self, None)
        return [] if chunk is None else [chunk]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamChunk:
        if self._ending == "cancelled":
            raise ClientClosedError("this stream was closed before its end")
        if self._ending is not None:
            raise StopAsyncIteration
        await self._start()
        chunk, self._first = self._first, None
        if chunk is None and self._ending is None:
            chunk = await self._read()
        if chunk is None:
            raise StopAsyncIteration
        if chunk.index == 0:
            self._parts.append(chunk.text)
        return chunk

    async def _start(self) -> None:
        """Have a first piece, or the end."""
        if self._inference is not None:
            return
        self._inference = self._begin()
        try:
            self._first = await self._inference.attempt(self._open)
        except VllmError:
            self._end("error")
            raise
        except BaseException:
            self._end("cancelled")
            raise
        if self._first is None:
            self._complete()

    async def _open(self, member: Member) -> StreamChunk | None:
        streaming = member.streaming
        assert streaming is not None, "only those that stream are chosen"
        assert self._inference is not None
        self._source = streaming.stream(self._inference.request)
        try:
            return await self._pull()
        except BaseException:
            await self._hang_up()
            raise

    async def _pull(self) -> StreamChunk | None:
        assert self._source is not None
        piece = await anext(self._source, None)
        return StreamChunk(text=piece) if isinstance(piece, str) else piece

    async def _read(self) -> StreamChunk | None:
        assert self._inference is not None
        try:
            chunk = await self._pull()
        except Exception as error:  # noqa: BLE001 - of a foreign backend it may be any
            failure = self._inference.fail(error)
            if failure.partial is None:
                failure.partial = PartialOutput(ending="error", text=self.text, texts=(self.text,))
            self._end(failure.partial.ending)
            await self._hang_up()
            raise failure from failure.__cause__
        except BaseException:
            await self.close()
            raise
        if chunk is None:
            self._complete()
        return chunk

    def _complete(self) -> None:
        assert self._inference is not None
        output = getattr(self._source, "result", None)
        output = self.text if output is None else output
        self._result = self._inference.succeed(output, told_attempts(output))
        self._end("complete")

    def _end(self, ending: StreamEnding) -> None:
        if self._ending is None:
            self._ending = ending
            if self._inference is not None:
                if ending == "cancelled":
                    self._inference.leave()
                self._ended(self._inference, ending)

    async def _hang_up(self) -> None:
        source, self._source = self._source, None
        close: Any = getattr(source, "close", None) or getattr(source, "aclose", None)
        if close is not None:
            await close()

    async def close(self) -> None:
        """End the stream and the work. May be called twice."""
        self._end("cancelled")
        await self._hang_up()

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<InferenceStream {self._ending or 'under way'}>"
