"""A batch on its way: what is read, sent, tried again and delivered."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from itertools import count
from random import random

from vllm_unified.batch.answer import BatchAnswer
from vllm_unified.batch.errors import BatchStoppedError
from vllm_unified.batch.metrics import BatchMetrics, Counter
from vllm_unified.batch.patience import STRIKES, Patience, blame_of, was_refused
from vllm_unified.batch.requests import PromptRequest, RequestMaker
from vllm_unified.batch.source import END, Source
from vllm_unified.endpoints.health import best_health
from vllm_unified.errors import ClientClosedError, VllmError
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.wire.responses import answer_decoder

SMALLEST_WINDOW = 64
"""Answers that may wait for the consumer before nothing new is begun; or as many as are under way,
if those are more."""
ORDERED_WINDOW = 1024
"""Prompts that may be begun beyond the one whose answer is next; or eight times as many as are
under way. One slow answer holds back all that come after it."""
_PROBE_SECONDS = 10.0
_LONG_TROUBLE = 1.0
"""Seconds after which the end of trouble is the end of an outage."""


class _Work:
    """A prompt that was read, and has no answer yet."""

    __slots__ = ("began", "error", "index", "prompt", "refused", "strikes", "tries")

    def __init__(self, index: int, prompt: PromptRequest) -> None:
        self.index = index
        self.prompt = prompt
        self.tries = 0
        self.strikes = 0.0
        self.began = 0.0
        """Of the last try, in monotonic seconds."""
        self.error: VllmError | None = None
        """Of the last try that a server took, or of the last one where none did."""
        self.refused = True
        """Whether no server took any try."""

    def failed(self, error: VllmError) -> None:
        """A try failed."""
        refused = was_refused(error)
        if self.refused or not refused:
            self.error = error
        self.refused = self.refused and refused


class BatchRun:
    """The work of one batch.

    *Workers* are tasks that each take a prompt, send it and deliver its answer, again and again, as
    many as the fleet has an appetite for. One that finds nothing to do ends, and whatever gives it
    something to do hires another: the consumer that made room, the alarm of a prompt that is to be
    tried again, another worker. So nothing waits but for a server, and the prompts that are held
    in memory are those under way, as many at most to be tried again, and as many answers.
    """

    def __init__(
        self,
        fleet: Fleet,
        source: Source,
        requests: RequestMaker,
        *,
        ordered: bool,
        patience: float | None,
    ) -> None:
        self._fleet = fleet
        self._source = source
        self._requests = requests
        self._ordered = ordered
        self._patience = Patience(patience)
        self._counter = Counter()
        self._workers: set[asyncio.Task[None]] = set()
        self._sending = 0
        self._again: list[tuple[float, int, _Work]] = []
        """Prompts that are to be tried again: a heap by time."""
        self._tickets = count()
        self._judge: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._ready: deque[BatchAnswer] = deque()
        self._out_of_order: dict[int, BatchAnswer] = {}
        self._next_index = 0
        """Whose answer is to be delivered next, where the order counts."""
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._is_held_back = False
        """Whether a worker ended because the consumer had not made room."""
        self._begun = False
        self._ended = False
        self._failure: BaseException | None = None

    @property
    def metrics(self) -> BatchMetrics:
        """The figures so far."""
        return self._counter.snapshot(time.monotonic())

    @property
    def ended(self) -> bool:
        """Whether nothing more will be answered."""
        return self._ended

    @property
    def trouble(self) -> VllmError | None:
        """Why prompts fail, while none succeeds."""
        if self._patience.trouble is None or not self._again:
            return None
        return max((work for _, _, work in self._again), key=lambda work: work.began).error

    async def next(self) -> BatchAnswer | None:
        """The next answer; ``None`` after the last one.

        Raises:
            BatchStoppedError: nothing succeeds any more; after all answers were taken.
            Exception: what the caller's own iterable of prompts raised; after all answers, too.
        """
        if not self._begun:
            self._begin()
        while not self._ready:
            if self._ended:
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    raise failure
                return None
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        answer = self._ready.popleft()
        if self._is_held_back:
            self._hire()
        return answer

    def take_ready(self) -> list[BatchAnswer]:
        """The answers that are there now."""
        ready = list(self._ready)
        self._ready.clear()
        if self._is_held_back:
            self._hire()
        return ready

    async def close(self) -> None:
        """Leave what is under way, and read no more. May be called twice."""
        tasks = self.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._source.close()

    def cancel(self) -> list[asyncio.Task[None]]:
        """Have all tasks leave what they do; they are returned."""
        if not self._ended:
            self._fail(ClientClosedError("this batch was closed before its end"))
            self._end()
        tasks = [*self._workers] + ([] if self._judge is None else [self._judge])
        for task in tasks:
            task.cancel()
        return tasks

    # Workers

    @property
    def _hands(self) -> int:
        """How many workers there may be. One takes up its next prompt in the moment in which the
        last is answered, and needs nobody in line behind it, unless prompts take their time."""
        return self._fleet.appetite if self._source.waits else self._fleet.capacity

    def _begin(self) -> None:
        self._begun = True
        self._counter.begin(time.monotonic())
        self._fleet.widen(self._source.size)
        self._hire()

    def _hire(self) -> None:
        """One more worker, if there is something to do for one."""
        if self._ended or len(self._workers) >= self._hands or not self._is_work():
            return
        worker = asyncio.get_running_loop().create_task(self._work())
        self._workers.add(worker)
        worker.add_done_callback(self._left)

    def _is_work(self) -> bool:
        now = time.monotonic()
        if self._patience.is_over(now):
            return False
        return self._is_due(now) or self._may_begin()

    def _is_due(self, now: float) -> bool:
        return bool(self._again) and self._again[0][0] <= now

    def _may_begin(self) -> bool:
        """Whether a prompt that is new may be read."""
        source = self._source
        if source.is_empty or source.is_busy or self._failure is not None:
            return False
        hands = self._hands
        if len(self._again) >= hands:
            return False
        if self._ordered:
            ahead = self._counter.prompts - self._next_index
            self._is_held_back = ahead >= max(ORDERED_WINDOW, 8 * hands)
        else:
            self._is_held_back = False
        if len(self._ready) >= max(SMALLEST_WINDOW, hands):
            self._is_held_back = True
        return not self._is_held_back

    async def _work(self) -> None:
        while (work := await self._take()) is not None:
            self._hire()
            await self._send(work)
            if len(self._workers) > self._hands:
                return

    async def _take(self) -> _Work | None:
        """The next prompt to be sent: one that is to be tried again, or a new one."""
        while not self._ended:
            now = time.monotonic()
            if self._patience.is_over(now):
                return None
            if self._is_due(now):
                return heapq.heappop(self._again)[2]
            if not self._may_begin():
                return None
            if self._source.waits:
                index, prompt = await self._source.wait_for_next()
            else:
                index, prompt = self._source.next()
            if prompt is END:
                return None
            self._counter.prompts += 1
            try:
                return _Work(index, self._requests.make(prompt))
            except VllmError as error:
                self._deliver_error(index, error, tries=0)
        return None

    async def _send(self, work: _Work) -> None:
        prompt = work.prompt
        work.began = time.monotonic()
        work.tries += 1
        self._sending += 1
        try:
            result = await self._fleet.send(
                prompt.request, prompt.settings, answer_decoder(prompt.request)
            )
        except VllmError as error:
            self._sending -= 1
            self._counter.sent(len(error.attempts), again=work.tries > 1)
            self._failed(work, error)
            return
        except BaseException:
            self._sending -= 1
            raise
        self._sending -= 1
        now = time.monotonic()
        self._counter.sent(len(result.metadata.attempts), again=work.tries > 1)
        self._counter.succeeded(result, now - work.began)
        if self._patience.succeeded(now) > _LONG_TROUBLE:
            self._resume(now)
        self._deliver(BatchAnswer(index=work.index, result=result, tries=work.tries))

    def _failed(self, work: _Work, error: VllmError) -> None:
        if isinstance(error, ClientClosedError):
            self._fail(error)
            return
        blame = blame_of(error, own_model=work.prompt.own_model)
        work.failed(error)
        work.strikes += self._patience.strikes(error, began=work.began)
        if blame == "prompt" or work.strikes >= STRIKES:
            said = error if blame == "prompt" else work.error or error
            self._deliver_error(work.index, said, tries=work.tries)
            return
        now = time.monotonic()
        self._patience.failed(blame, now)
        self._try_later(work, now + self._patience.pause(work.tries, error, random))

    def _left(self, worker: asyncio.Task[None]) -> None:
        """A worker has ended; perhaps it was the last."""
        self._workers.discard(worker)
        if worker.cancelled():
            self._fail(ClientClosedError("this batch was cancelled"))
        elif (error := worker.exception()) is not None:
            self._fail(error)
        if not self._ended:
            self._look()

    def _look(self) -> None:
        """Whether this is the end, or there is something to wait for."""
        if not self._again and not self._sending:
            self._patience.calm()
        if self._patience.is_over(time.monotonic()) and not self._sending:
            if self._patience.is_hopeless:
                self._give_up()
            elif self._judge is None:
                self._judge = asyncio.get_running_loop().create_task(self._judge_servers())
        elif not self._workers and not self._again and self._source_is_over:
            self._end()
        else:
            self._hire()

    @property
    def _source_is_over(self) -> bool:
        return self._source.is_empty or self._failure is not None

    # Trying again

    def _try_later(self, work: _Work, at: float) -> None:
        heapq.heappush(self._again, (at, next(self._tickets), work))
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._again and not self._ended:
            # After the patience, only to find that it is over.
            delay = max(self._again[0][0] - time.monotonic(), 0.001)
            self._alarm = asyncio.get_running_loop().call_later(delay, self._ring)

    def _ring(self) -> None:
        self._look()
        self._set_alarm()

    def _resume(self, now: float) -> None:
        """The servers are back: nobody needs to sit out a pause."""
        self._again = [
            (min(at, now + random() * 0.5), ticket, work) for at, ticket, work in self._again
        ]
        heapq.heapify(self._again)
        self._set_alarm()

    async def _judge_servers(self) -> None:
        """The patience is over: are the servers at fault, or the few prompts that were left?"""
        try:
            health = await best_health(self._fleet.endpoints, probe=True, timeout=_PROBE_SECONDS)
            is_well = health.healthy
        except VllmError:
            is_well = False  # there are no servers any more
        self._judge = None
        if self._ended:
            return
        if not is_well:
            self._give_up()
            return
        again, self._again = self._again, []
        self._patience.calm()
        for at, ticket, work in again:
            assert work.error is not None
            work.strikes += 1 if work.refused else STRIKES
            if work.strikes >= STRIKES:
                self._deliver_error(work.index, work.error, tries=work.tries)
            else:
                heapq.heappush(self._again, (at, ticket, work))
        self._set_alarm()
        self._look()

    def _give_up(self) -> None:
        pending = sorted((work for _, _, work in self._again), key=lambda work: work.began)
        errors = {work.index: work.error for work in pending if work.error is not None}
        last = pending[-1].error if pending else None
        lasted = time.monotonic() - (self._patience.trouble or 0.0)
        why = f"nothing succeeded for {lasted:.3g} s"
        if self._patience.seconds > lasted:
            why = "nothing succeeds"
        done = self._counter.done
        said = "" if last is None else f"; the last error: {last.message}"
        stopped = BatchStoppedError(
            f"the batch was given up after {done} answers: {why}{said}",
            pending=errors,
            hint=None if last is None else last.hint,
        )
        stopped.__cause__ = last
        self._fail(stopped)
        self._end()
        for worker in self._workers:
            worker.cancel()  # one that waits for a prompt

    # Answers

    def _deliver_error(self, index: int, error: VllmError, *, tries: int) -> None:
        self._counter.failed(error)
        self._deliver(BatchAnswer(index=index, error=error, tries=tries))

    def _deliver(self, answer: BatchAnswer) -> None:
        if self._ordered:
            self._out_of_order[answer.index] = answer
            while (following := self._out_of_order.pop(self._next_index, None)) is not None:
                self._ready.append(following)
                self._next_index += 1
        else:
            self._ready.append(answer)
        if self._waiters and self._ready:
            self._wake()

    def _fail(self, error: BaseException) -> None:
        """Read no more; what is under way goes on."""
        if self._failure is None:
            self._failure = error
        if isinstance(error, ClientClosedError):
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._counter.end(time.monotonic())
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
