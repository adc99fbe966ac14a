"""A blocking caller's iterable, read by the event loop but in the caller's own thread."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import operator
import queue
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

_MOST_AT_ONCE = 64
_LONGEST = 0.002
"""Seconds of reading after which what was read is handed over."""


class CallersIterable(AsyncIterator[T], Generic[T]):
    """An iterable whose items are made in the thread that waits for the loop's answer.

    The caller's code may block, may belong to its thread (a database's cursor), and may use the
    client itself; on the loop's thread, it would hold up every connection. Items cross over many at
    a time. While the caller does not wait, nothing is read.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._items = items
        self._iterator = iter(items)
        self._errands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._is_empty = False

    def __length_hint__(self) -> int:
        return operator.length_hint(self._items)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._ready:
            if self._is_empty and not self._ready:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                raise StopAsyncIteration
            await self._send_for_more()
        return self._ready.popleft()

    async def _send_for_more(self) -> None:
        loop = asyncio.get_running_loop()
        back: asyncio.Future[None] = loop.create_future()

        def here() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(_done, back)

        def errand() -> None:
            try:
                self._read(here)
            finally:
                here()

        self._errands.put(errand)
        await back

    def _read(self, here: Callable[[], None]) -> None:
        """Some items; in the caller's thread. The first is told of at once: the next may take its
        time."""
        if self._is_empty:
            return
        end = time.monotonic() + _LONGEST
        try:
            for number in range(_MOST_AT_ONCE):
                self._ready.append(next(self._iterator))
                if not number:
                    here()
                if time.monotonic() > end:
                    return
        except StopIteration:
            self._is_empty = True
        except Exception as error:  # noqa: BLE001 - raised where the items are taken
            self._error = error
            self._is_empty = True

    def wake(self) -> None:
        """What :meth:`run_errands` waits for may have come."""
        self._errands.put(None)

    def run_errands(self, seconds: float) -> None:
        """Read what the loop asks for, or wait for it so long at most; in the caller's thread."""
        try:
            errand = self._errands.get(timeout=seconds)
        except queue.Empty:
            return
        if errand is not None:
            errand()

    def close(self) -> None:
        """Read no more. A generator is closed."""
        self._is_empty = True
        if inspect.isgenerator(self._items) and not self._items.gi_running:
            self._items.close()


def in_callers_thread(items: Any) -> Any:
    """The items, to be read in the thread that waits for them where reading them runs code."""
    if isinstance(items, Iterable) and not isinstance(items, Sequence | AsyncIterable | dict):
        return CallersIterable(items)
    return items


def _done(back: asyncio.Future[None]) -> None:
    if not back.done():
        back.set_result(None)
