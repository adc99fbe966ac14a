"""From blocking code into an event loop on a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from vllm_unified.batch.answer import BatchAnswer
from vllm_unified.batch.metrics import BatchMetrics
from vllm_unified.batch.stream import BatchStream
from vllm_unified.errors import ClientClosedError, StreamEnding, VllmError
from vllm_unified.feeding import CallersIterable
from vllm_unified.results import StreamChunk, Usage

T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_STOP_SECONDS = 5.0
# A signal that comes just before a thread blocks is only noticed when it wakes.
_SIGNAL_SECONDS = 0.2
# A local server that is busy takes some seconds to end.
_FAREWELL_SECONDS = 30.0


_running: set[LoopThread] = set()


def _new_loop() -> asyncio.AbstractEventLoop:
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


class LoopThread:
    """An event loop on a daemon thread. Any thread may run coroutines on it."""

    def __init__(self) -> None:
        self._loop = _new_loop()
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._closed = False
        self._trouble: Exception | None = None
        self._stopping: asyncio.Task[None] | None = None
        self.farewell: Callable[[], Coroutine[Any, Any, None]] | None = None
        """What :meth:`close` runs before the thread is stopped."""
        self._thread = threading.Thread(target=self._serve, name="vllm-unified", daemon=True)
        _running.add(self)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether nothing can be run any more."""
        return self._closed

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()
            _running.discard(self)

    def run(self, call: Callable[[], Coroutine[Any, Any, T]], items: object = None) -> T:
        """Call on the loop, and wait for the end. An interrupt (Ctrl-C) cancels what was begun.

        The coroutine is made on the loop as well: an interrupt can come between any two steps of
        this thread, and would leave one that nobody awaits.

        Args:
            items: Where the call reads a :class:`CallersIterable`, it is read here meanwhile.

        Raises:
            ClientClosedError: the loop is closed, or was closed meanwhile, belongs to the parent of
                a forked process, or is the one that calls.
        """
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        try:
            self._submit(call, outcome)
            if isinstance(items, CallersIterable):
                _serve(items, outcome)
            return _wait(outcome)
        except concurrent.futures.CancelledError:
            raise ClientClosedError("this client was closed before the call was done") from None
        except BaseException:
            if outcome.cancel():
                self._settle()
            raise

    def submit(self, call: Callable[[], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        """Call on the loop; the outcome. Cancelling it cancels the call.

        Raises:
            ClientClosedError: as :meth:`run`.
        """
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._submit(call, outcome)
        return outcome

    def call(self, function: Callable[[], T]) -> T:
        """Call a function on the loop, and wait for it.

        Raises:
            ClientClosedError: as :meth:`run`.
        """

        async def once() -> T:
            return function()

        return self.run(once)

    def _submit(
        self, call: Callable[[], Coroutine[Any, Any, T]], outcome: concurrent.futures.Future[T]
    ) -> None:
        reason = self._unusable()
        if reason is None:
            # What is submitted before the loop begins to stop is cancelled there, never lost.
            with self._lock:
                if not self._closed:
                    self._loop.call_soon_threadsafe(_begin, call, outcome)
                    return
        raise ClientClosedError(reason or "this client is closed")

    def _unusable(self) -> str | None:
        if os.getpid() != self._process:
            return "this client was made before a fork; make one in each process"
        if threading.current_thread() is self._thread:
            return "a callback of this client cannot wait for the client itself"
        return None

    def _settle(self) -> None:
        """Let what was cancelled clean up."""
        with contextlib.suppress(Exception):
            settled: concurrent.futures.Future[None] = concurrent.futures.Future()
            self._submit(_other_tasks, settled)
            settled.result(_STOP_SECONDS)

    def close(self, *, wait: bool = True) -> None:
        """Run the farewell and stop the thread. May be called twice, from any thread.

        Args:
            wait: Return when the thread has ended. The collector must not wait: whatever thread
                it runs in would stand still, with its event loop.

        Raises:
            Exception: what the farewell raised; the thread is stopped all the same.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._begin_stop)
        if wait and threading.current_thread() is not self._thread:
            self._thread.join(_FAREWELL_SECONDS)
            trouble, self._trouble = self._trouble, None
            if trouble is not None:
                raise trouble

    def _begin_stop(self) -> None:
        self._stopping = self._loop.create_task(self._stop())

    async def _stop(self) -> None:
        try:
            await _other_tasks(cancel=True)
            if self.farewell is not None:
                await self.farewell()
        except Exception as error:  # noqa: BLE001 - raised where the caller waits
            self._trouble = error
        finally:
            self._loop.stop()


@atexit.register
def _close_all() -> None:
    for thread in list(_running):
        try:
            thread.close()
        except Exception:  # noqa: BLE001 - told, and the others are closed too
            sys.excepthook(*sys.exc_info())


def _wait(outcome: concurrent.futures.Future[T]) -> T:
    """The result, once it is there; an interrupt is noticed at any time."""
    while not outcome.done():
        with contextlib.suppress(TimeoutError):
            return outcome.result(_SIGNAL_SECONDS)
    return outcome.result()


def _serve(items: CallersIterable[Any], outcome: concurrent.futures.Future[T]) -> None:
    """Read items that the loop asks for, until the outcome is there."""
    outcome.add_done_callback(lambda _: items.wake())
    while not outcome.done():
        items.run_errands(_SIGNAL_SECONDS)


def _begin(
    call: Callable[[], Coroutine[Any, Any, T]], outcome: concurrent.futures.Future[T]
) -> None:
    """Make a task of the call whose end is the outcome's, and whose cancellation too."""
    if outcome.cancelled():
        return
    loop = asyncio.get_running_loop()
    task = loop.create_task(call())

    def pass_on(task: asyncio.Task[T]) -> None:
        if task.cancelled():
            outcome.cancel()
        elif outcome.set_running_or_notify_cancel():
            error = task.exception()
            if error is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(task.result())

    def cancel(outcome: concurrent.futures.Future[T]) -> None:
        if outcome.cancelled():
            with contextlib.suppress(RuntimeError):  # the loop may be closed
                loop.call_soon_threadsafe(task.cancel)

    task.add_done_callback(pass_on)
    outcome.add_done_callback(cancel)


async def _other_tasks(*, cancel: bool = False) -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        if cancel:
            task.cancel()
    cancelled = [task for task in tasks if task.cancelling()]
    if cancelled:
        await asyncio.wait(cancelled, timeout=_STOP_SECONDS)


class _Readable(Protocol[P]):
    """What is read piece by piece on the loop: a stream, or a batch."""

    async def read_ready(self) -> list[P]:
        """All pieces that are there, at least one; an empty list at the end."""

    async def close(self) -> None:
        """End it."""


class _BlockingReader(Generic[P]):
    """Takes the pieces of what runs on the loop over to the caller's thread, many at a time."""

    def __init__(
        self, thread: LoopThread, source: _Readable[P], owner: object, items: object = None
    ) -> None:
        """``owner`` ends the thread when it is collected, so it is held here. ``items`` are what
        it is made of, if that is read in the caller's thread."""
        self._thread = thread
        self._source = source
        self._owner = owner
        self._items = items
        self._ready: deque[P] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> P:
        if not self._ready:
            self._ready.extend(self._read(self._source.read_ready))
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    def close(self) -> None:
        """End it; the servers stop generating. May be called twice."""
        if not self._thread.closed:  # with the client, all connections were closed
            self._thread.run(self._source.close)
        if isinstance(self._items, CallersIterable):
            self._items.close()

    def _read(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            return self._thread.run(call, self._items)
        except KeyboardInterrupt:
            # It may have come together with a piece, and have cancelled nothing.
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._source!r}>"


class PulledStream(Protocol[R_co]):
    """What a blocking stream reads from: a :class:`GenerationStream` and its like."""

    @property
    def ending(self) -> StreamEnding | None: ...
    @property
    def text(self) -> str: ...
    @property
    def usage(self) -> Usage | None: ...
    @property
    def result(self) -> R_co: ...
    async def collect(self) -> R_co: ...
    async def read_ready(self) -> list[StreamChunk]: ...
    async def close(self) -> None: ...
    async def __aenter__(self) -> object: ...


class BlockingStream(_BlockingReader[StreamChunk], Generic[R]):
    """A generation as it happens: an iterator of :class:`StreamChunk`, and a context manager.

    The blocking form of :class:`GenerationStream`; all that is said there holds here.
    """

    def __init__(self, thread: LoopThread, stream: PulledStream[R], owner: object) -> None:
        """``owner`` ends the thread when it is collected, so it is held here."""
        super().__init__(thread, stream, owner)
        self._stream = stream

    @property
    def ending(self) -> StreamEnding | None:
        """How the stream ended; ``None`` while it has not."""
        return self._stream.ending

    @property
    def text(self) -> str:
        """Text of choice 0 that has come so far."""
        return self._stream.text

    @property
    def usage(self) -> Usage | None:
        """Tokens taken; known at the end."""
        return self._stream.usage

    @property
    def result(self) -> R:
        """The whole answer; see :attr:`GenerationStream.result`."""
        return self._stream.result

    def collect(self) -> R:
        """Run to the end; the whole answer. The stream is closed, whatever happens."""
        return self._thread.run(self._stream.collect)

    def texts(self) -> Iterator[str]:
        """The text of choice 0 only, piece by piece."""
        for chunk in self:
            if chunk.text and chunk.index == 0:
                yield chunk.text

    def __enter__(self) -> Self:
        self._read(self._stream.__aenter__)
        return self


class BlockingBatchStream(_BlockingReader[BatchAnswer]):
    """The answers of a batch, as they come: an iterator of :class:`BatchAnswer`, and a context
    manager.

    The blocking form of :class:`BatchStream`; all that is said there holds here.
    """

    def __init__(
        self, thread: LoopThread, stream: BatchStream, owner: object, prompts: object
    ) -> None:
        """``owner`` ends the thread when it is collected, so it is held here."""
        super().__init__(thread, stream, owner, prompts)
        self._stream = stream

    @property
    def metrics(self) -> BatchMetrics:
        """The figures so far."""
        return self._stream.metrics

    @property
    def trouble(self) -> VllmError | None:
        """Why prompts fail at this moment, while none succeeds; ``None`` while all is well."""
        return self._stream.trouble
