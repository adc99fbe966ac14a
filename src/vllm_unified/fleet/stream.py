"""A generation as it happens."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

import msgspec

from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.endpoint import MAX_ERROR_BYTES, Slot
from vllm_unified.errors import (
    ClientClosedError,
    ConnectionLostError,
    OutputValidationError,
    ProtocolError,
    RequestTimeoutError,
    StreamEnding,
    StreamStalledError,
    StreamTruncatedError,
    VllmError,
)
from vllm_unified.fleet.continuation import Continuation, obstacle
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.fleet.resumption import (
    NotResumableError,
    is_the_servers_fault,
    rest_of,
    stayed,
    with_token_ids,
)
from vllm_unified.results import (
    ChatResult,
    GenerationResult,
    ResultMetadata,
    StreamChunk,
    Usage,
)
from vllm_unified.settings import Settings
from vllm_unified.wire.chunks import ChunkAssembler
from vllm_unified.wire.requests import WireRequest
from vllm_unified.wire.responses import decode_generation
from vllm_unified.wire.sse import SSEDecoder
from vllm_unified.wire.transport import Response

R = TypeVar("R", bound=GenerationResult)

# The end of the body follows "[DONE]" at once; a server that lets it wait costs a connection.
_END_SECONDS = 1.0


class GenerationStream(Generic[R]):
    """An async iterator of :class:`StreamChunk`, and a context manager.

    Nothing is sent before the first iteration or ``async with``. Attempts are made until the
    first token. From then on an error ends the stream, but in a fleet: there it goes on at another
    server, with no token lost and none repeated, where that can be exact (``n`` of 1, no tools, no
    logprobs, ...); ``result.metadata.continuations`` says where and why. The iteration ends
    silently only if the generation is complete; otherwise it raises, after everything that came
    was delivered, and the error's ``partial`` has the text so far.

    Three clocks run: ``first_token_timeout`` from the call to the first token (the line and
    retries included), ``idle_timeout`` between two events, and ``total_timeout`` for everything.

    Leaving the ``async with`` block early closes the connection, and the server stops generating.
    """

    def __init__(self, fleet: Fleet, request: WireRequest, settings: Settings) -> None:
        self._fleet = fleet
        self._goes_on = settings.continue_streams and len(fleet.endpoints) > 1
        self._watches = self._goes_on and obstacle(request.fields, is_chat=request.is_chat) is None
        self._asked = request
        self._call = Call(with_token_ids(request) if self._watches else request, settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._response: Response | None = None
        self._slot: Slot | None = None
        self._ready: deque[StreamChunk] = deque()
        self._failure: VllmError | None = None
        self._metadata: ResultMetadata | None = None
        self._first_token: float | None = None
        self._last_packet = 0.0
        self._trouble: VllmError | None = None
        self._resumed = False
        self._ending: StreamEnding | None = None
        self._expect_answer()

    def _expect_answer(self) -> None:
        request = self._asked
        self._continuation = (
            Continuation(request.fields, is_chat=request.is_chat) if self._goes_on else None
        )
        self._assembler = ChunkAssembler(
            choices=request.choices,
            is_chat=request.is_chat,
            watcher=self._continuation if self._watches else None,
            shows_token_ids=not self._watches or bool(request.fields.get("return_token_ids")),
        )
        self._expect_events()

    def _expect_events(self) -> None:
        self._decoder = SSEDecoder(max_event_bytes=self._call.settings.max_response_bytes)

    @property
    def ending(self) -> StreamEnding | None:
        """How the stream ended; ``None`` while it has not.

        ``complete``; ``truncated``: closed without a finish reason; ``error``: the server reported
        one; ``stalled``: a clock ran out; ``cancelled``: left by the caller.
        """
        return self._ending

    @property
    def text(self) -> str:
        """Text of choice 0 that has come so far."""
        return self._assembler.text

    @property
    def usage(self) -> Usage | None:
        """Tokens taken; known at the end."""
        if self._resumed and self._continuation is not None:
            return self._continuation.usage
        return self._assembler.usage

    @property
    def result(self) -> R:
        """The whole answer, as the call without streaming gives it.

        Raises:
            StreamTruncatedError: the stream is not complete.
            OutputValidationError: the text is not the ``response_model``.
        """
        if self._metadata is None:
            state = self._ending or "not at its end"
            raise self._partially(
                StreamTruncatedError(f"there is no result: the stream is {state}")
            )
        result = self._assembler.result(self._metadata)
        if self._continuation is not None and self._call.continuations:
            notes = self._call.continuations
            metadata = msgspec.structs.replace(self._metadata, continuations=notes)
            usage = self._continuation.usage
            result = msgspec.structs.replace(result, usage=usage, metadata=metadata)
        structure = self._call.request.structure
        if structure is not None and isinstance(result, ChatResult):
            try:
                parsed = structure.parse(result.text, finish_reason=result.finish_reason)
            except OutputValidationError as invalid:
                raise self._call.complete_error(invalid) from invalid.__cause__
            result = msgspec.structs.replace(result, parsed=parsed)
        return cast("R", result)

    def _partially(self, error: VllmError) -> VllmError:
        error.partial = self._assembler.partial(self._ending or "cancelled")
        return self._call.complete_error(error)

    async def collect(self) -> R:
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

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamChunk:
        while not self._ready:
            self._raise_failure()
            if self._ending == "cancelled":
                raise self._partially(ClientClosedError("this stream was closed before its end"))
            if self._ending is not None:
                raise StopAsyncIteration
            await self._advance()
        return self._ready.popleft()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    async def read_ready(self) -> list[StreamChunk]:
        """All chunks that are there, at least one; an empty list at the end."""
        first = await anext(self, None)
        if first is None:
            return []
        ready = [first, *self._ready]
        self._ready.clear()
        return ready

    async def __aenter__(self) -> Self:
        if self._loop is None:
            await self._advance()
            if not self._ready:
                self._raise_failure()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the stream; the server stops generating. May be called twice."""
        if self._ending is None and self._assembler.is_complete:
            self._complete()
        self._end("cancelled")

    async def _advance(self) -> None:
        """Go on until an event has come, or the end."""
        try:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
                self._call.begin()
                self._fleet.begin(self._call)
                settings = self._call.settings
                await self._start(settings.first_token_timeout or settings.timeout, self._open)
            else:
                await self._go_on()
        except VllmError as error:
            self._fail(error)
        except BaseException:
            self._end("cancelled")
            raise

    async def _start(self, seconds: float, once: Callable[[Slot], Awaitable[None]]) -> None:
        """Attempts until a chunk has come, or the end; ``seconds`` are for all of them."""
        deadline = self._call.elapsed + seconds
        try:
            with self._fleet.deadlines.within(self._within_total(seconds)):
                await self._fleet.attempt(self._call, once, deadline)
        except VllmError:
            raise
        except TimeoutError:
            if self._call.waiting:
                raise self._fleet.out_of_time(self._call, seconds) from None
            raise RequestTimeoutError(
                f"no token within {self._call.elapsed:.3g} s",
                hint="More time: first_token_timeout=SECONDS or timeout=SECONDS.",
            ) from None

    async def _go_on(self) -> None:
        try:
            await self._read_in_time()
        except VllmError as error:
            if not await self._continue(error):
                raise

    async def _read_in_time(self) -> None:
        settings = self._call.settings
        seconds = settings.idle_timeout or settings.timeout
        within_total = self._within_total(seconds)
        try:
            with self._fleet.deadlines.within(within_total):
                await self._read()
        except VllmError:
            raise
        except TimeoutError:
            if self._assembler.is_complete:
                self._complete()
            elif settings.total_timeout is not None and within_total < seconds:
                raise RequestTimeoutError(
                    f"the stream did not end within {settings.total_timeout:g} s",
                    hint="More time: total_timeout=SECONDS.",
                ) from None
            else:
                raise StreamStalledError(f"nothing came for {seconds:g} s") from None

    async def _continue(self, error: VllmError) -> bool:
        """Go on at another server after this error; whether that was possible."""
        continuation = self._continuation
        if continuation is None or self._slot is None or not is_the_servers_fault(error):
            return False
        if len(self._call.continuations) >= max(1, self._call.settings.max_retries):
            return False
        if continuation.trouble is not None:
            error.hint = stayed(NotResumableError(continuation.trouble))
            return False
        lost, came = self._slot.endpoint, continuation.tokens
        self._lose(error)
        settings = self._call.settings
        try:
            await self._start(settings.first_token_timeout or settings.timeout, self._open_rest)
        except VllmError as reason:
            error.hint = stayed(reason)
            self._call.endpoint = lost  # the error is that server's
            return False
        self._fleet.continued(self._call, lost, came, error)
        return True

    def _lose(self, error: VllmError) -> None:
        """The server is lost, and the stream is not."""
        assert self._slot is not None
        self._hang_up()
        self._fleet.cell(self._call).continued += 1
        self._fleet.attempt_failed(self._call, self._slot, error)
        self._slot = None

    def _within_total(self, seconds: float) -> float:
        total = self._call.settings.total_timeout
        return seconds if total is None else min(seconds, total - self._call.elapsed)

    async def _open(self, slot: Slot) -> None:
        """One attempt, up to the first chunk."""
        self._expect_answer()
        await self._open_at(slot)
        self._first_token = self._call.elapsed

    async def _open_rest(self, slot: Slot) -> None:
        """One attempt to go on, up to the first chunk."""
        assert self._continuation is not None
        rest = await rest_of(self._continuation, slot.endpoint, self._call)
        self._resumed = True
        if isinstance(rest, StreamChunk):
            self._slot = slot
            self._show(rest)
            self._complete()
            return
        self._call.request = rest
        self._assembler.saw_done = False
        self._expect_events()
        await self._open_at(slot)

    def _show(self, chunk: StreamChunk) -> None:
        shown = self._assembler.add(chunk)
        if shown is not None:
            self._ready.append(shown)

    async def _open_at(self, slot: Slot) -> None:
        before = len(self._ready)
        try:
            self._response = await slot.endpoint.open(self._call)
            await self._check_kind(self._response)
            self._slot = slot
            while len(self._ready) == before and self._ending is None:
                await self._read()
        except BaseException as error:
            if not (isinstance(error, VllmError) and len(self._ready) > before):
                self._slot = None
                self._hang_up()
                raise
            self._trouble = error
        if self._ending is None:
            slot.prove(time.monotonic())
        self._call.end_attempt()

    async def _check_kind(self, response: Response) -> None:
        kind = response.headers.get("content-type", "no content type")
        if kind.lower().startswith("text/event-stream"):
            return
        body = await response.read(MAX_ERROR_BYTES)
        decode_generation(body, self._call.metadata())
        raise ProtocolError(f"the server does not stream: it answers with {kind}")

    async def _read(self) -> None:
        """Read packets until an event has come, or the end."""
        if self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            raise trouble
        assert self._response is not None
        events = 0
        while not events:
            try:
                packet = await self._response.packet()
            except ConnectionLostError as error:
                if not self._assembler.is_complete:
                    cut = StreamTruncatedError(f"the stream was cut: {error.message}")
                    raise cut from error.__cause__
                packet = b""
            if not packet:
                return await self._finish("it closed")
            for event in self._decoder.feed(packet):
                events += 1
                self._ready.extend(self._assembler.feed(event.data))
        self._note_gap()
        if self._assembler.saw_done:
            await self._finish("[DONE] came")
        elif self._resumed and self._assembler.is_complete:
            self._complete()  # by a stop string that the server does not know of
        return None

    def _note_gap(self) -> None:
        now = time.monotonic()
        if self._slot is not None:
            self._slot.endpoint.succeeded_at = now
        if self._last_packet:
            self._fleet.cell(self._call).between_tokens.record(now - self._last_packet)
        self._last_packet = now

    async def _finish(self, how: str) -> None:
        if not self._assembler.is_complete:
            raise StreamTruncatedError(f"the stream is cut short: {how} without a finish reason")
        assert self._response is not None
        in_time = self._fleet.deadlines.within(_END_SECONDS)
        with contextlib.suppress(VllmError, TimeoutError), in_time:
            while await self._response.packet():
                pass
        self._complete()

    def _complete(self) -> None:
        self._first_token = self._first_token or self._call.elapsed
        self._call.end_attempt()
        self._metadata = self._call.metadata(time_to_first_token=self._first_token)
        self._end("complete")

    def _fail(self, error: VllmError) -> None:
        if self._ending is not None:
            return
        ending = _ending_of(error)
        if self._slot is not None:
            self._fleet.attempt_failed(self._call, self._slot, error)
        error.partial = self._assembler.partial(ending)
        self._failure = self._call.complete_error(error)
        self._end(ending, error)

    def _end(self, ending: StreamEnding, error: VllmError | None = None) -> None:
        self._hang_up()
        if self._ending is not None:
            return
        self._ending = ending
        usage = self.usage
        if self._slot is not None:
            self._give_back(self._slot, usage)
        if self._loop is not None:
            self._fleet.ended(
                self._call,
                error=error,
                cancelled=ending == "cancelled",
                usage=usage,
                time_to_first_token=self._first_token,
            )

    def _give_back(self, slot: Slot, usage: Usage | None) -> None:
        if self._ending == "complete":
            tokens = 0 if usage is None else usage.completion_tokens
            prompt_tokens = 0 if usage is None else usage.prompt_tokens
            slot.succeed(time.monotonic(), tokens=tokens, prompt_tokens=prompt_tokens)
        else:
            slot.leave()
        self._slot = None

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def __del__(self) -> None:
        if self._loop is None or self._loop.is_closed() or self._ending is not None:
            return
        # The collector may run in any thread; connections belong to the loop's.
        with contextlib.suppress(RuntimeError):
            if self._response is not None:
                self._loop.call_soon_threadsafe(self._response.close)
            if self._slot is not None:
                self._loop.call_soon_threadsafe(self._slot.leave)
            self._loop.call_soon_threadsafe(partial(self._fleet.ended, self._call, cancelled=True))
        # Last, because "python -W error" raises it.
        warnings.warn(
            f"{self!r} was left without being closed; use 'async with'",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )

    def __repr__(self) -> str:
        state = self._ending or ("not started" if self._loop is None else "open")
        where = self._call.place or self._fleet
        return f"<GenerationStream {where} {state}, {len(self.text)} characters>"


def _ending_of(error: VllmError) -> StreamEnding:
    if isinstance(error, RequestTimeoutError):
        return "stalled"
    return "truncated" if isinstance(error, ConnectionLostError) else "error"
