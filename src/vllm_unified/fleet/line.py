"""Who waits for a slot in a fleet."""

from __future__ import annotations

import asyncio
import time

from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.endpoint import Endpoint, Slot
from vllm_unified.endpoints.queue import RequestQueue
from vllm_unified.errors import QueueFullError, QueueTimeoutError, VllmError
from vllm_unified.fleet.router import Router


class _Waiter:
    """A call in line, and the slot that it will get."""

    __slots__ = ("call", "turn")

    def __init__(self, call: Call, turn: asyncio.Future[Slot]) -> None:
        self.call = call
        self.turn = turn


class Line:
    """The calls that wait until an endpoint that they may go to has room.

    There is a queue for each model, as not every endpoint serves every model; the next turn is
    that of the queue whose first is of the lowest rank, and can be served. A full line turns away
    whose turn would be last, and that is not always who came last.
    """

    def __init__(self, router: Router, *, queue_size: int) -> None:
        """``queue_size`` is how many may wait."""
        self._router = router
        self._queue_size = queue_size
        self._queues: dict[str | None, RequestQueue[_Waiter]] = {}
        self._waiting = 0
        self._alarm: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return self._waiting

    def take(self, call: Call) -> Slot | None:
        """A slot for the call's next attempt, if it need not wait for one.

        Raises:
            CircuitOpenError: every endpoint is shut out.
        """
        if call.request.model in self._queues:
            return None
        return self._router.take(call, time.monotonic())

    def _make_room(self, call: Call) -> bool:
        """Turn away whose turn is last, if that is after this call's; whether it was."""
        if not self._waiting:
            return False
        model, queue = max(self._queues.items(), key=lambda item: item[1].last_rank())
        if queue.rank_of(priority=call.request.priority, since=call.started) >= queue.last_rank():
            return False
        state = self.state(call)
        waiter = queue.pop_last()
        self._left(model, queue)
        if not waiter.turn.done():
            waiter.turn.set_exception(QueueFullError(f"the queue is full: {state}"))
        return True

    async def wait(self, call: Call) -> Slot:
        """A slot for the call's next attempt, after its turn has come.

        Raises:
            QueueFullError: as many wait as may, and its turn would be after all of theirs, or
                later those of others came before it.
            QueueTimeoutError: it waited for ``queue_timeout``.
            CircuitOpenError: every endpoint is shut out.
        """
        if self._waiting >= self._queue_size and not self._make_room(call):
            raise QueueFullError(f"the queue is full: {self.state(call)}")
        now = time.monotonic()
        turn: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        model = call.request.model
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = RequestQueue()
        waiter = _Waiter(call, turn)
        ticket = queue.push(
            waiter,
            priority=call.request.priority,
            caller=call.settings.caller,
            since=call.started,
        )
        self._waiting += 1
        if self._alarm is not None or queue.peek() is waiter:
            self.serve()  # time may have passed, or it needs less of a quota than the others
        call.waiting = True
        seconds = call.settings.queue_timeout
        try:
            slot = await turn if seconds is None else await self._turn(call, turn, seconds)
        except BaseException as error:
            # A deadline cancels, and is then asked for its reason.
            call.waiting = isinstance(error, asyncio.CancelledError)
            if queue.remove(ticket):
                self._left(model, queue)
                self.serve()  # the next may fit in where this one did not
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                turn.result().leave()  # it came in the same moment
            raise
        finally:
            call.queue_wait += time.monotonic() - now
        call.waiting = False
        return slot

    async def _turn(self, call: Call, turn: asyncio.Future[Slot], seconds: float) -> Slot:
        try:
            async with asyncio.timeout(seconds):
                return await turn
        except VllmError:
            raise
        except TimeoutError:
            raise self.out_of_time(call, seconds) from None

    def serve(self, at: Endpoint | None = None) -> None:
        """Give every slot that is free to who is next; ``at``: nothing has changed elsewhere."""
        while self._waiting:
            if at is not None and at.is_plain and at.in_flight >= at.limit.capacity:
                return  # it is full, and only time could change that elsewhere
            now = time.monotonic()
            queues = self._queues.items()
            for model, queue in sorted(queues, key=_rank) if len(queues) > 1 else list(queues):
                if self._serve_next(model, queue, now, at):
                    break
            else:
                self._set_alarm(now)
                return

    def _serve_next(
        self,
        model: str | None,
        queue: RequestQueue[_Waiter],
        now: float,
        at: Endpoint | None,
    ) -> bool:
        """Whether the next in this queue is served, or turned away."""
        waiter = queue.peek()
        if waiter.turn.done():  # cancelled in this turn of the loop, and still in line
            self._next(model, queue)
            return True
        try:
            slot = self._router.take(waiter.call, now, at)
        except VllmError as error:
            self._next(model, queue)
            waiter.turn.set_exception(error)
            return True
        if slot is None:
            return False
        self._next(model, queue)
        try:
            waiter.turn.set_result(slot)
        except BaseException:
            slot.leave()
            raise
        return True

    def _next(self, model: str | None, queue: RequestQueue[_Waiter]) -> _Waiter:
        waiter = queue.pop()
        self._left(model, queue)
        return waiter

    def _left(self, model: str | None, queue: RequestQueue[_Waiter]) -> None:
        self._waiting -= 1
        if not queue and self._queues.get(model) is queue:
            del self._queues[model]

    def _set_alarm(self, now: float) -> None:
        """Come back when a server may be sent to again; all but time tells by itself."""
        self.cancel_alarm()
        roomy = [
            each
            for each in self._router.endpoints
            if not each.is_plain and each.in_flight < each.capacity
        ]
        if not roomy:
            return
        times = [
            at
            for tokens in {queue.peek().call.request.tokens for queue in self._queues.values()}
            for each in roomy
            if (at := each.ready_at(now, tokens)) > now
        ]
        if times:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(max(min(times) - now, 0.001), self.serve)

    def cancel_alarm(self) -> None:
        """Do not come back."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def out_of_time(self, call: Call, seconds: float) -> QueueTimeoutError:
        """The error of a call that waited for so long in vain."""
        return QueueTimeoutError(f"no slot came free within {seconds:g} s: {self.state(call)}")

    def state(self, call: Call) -> str:
        """How it stands, for the error of this call."""
        endpoints = self._router.endpoints
        in_flight = sum(each.in_flight for each in endpoints)
        capacity = sum(each.capacity for each in endpoints)
        queue = self._queues.get(call.request.model)
        state = f"{self._waiting} waiting" if queue is None else queue.state(time.monotonic())
        return f"{state}, {in_flight} in flight of {capacity} that are let through"


def _rank(item: tuple[str | None, RequestQueue[_Waiter]]) -> float:
    rank = item[1].rank()
    assert rank is not None  # an empty queue is not kept
    return rank
