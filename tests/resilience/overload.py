"""Three times as many requests as the servers can answer, of three priorities."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.resilience.ledger import Ledger
from tests.resilience.outage import arrivals
from tests.resilience.servers import Servers
from vllm_unified import AsyncVllmUnified, VllmError
from vllm_unified.balancer import LoadBalancer
from vllm_unified.simulator import SimulatorConfig, Timing

SERVERS, BATCH, TOKENS = 4, 10, 10
CONFIG = SimulatorConfig(
    max_num_seqs=BATCH,
    max_num_queued_reqs=BATCH * 3 // 2,
    timing=Timing(inter_token_latency=0.022, jitter=0.1),
)
"""Batches of 10, which take about 0.2 s: 50 answers a second."""
OVERLOAD = 3.0
SHARES = {"high": 0.2, "normal": 0.5, "low": 0.3}
QUEUE_SIZE, QUEUE_TIMEOUT = 1000, 3.0
"""Callers, and seconds. Some are turned away, and some give up."""
WARM_UP = 4.0
"""Seconds until the limits are found and the line is as long as it gets."""
MEASURING = 3.0
"""Seconds that the capacity is measured for."""
QUESTION = {"max_tokens": TOKENS, "ignore_eos": True}


@dataclass
class Overload:
    """What became of it, after the warm-up."""

    capacity: float
    """Answers per second of a load that just fills the batches."""
    ledger: Ledger
    seconds: float = 0.0
    answered: int = 0
    outcomes: dict[str, Counter[str]] = field(
        default_factory=lambda: {priority: Counter() for priority in SHARES}
    )
    """Of the calls of each priority: ``answered``, or the error's class."""
    latencies: dict[str, list[float]] = field(
        default_factory=lambda: {priority: [] for priority in SHARES}
    )
    """Seconds until the answer, or until the caller gave up; without those who were turned away."""
    circuits_opened: int = 0

    @property
    def goodput(self) -> float:
        """Answers per second."""
        return self.answered / self.seconds

    def p99(self, priority: str) -> float:
        """99 % of these calls took so many seconds at most."""
        latencies = sorted(self.latencies[priority])
        return latencies[len(latencies) * 99 // 100]


async def run(seconds: float, *, seed: int) -> Overload:
    """Measure the capacity, and then offer three times as much for so many seconds."""
    with Servers([CONFIG] * SERVERS) as servers:
        capacity = await _capacity(servers.urls)
        ledger = Ledger()
        found = Overload(capacity, ledger)
        async with AsyncVllmUnified({"transport": ledger}) as client:
            ledger.watch(client)
            client.on("circuit_open", lambda event: _count_circuit(found))
            options = {
                "health_check": True,
                "queue_size": QUEUE_SIZE,
                "queue_timeout": f"{QUEUE_TIMEOUT}s",
            }
            balancer = client.create_load_balancer(servers.urls, options)
            await _overload(balancer, found, seconds, random.Random(seed))
    return found


async def _capacity(urls: list[str]) -> float:
    """Answers per second with exactly a batch at each server."""
    answers: list[float] = []
    async with AsyncVllmUnified() as client:

        async def ask(url: str) -> None:
            while True:
                await client.make_request(url, "Hello", options=QUESTION)
                answers.append(time.monotonic())

        callers = [asyncio.create_task(ask(url)) for url in urls for _ in range(BATCH)]
        await asyncio.sleep(1 + MEASURING)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    end = answers[-1]
    return sum(end - MEASURING < at for at in answers) / MEASURING


def _count_circuit(found: Overload) -> None:
    found.circuits_opened += 1


async def _overload(
    balancer: LoadBalancer, found: Overload, seconds: float, source: random.Random
) -> None:
    rate = OVERLOAD * found.capacity
    start = found.ledger.now + WARM_UP
    async with asyncio.TaskGroup() as tasks:
        async for _ in arrivals(rate, WARM_UP + seconds):
            (priority,) = source.choices([*SHARES], [*SHARES.values()])
            tasks.create_task(_call(balancer, found, priority, start, start + seconds))
    found.seconds = seconds


async def _call(
    balancer: LoadBalancer, found: Overload, priority: str, start: float, end: float
) -> None:
    ledger, began, outcome = found.ledger, found.ledger.now, "answered"
    try:
        await balancer.generate("Hello", priority=priority, **QUESTION)
    except VllmError as error:
        outcome = type(error).__name__
    if outcome == "answered" and start <= ledger.now < end:
        found.answered += 1
    if began >= start:
        found.outcomes[priority][outcome] += 1
        if outcome != "QueueFullError":
            found.latencies[priority].append(ledger.now - began)
