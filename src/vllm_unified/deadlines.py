"""Deadlines that cost next to nothing as long as they are kept.

``asyncio.timeout()`` makes and cancels a timer at each use, which takes longer than parsing an
answer. Of deadlines of one length, those that began first are due first: so they stand in line, and
one timer for the first is enough, which looks for the next one when it rings.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

_MAX_LENGTHS = 100
"""Lines that are kept. What is left of a total is another length each time, and of many streams it
would be thousands: beyond these, a deadline has a line, and so a timer, to itself."""


class Deadlines:
    """Makes the deadlines of one event loop; after a change of loops, those of the next."""

    __slots__ = ("_lines", "_loop")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lines: dict[float, _Line] = {}

    def within(self, seconds: float) -> Deadline:
        """To be used as ``with``: what takes longer is cancelled, and raises TimeoutError.

        It is ``asyncio.timeout()``, for the task that is running.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._lines = {}
        line = self._lines.get(seconds)
        if line is None:
            if len(self._lines) >= _MAX_LENGTHS:
                self._forget_empty_lines()
            is_kept = len(self._lines) < _MAX_LENGTHS
            line = _Line(loop, seconds, is_kept=is_kept)
            if is_kept:
                self._lines[seconds] = line
        return Deadline(line)

    def _forget_empty_lines(self) -> None:
        for seconds, line in list(self._lines.items()):
            if not line.waiting:
                line.close()
                del self._lines[seconds]


class _Line:
    """The deadlines of one length, in the order in which they are due."""

    __slots__ = ("_timer", "is_kept", "loop", "seconds", "waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, *, is_kept: bool) -> None:
        self.loop = loop
        self.is_kept = is_kept
        self.seconds = seconds
        self.waiting: dict[Deadline, float] = {}
        """With the loop's time at which each is due."""
        self._timer: asyncio.TimerHandle | None = None

    def set_timer(self, due: float) -> None:
        """Look at them then, if not earlier."""
        if self._timer is None:
            self._timer = self.loop.call_at(due, self._ring)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        now = self.loop.time()
        waiting = self.waiting
        while waiting:
            deadline = next(iter(waiting))
            due = waiting[deadline]
            if due > now:
                self._timer = self.loop.call_at(due, self._ring)
                return
            del waiting[deadline]
            deadline.pass_by()


class Deadline:
    """One use of :meth:`Deadlines.within`."""

    __slots__ = ("_cancelling", "_has_passed", "_line", "_task")

    def __init__(self, line: _Line) -> None:
        self._line = line
        self._has_passed = False

    def __enter__(self) -> None:
        line = self._line
        task = asyncio.current_task(line.loop)
        assert task is not None, "a deadline is for a task"
        self._task = task
        self._cancelling = task.cancelling()
        due = line.loop.time() + line.seconds
        is_first = not line.waiting
        line.waiting[self] = due
        if is_first:
            line.set_timer(due)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._has_passed:
            line = self._line
            del line.waiting[self]
            if not line.is_kept:
                line.close()
        # Whoever else cancelled the task in the same moment is to have it cancelled.
        elif self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def pass_by(self) -> None:
        """Its time is over."""
        self._has_passed = True
        self._task.cancel()
