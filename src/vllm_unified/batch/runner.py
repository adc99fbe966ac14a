"""A batch on its way: what is read, sent, tried again and delivered."""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from itertools import count
from random import random
from typing import Any

from vllm_unified.batch.answer import BatchAnswer
from vllm_unified.batch.errors import BatchStoppedError
from vllm_unified.batch.metrics import BatchMetrics, Counter
from vllm_unified.batch.outbox import Outbox
from vllm_unified.batch.packing import PackSize, own_results
from vllm_unified.batch.patience import STRIKES, Blame, Patience, blame_of, was_refused
from vllm_unified.batch.requests import RequestMaker
from vllm_unified.batch.source import Source
from vllm_unified.batch.work import Pack, Work
from vllm_unified.endpoints.health import best_health
from vllm_unified.errors import (
    CircuitOpenError,
    ClientClosedError,
    ConnectError,
    ProtocolError,
    VllmError,
)
from vllm_unified.fleet.fleet import Decode, Fleet
from vllm_unified.results import GenerationResult
from vllm_unified.settings import Settings
from vllm_unified.wire.requests import WireRequest
from vllm_unified.wire.responses import answer_decoder

SMALLEST_WINDOW = 64
"""Answers that may wait for the consumer before nothing new is begun; or as many as are under way,
if those are more."""
ORDERED_WINDOW = 1024
"""Prompts that may be begun beyond the one whose answer is next; or eight times as many as are
under way. One slow answer holds back all that come after it."""
_PROBE_SECONDS = 10.0
_LOOK_AGAIN = 0.005
"""Seconds. A timer may ring a moment before what it is for is due."""
_COUNT_AGAIN = 0.01
"""Seconds. Sixteen servers are not asked for each prompt how many requests they take now."""
_LONG_TROUBLE = 1.0
"""Seconds after which the end of trouble is the end of an outage."""


class BatchRun:
    """The work of one batch.

    *Workers* are tasks that each take a prompt, send it and deliver its answer, again and again, as
    many as the fleet lets through. One that finds nothing to do ends, and whatever gives it
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
        pack: int | None,
    ) -> None:
        self._fleet = fleet
        self._source = source
        self._requests = requests
        self._patience = Patience(patience)
        self._pack = PackSize(requests.most_in_a_pack, fixed=pack)
        self._left_over: Work | None = None
        """Was read for a pack, and did not fit in."""
        self._counter = Counter()
        self._workers: set[asyncio.Task[None]] = set()
        self._capacity = self._hands = 0
        """How many requests the servers take, and how many workers there may be."""
        self._counted_at = -math.inf
        self._sending = 0
        """Prompts that are being sent, or answered."""
        self._again: list[tuple[float, int, Pack]] = []
        """Prompts that are to be tried again: a heap by time."""
        self._tickets = count()
        self._judge: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._outbox = Outbox(ordered=ordered)
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
        return max((pack for _, _, pack in self._again), key=lambda pack: pack.began).last_error

    async def next(self) -> BatchAnswer | None:
        """The next answer; ``None`` after the last one.

        Raises:
            BatchStoppedError: nothing succeeds any more; after all answers were taken.
            Exception: what the caller's own iterable of prompts raised; after all answers, too.
        """
        if not self._begun:
            self._begin()
        while not self._outbox:
            if self._ended:
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    raise failure
                return None
            await self._outbox.wait()
        answer = self._outbox.take()
        if self._is_held_back:
            self._hire()
        return answer

    def take_ready(self) -> list[BatchAnswer]:
        """The answers that are there now."""
        ready = self._outbox.take_all()
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
        others = (self._judge, self._source.task)
        tasks = [*self._workers, *(task for task in others if task is not None)]
        for task in tasks:
            task.cancel()
        return tasks

    # Workers

    def _count_hands(self, now: float) -> None:
        """As many workers as requests: one takes up its next prompt in the moment in which the
        last is answered, so that none has to wait in line."""
        self._counted_at = now
        self._capacity = self._fleet.capacity
        size = self._pack.size
        self._hands = self._capacity if size == 1 else max(1, self._capacity // size)

    def _begin(self) -> None:
        self._begun = True
        now = time.monotonic()
        self._counter.begin(now)
        self._fleet.widen(self._source.size)
        self._count_hands(now)
        self._source.begin(self._arrived)
        self._hire()

    def _arrived(self) -> None:
        """A prompt has come that was waited for, or the last one had come already."""
        if not self._ended:
            self._look()

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
        if self._left_over is not None:
            return True
        if source.is_empty or source.waits or self._failure is not None:
            return False
        hands = self._capacity
        if len(self._again) >= hands:
            return False
        outbox = self._outbox
        self._is_held_back = len(outbox) >= max(SMALLEST_WINDOW, hands)
        if outbox.ordered and not self._is_held_back:
            ahead = self._counter.prompts - outbox.next_index
            self._is_held_back = ahead >= max(ORDERED_WINDOW, 8 * hands)
        return not self._is_held_back

    async def _work(self) -> None:
        while (pack := self._take()) is not None:
            if len(self._workers) < self._hands:
                self._hire()
            if len(pack.works) == 1:
                work = pack.works[0]
                prompt = work.prompt
                result = await self._send(pack, prompt.request, prompt.settings, prompt.decode)
                if result is not None:
                    self._answered(work, result, time.monotonic() - pack.began)
            else:
                await self._send_several(pack)
            if len(self._workers) > self._hands:
                return

    def _take(self) -> Pack | None:
        """What is to be sent next: again, or for the first time."""
        now = time.monotonic()
        if self._ended or self._patience.is_over(now):
            return None
        if now - self._counted_at >= _COUNT_AGAIN:
            self._count_hands(now)
        if self._is_due(now):
            return heapq.heappop(self._again)[2]
        first = self._read()
        if first is None:
            return None
        works = [first]
        template = first.prompt.template
        while len(works) < self._pack.size and template is not None:
            another = self._read()
            if another is None:
                break
            prompt = another.prompt
            if prompt.template is not template or prompt.is_text != first.prompt.is_text:
                self._left_over = another
                break
            works.append(another)
        return Pack(works)

    def _read(self) -> Work | None:
        """The next prompt that can be sent."""
        if self._left_over is not None:
            work, self._left_over = self._left_over, None
            return work
        while self._may_begin():
            found = self._source.next()
            if found is None:
                return None
            index, prompt = found
            self._counter.prompts += 1
            try:
                return Work(index, self._requests.make(prompt))
            except VllmError as error:
                self._deliver_error(index, error, tries=0)
        return None

    async def _send_several(self, pack: Pack) -> None:
        works = pack.works
        first = works[0].prompt
        assert first.template is not None
        request = first.template.joined([work.prompt.request for work in works])
        packed = await self._send(pack, request, first.settings, answer_decoder(request))
        if packed is None:
            return
        results = own_results(packed, len(works))
        if results is None:
            # Nobody can say how many tokens each took; it is asked for one by one.
            self._pack.give_up()
            self._split(pack, pack.halves())
            return
        self._counter.packed(len(works))
        duration = time.monotonic() - pack.began
        for work, result in zip(works, results, strict=True):
            self._answered(work, result, duration)

    async def _send(
        self, pack: Pack, request: WireRequest, settings: Settings, decode: Decode[Any]
    ) -> GenerationResult | None:
        """The answer; ``None`` if it failed, which was then seen to."""
        works = pack.works
        pack.began = time.monotonic()
        for work in works:
            work.tries += 1
        again = works[0].tries > 1
        self._sending += len(works)
        try:
            result: GenerationResult = await self._fleet.send(request, settings, decode)
        except VllmError as error:
            self._sending -= len(works)
            self._counter.sent(len(error.attempts), again=again)
            self._failed(pack, error)
            return None
        except BaseException:
            self._sending -= len(works)
            raise
        self._sending -= len(works)
        now = time.monotonic()
        self._counter.sent(len(result.metadata.attempts), again=again)
        if self._patience.succeeded(now) > _LONG_TROUBLE:
            self._resume(now)
        if not self._pack.is_off:
            self._pack.answered(
                len(works),
                under_way=self._sending + len(works),
                servers=len(self._fleet.endpoints),
                now=now,
            )
        return result

    def _answered(self, work: Work, result: GenerationResult, duration: float) -> None:
        self._counter.succeeded(result, duration)
        self._outbox.put(BatchAnswer(index=work.index, result=result, tries=work.tries))

    def _failed(self, pack: Pack, error: VllmError) -> None:
        if isinstance(error, ClientClosedError):
            self._fail(error)
            return
        if len(pack.works) > 1 and not isinstance(error, ConnectError | CircuitOpenError):
            if isinstance(error, ProtocolError):
                self._pack.give_up()
            if was_refused(error):
                self._pack.allow(len(pack.works) // 2)  # there were too many of them
                self._split(pack, [Pack([work]) for work in pack.works])
            else:
                self._split(pack, pack.halves())
            return
        own_model = pack.works[0].prompt.own_model
        blame = blame_of(error, own_model=own_model)
        strikes = self._patience.strikes(error, began=pack.began)
        left = [work for work in pack.works if not self._is_out(work, error, blame, strikes)]
        if not left:
            return
        now = time.monotonic()
        self._patience.failed(blame, now)
        pack.works = left
        self._try_later(pack, now + self._patience.pause(left[0].tries, error, random))

    def _is_out(self, work: Work, error: VllmError, blame: Blame, strikes: float) -> bool:
        """Whether this was the prompt's last try; it has its error then."""
        work.failed(error)
        work.strikes += strikes
        if blame != "prompt" and work.strikes < STRIKES:
            return False
        said = error if blame == "prompt" else work.error or error
        self._deliver_error(work.index, said, tries=work.tries)
        return True

    def _split(self, pack: Pack, parts: list[Pack]) -> None:
        """Send the parts of a pack; that was no try of its prompts."""
        for work in pack.works:
            work.tries -= 1
        now = time.monotonic()
        for part in parts:
            self._try_later(part, now)

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
            if self._alarm is None and self._again and not self._is_taken_up:
                self._set_alarm(at_least=_LOOK_AGAIN)

    @property
    def _is_taken_up(self) -> bool:
        """Whether a worker will come by what is to be tried again."""
        return bool(self._workers) and self._is_due(time.monotonic())

    @property
    def _source_is_over(self) -> bool:
        if self._left_over is not None:
            return False
        return self._source.is_empty or self._failure is not None

    # Trying again

    def _try_later(self, pack: Pack, at: float) -> None:
        heapq.heappush(self._again, (at, next(self._tickets), pack))
        self._set_alarm()

    def _set_alarm(self, *, at_least: float = 0.0) -> None:
        """Come back when the next of them is due, in so many seconds at least. Of those that are
        due already, workers take one when they have ended another."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._again and not self._ended:
            delay = max(self._again[0][0] - time.monotonic(), at_least)
            self._alarm = asyncio.get_running_loop().call_later(delay, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._look()

    def _resume(self, now: float) -> None:
        """The servers are back: nobody needs to sit out a pause."""
        self._again = [
            (min(at, now + random() * 0.5), ticket, pack) for at, ticket, pack in self._again
        ]
        heapq.heapify(self._again)
        self._set_alarm()

    async def _judge_servers(self) -> None:
        """The patience is over: are the servers at fault, or the prompts that are left? Where the
        servers are well, the prompts are tried again, and what fails now is held against them."""
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
        now = time.monotonic()
        self._patience.proved(now)
        self._again = [(now, ticket, pack) for _, ticket, pack in self._again]
        self._look()

    def _give_up(self) -> None:
        packs = sorted((pack for _, _, pack in self._again), key=lambda pack: pack.began)
        pending = [work for pack in packs for work in pack.works]
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

    # Answers

    def _deliver_error(self, index: int, error: VllmError, *, tries: int) -> None:
        self._counter.failed(error)
        self._outbox.put(BatchAnswer(index=index, error=error, tries=tries))

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
        self._outbox.wake()
