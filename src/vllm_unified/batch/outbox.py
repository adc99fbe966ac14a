"""Answers that wait for the consumer."""

from __future__ import annotations

import asyncio
from collections import deque

from vllm_unified.batch.answer import BatchAnswer


class Outbox:
    """Takes answers as they come, and gives them in that order, or in that of the prompts."""

    def __init__(self, *, ordered: bool) -> None:
        self.ordered = ordered
        self.next_index = 0
        """Whose answer is next, where the order counts."""
        self._ready: deque[BatchAnswer] = deque()
        self._early: dict[int, BatchAnswer] = {}
        """Whose turn has not come."""
        self._waiters: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        """How many may be taken now."""
        return len(self._ready)

    def put(self, answer: BatchAnswer) -> None:
        """An answer has come."""
        if self.ordered:
            self._early[answer.index] = answer
            while (following := self._early.pop(self.next_index, None)) is not None:
                self._ready.append(following)
                self.next_index += 1
        else:
            self._ready.append(answer)
        if self._waiters and self._ready:
            self.wake()

    def take(self) -> BatchAnswer:
        """The next answer.

        Raises:
            IndexError: there is none.
        """
        return self._ready.popleft()

    def take_all(self) -> list[BatchAnswer]:
        """All answers that may be taken now."""
        ready = list(self._ready)
        self._ready.clear()
        return ready

    async def wait(self) -> None:
        """Until an answer may be taken, or :meth:`wake`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def wake(self) -> None:
        """Let all who wait look again."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
