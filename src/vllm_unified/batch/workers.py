"""Threads of a job that never hold up the end of the program."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Generic, TypeVar

T = TypeVar("T")

_CHUNK = 256
_CHUNKS_AHEAD = 4


class Hand:
    """One thread that does what it is given, in order.

    A thread of asyncio's own would be waited for at the end of the program, and one that writes to
    a pipe which nobody reads has no end.
    """

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    async def do(self, function: Callable[[], T]) -> T:
        """Call it in the thread. A cancelled caller leaves it running to its end."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - raised where the caller waits
                tell(partial(_fail, outcome, error))
            else:
                tell(partial(_succeed, outcome, result))

        def tell(settle: Callable[[], None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed
                loop.call_soon_threadsafe(settle)

        self._work.put(work)
        return await outcome

    def close(self) -> None:
        """End the thread after what it has been given."""
        self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()


def _succeed(outcome: asyncio.Future[T], result: T) -> None:
    if not outcome.done():
        outcome.set_result(result)


def _fail(outcome: asyncio.Future[T], error: BaseException) -> None:
    if not outcome.done():
        outcome.set_exception(error)


class Feed(Generic[T]):
    """Items that a thread reads ahead, some at a time: as many as there are, without waiting for
    more than the first.

    Attributes:
        count: How many it has read.
        ended: Whether these are all.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._items = items
        self._loop = asyncio.get_running_loop()
        self._room = threading.Semaphore(_CHUNKS_AHEAD)
        self._closed = False
        self.count = 0
        self.ended = False
        self._ready: deque[list[T] | BaseException | None] = deque()
        self._hungry: asyncio.Future[None] | None = None
        threading.Thread(target=self._read, name="vllm-unified rows", daemon=True).start()

    async def chunks(self) -> AsyncIterator[list[T]]:
        """The items. Raises what reading raised."""
        while True:
            while not self._ready:
                self._hungry = self._loop.create_future()
                await self._hungry
            got = self._ready.popleft()
            self._room.release()
            if got is None:
                return
            if isinstance(got, BaseException):
                raise got
            yield got

    def close(self) -> None:
        """Read no more than what is being read."""
        self._closed = True
        self._room.release()

    def _read(self) -> None:
        chunk: list[T] = []
        end: BaseException | None = None
        try:
            for item in self._items:
                self.count += 1
                chunk.append(item)
                if len(chunk) >= _CHUNK or self._hungry is not None:
                    if not self._put(chunk):
                        return
                    chunk = []
            self.ended = True
        except BaseException as error:  # noqa: BLE001 - raised where the items are wanted
            end = error
        if chunk:
            self._put(chunk)
        self._put(end)

    def _put(self, got: list[T] | BaseException | None) -> bool:
        self._room.acquire()
        if self._closed:
            return False
        try:
            self._loop.call_soon_threadsafe(self._arrived, got)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _arrived(self, got: list[T] | BaseException | None) -> None:
        self._ready.append(got)
        if self._hungry is not None:
            if not self._hungry.done():
                self._hungry.set_result(None)
            self._hungry = None
