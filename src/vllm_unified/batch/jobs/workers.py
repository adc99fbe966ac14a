"""Threads of a job that never hold up the end of the program."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from functools import partial
from typing import Generic, TypeVar

T = TypeVar("T")

_CHUNK = 256
_AHEAD = 1024
"""Items that are read before somebody wants them."""


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
    """Items that a thread reads ahead. They are there as soon as they are read, and as many at a
    time as have been.

    Attributes:
        count: How many it has read.
        ended: Whether these are all.
    """

    def __init__(self, items: Generator[T, None, None]) -> None:
        self.count = 0
        self.ended = False
        self._items = items
        self._loop = asyncio.get_running_loop()
        self._read_ahead: deque[T] = deque()
        self._room = threading.Event()
        self._closed = False
        self._error: BaseException | None = None
        self._hungry: asyncio.Future[None] | None = None
        threading.Thread(target=self._read, name="vllm-unified rows", daemon=True).start()

    async def chunks(self) -> AsyncIterator[list[T]]:
        """The items. Raises what reading raised."""
        ahead = self._read_ahead
        while True:
            if ahead:
                yield [ahead.popleft() for _ in range(min(len(ahead), _CHUNK))]
                self._room.set()
                continue
            ended = self.ended  # before looking whether the last ones have come
            if ended and not ahead:
                if self._error is not None:
                    raise self._error
                return
            # Said before looking again: the thread looks here after it has put something there.
            hungry = self._hungry = self._loop.create_future()
            if not ahead and not self.ended:
                await hungry
            self._hungry = None

    def close(self) -> None:
        """Read no more than what is being read."""
        self._closed = True
        self._room.set()

    def _read(self) -> None:
        ahead = self._read_ahead
        try:
            for item in self._items:
                while len(ahead) >= _AHEAD and not self._closed:
                    self._room.clear()
                    if len(ahead) >= _AHEAD:
                        self._room.wait()
                if self._closed:
                    return
                ahead.append(item)
                self.count += 1
                if self._hungry is not None:
                    self._wake()
        except BaseException as error:  # noqa: BLE001 - raised where the items are wanted
            self._error = error
        finally:
            self._items.close()
            self.ended = True
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._arrived)

    def _arrived(self) -> None:
        if self._hungry is not None and not self._hungry.done():
            self._hungry.set_result(None)
