"""The engine: who runs, who waits, and when the next token comes.

Decisions are synchronous; a sequence only ever waits in :meth:`Generation._wait`, from which the
engine can wake it to run, to be aborted, or to die.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterable

import msgspec

from vllm_unified.simulator.config import SimulatorConfig
from vllm_unified.simulator.errors import BACKLOG, BUSY, busy, engine_dead
from vllm_unified.simulator.kvcache import Allocation, KVCache
from vllm_unified.simulator.metrics import EngineMetrics
from vllm_unified.simulator.model import State, salt_of, weights
from vllm_unified.simulator.output import Output, Step
from vllm_unified.simulator.sampling import Sampling
from vllm_unified.simulator.tokenizer import encode
from vllm_unified.simulator.vocabulary import EOS

_BREATH = 16
"""Tokens that a sequence may generate without letting others run, when nothing takes time."""
_SLOWED = 0.001
"""Seconds per step that a slowdown multiplies where the configured time is zero."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    lora: str | None = None
    """Name of the adapter."""
    lora_path: str | None = None
    priority: int = 0
    """Lower runs earlier, under the priority policy."""
    sample: int = 0
    """Which of the ``n`` samples of its prompt this is."""
    cache_salt: str | None = None


class Engine:
    """Runs up to ``max_num_seqs`` sequences at a time and queues the others."""

    def __init__(self, config: SimulatorConfig) -> None:
        self.config = config
        self.cache = KVCache(
            config.num_blocks, config.block_size, prefix_caching=config.enable_prefix_caching
        )
        self.metrics = EngineMetrics(config.max_model_len)
        self.running: set[Generation] = set()
        self.dead = False
        self.hung = False
        """No progress, although everything says it is well."""
        self.paused = False
        self.sleep_level: int | None = None
        """``None``: awake."""
        self.slowdown = 1.0
        """How many times slower than configured everything is."""
        self.random = random.Random(config.seed)
        self._waiting: list[tuple[int, int, Generation]] = []
        self._arrivals = itertools.count()
        self._all: set[Generation] = set()

    @property
    def stopped(self) -> bool:
        """Whether nothing is scheduled at present."""
        return self.hung or self.paused or self.sleep_level is not None

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return sum(1 for *_, generation in self._waiting if generation.queued)

    @property
    def unfinished(self) -> int:
        """Sequences that wait or run."""
        return len(self._all)

    def check(self, sequences: int) -> None:
        """Refuse what cannot be taken; called before an answer starts and again on submission.

        Raises:
            ApiError: the engine is dead (500), or a queue limit is reached (503).
        """
        if self.dead:
            raise engine_dead()
        limit = self.config.max_num_queued_reqs
        if limit is not None and self.unfinished + sequences > limit:
            self.metrics.rejections["max_num_queued_reqs"] += 1
            raise busy(BUSY)
        tokens = self.config.max_num_queued_tokens
        if tokens is not None and self._prefilling() >= tokens:
            self.metrics.rejections["max_num_queued_tokens"] += 1
            raise busy(BACKLOG)

    def submit(self, jobs: Iterable[Job]) -> list[Generation]:
        """Queue the samples of one prompt; the caller must :meth:`Generation.close` each.

        Raises:
            ApiError: as :meth:`check`.
        """
        jobs = list(jobs)
        self.check(len(jobs))
        generations = [Generation(self, job, next(self._arrivals)) for job in jobs]
        self._all.update(generations)
        for generation in generations:
            self.enqueue(generation)
        self.schedule()
        return generations

    def enqueue(self, generation: Generation) -> None:
        """Put a sequence into the queue."""
        by_priority = self.config.scheduling_policy == "priority"
        priority = generation.job.priority if by_priority else 0
        generation.queued = True
        heapq.heappush(self._waiting, (priority, generation.arrival, generation))

    def schedule(self) -> None:
        """Let as many run as there is room for."""
        deferred = []
        while self._waiting and not self.stopped and len(self.running) < self.config.max_num_seqs:
            generation = self._waiting[0][2]
            if not generation.queued:
                heapq.heappop(self._waiting)
            elif not self._has_adapter_slot(generation.job.lora):
                deferred.append(heapq.heappop(self._waiting))
            elif generation.allocate():
                heapq.heappop(self._waiting)
                self.running.add(generation)
                generation.begin()
            else:
                break
        for entry in deferred:
            heapq.heappush(self._waiting, entry)

    def release(self, generation: Generation) -> None:
        """Forget a sequence and let the next one run."""
        self._all.discard(generation)
        self.running.discard(generation)
        generation.queued = False
        self.schedule()

    def preempt(self, generation: Generation) -> None:
        """Send a running sequence back to the queue, because no block is free."""
        self.metrics.preemptions += 1
        self.running.discard(generation)
        self.enqueue(generation)

    def abort(self, request_ids: Iterable[str] | None = None) -> int:
        """Abort the named requests, or all; how many sequences that was."""
        names = None if request_ids is None else set(request_ids)
        hit = [g for g in self._all if names is None or g.job.request_id in names]
        for generation in hit:
            generation.abort()
        return len(hit)

    def kill(self) -> None:
        """Die: every sequence fails at once, and every later one."""
        self.dead = True
        for generation in list(self._all):
            generation.wake()

    def pause(self, mode: str) -> None:
        """Stop scheduling; ``abort`` ends what runs, ``keep`` and ``wait`` leave it."""
        self.paused = True
        if mode == "abort":
            self.abort()

    def sleep(self, level: int, mode: str) -> None:
        """Go to sleep at a level from 0 to 2."""
        self.pause(mode)
        self.sleep_level = level

    def resume(self) -> None:
        """Run again, whatever stopped it: a pause, sleep or a hang."""
        self.paused = self.hung = False
        self.sleep_level = None
        self.schedule()
        for generation in list(self._all):
            generation.wake()

    def waiting_adapters(self) -> list[str]:
        """Adapters that queued sequences want, sorted."""
        return sorted({g.job.lora for *_, g in self._waiting if g.queued and g.job.lora})

    def running_adapters(self) -> list[str]:
        """Adapters in the batch, sorted."""
        return sorted({g.job.lora for g in self.running if g.job.lora})

    def _has_adapter_slot(self, lora: str | None) -> bool:
        active = {generation.job.lora for generation in self.running if generation.job.lora}
        return lora is None or lora in active or len(active) < self.config.max_loras

    def _prefilling(self) -> int:
        return sum(len(g.job.prompt) for g in self._all if not g.output.tokens)

    def delay(self, mean: float) -> float:
        """Seconds that something with this mean takes now: load, slowdown and jitter."""
        timing = self.config.timing
        load = 1.0 + timing.load_factor * len(self.running) / self.config.max_num_seqs
        jitter = self.random.gauss(1.0, timing.jitter) if timing.jitter else 1.0
        return max(mean * load * jitter * self.slowdown, 0.0)


class Generation:
    """One sequence on its way through the engine."""

    def __init__(self, engine: Engine, job: Job, arrival: int) -> None:
        self.job = job
        self.arrival = arrival
        self.output = Output(job.prompt, job.sampling)
        self.queued = False
        self.cached_tokens = 0
        self.arrived = time.monotonic()
        self.scheduled: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.finish_reason: str | None = None
        self.preemptions = 0
        self._engine = engine
        self._allocation: Allocation | None = None
        self._aborted = False
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None
        base = weights(engine.config.model, job.lora, job.lora_path)
        salt = salt_of(base, job.sampling, job.sample)
        self._state = State(job.prompt, salt, engine.config.eos_probability)
        self._forced = _forced_tokens(job.sampling.forced_text)

    async def steps(self) -> AsyncIterator[Step]:
        """Every token, as it comes; the last one has a finish reason.

        Raises:
            ApiError: the engine died.
        """
        await self._run()
        await self._prefill()
        while not self._aborted:
            step = self._next()
            yield step
            if step.finish_reason is not None:
                return
            await self._between_tokens()
        self.finish_reason = "abort"
        yield self.output.abort()

    def allocate(self) -> bool:
        """Take blocks for what is known so far; false if there are too few."""
        job = self.job
        salt = weights(job.lora, job.lora_path, job.cache_salt)
        tokens = job.prompt + self.output.tokens if self.output.tokens else job.prompt
        self._allocation = self._engine.cache.allocate(tokens, salt)
        return self._allocation is not None

    def begin(self) -> None:
        """Called by the engine: it runs now."""
        self.queued = False
        if self.scheduled is None and self._allocation is not None:
            self.scheduled = time.monotonic()
            self.cached_tokens = self._allocation.cached_tokens
        self.wake()

    def wake(self) -> None:
        """Stop waiting and look at what changed."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def abort(self) -> None:
        """End it with the finish reason ``abort``."""
        self._aborted = True
        self.wake()

    def close(self) -> None:
        """Give everything back.

        A sequence whose client left before its end appears in no metric, as in vLLM, which
        counts only aborts that the engine itself reports.
        """
        if self._closed:
            return
        self._closed = True
        self._free()
        if self.finish_reason is not None:
            self._engine.metrics.finished(self)
        self._engine.release(self)

    async def _run(self) -> None:
        """Wait for a place in the batch."""
        while self.queued and not self._aborted:
            await self._wait(None)
        self._check_alive()

    async def _prefill(self) -> None:
        timing = self._engine.config.timing
        fresh = len(self.job.prompt) - self.cached_tokens
        mean = timing.time_to_first_token + timing.per_prompt_token * fresh
        await self._work(mean)

    async def _between_tokens(self) -> None:
        await self._work(self._engine.config.timing.inter_token_latency)
        while not self._aborted and not self._extend():
            self._free()
            self.preemptions += 1
            self._engine.preempt(self)
            self._engine.schedule()
            await self._run()

    async def _work(self, mean: float) -> None:
        """Take time, if anything does, and stand still while the engine is stopped."""
        if mean or self._engine.slowdown != 1.0:
            await self._wait(self._engine.delay(mean or _SLOWED))
        elif len(self.output.tokens) % _BREATH == _BREATH - 1:
            await asyncio.sleep(0)
        while self._engine.stopped and not self._aborted and not self._engine.dead:
            await self._wait(None)
        self._check_alive()

    async def _wait(self, seconds: float | None) -> None:
        """Wait for :meth:`wake`, or for seconds to pass."""
        if self._engine.dead or self._aborted:
            return
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        timer = None if seconds is None else loop.call_later(seconds, self.wake)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _next(self) -> Step:
        token = self._draw()
        wanted = self.job.sampling.logprobs
        alternatives = None if wanted is None else self._state.alternatives(token, wanted)
        self._state.read(token)
        step = self.output.push(token, alternatives)
        self._engine.metrics.token(self, time.monotonic())
        self.finish_reason = step.finish_reason
        return step

    def _draw(self) -> int:
        sampling, count = self.job.sampling, len(self.output.tokens)
        if self._forced:
            return self._forced.pop()
        if sampling.allowed_token_ids:
            choices = sampling.allowed_token_ids
            return choices[self._state.draw() % len(choices)]
        may_end = not sampling.ignore_eos and count >= sampling.min_tokens
        return self._state.next_token(may_end=may_end)

    def _extend(self) -> bool:
        if self._allocation is None:
            return False
        length = len(self.job.prompt) + len(self.output.tokens) + 1
        return self._engine.cache.extend(self._allocation, length)

    def _free(self) -> None:
        if self._allocation is not None:
            self._engine.cache.free(self._allocation)
            self._allocation = None

    def _check_alive(self) -> None:
        if self._engine.dead:
            raise engine_dead()


def _forced_tokens(text: str | None) -> list[int]:
    """Tokens of a text that a grammar forces and of its end, in reverse."""
    return [] if text is None else [*encode(text), EOS][::-1]
