"""All servers are gone for a while, and come back one after another, under a steady load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tests.resilience.ledger import Ledger
from tests.resilience.servers import Servers
from vllm_unified import AsyncVllmUnified, VllmError
from vllm_unified.balancer import LoadBalancer
from vllm_unified.simulator import SimulatorConfig, Timing

SERVERS = 4
RATE = 50
"""Calls per second, whatever becomes of them."""
BEFORE, AFTER = 2.0, 5.0
"""Seconds of load before the outage, and after the first server is back."""
BETWEEN_RETURNS = 0.5
"""Seconds."""
CONFIG = SimulatorConfig(timing=Timing(time_to_first_token=0.01, inter_token_latency=0.002))


@dataclass
class Outage:
    """What became of it. Times are in seconds since the ledger began."""

    ledger: Ledger
    down_at: float = 0.0
    back_at: float = 0.0
    end: float = 0.0
    urls: list[str] = field(default_factory=list)
    calls: list[tuple[float, float, str]] = field(default_factory=list)
    """When each began and ended, and its error's class, or ``""``."""

    @property
    def first_success(self) -> float:
        """Seconds from the return of the first server to the first answer."""
        return min(end for _, end, error in self.calls if not error and end > self.back_at) - (
            self.back_at
        )

    @property
    def normal_after(self) -> float:
        """Seconds from the return of the first server until no later call fails."""
        failed = [began for began, _, error in self.calls if error]
        return max([began - self.back_at for began in failed], default=0.0)

    def most_trials(self) -> int:
        """The most attempts at one server in any whole second in which all are shut out."""
        seconds = range(int(self.down_at) + 2, int(self.back_at))
        return max(self.ledger.by_server[url, second] for url in self.urls for second in seconds)


async def run(down: float) -> Outage:
    """An outage of so many seconds, and what was before and after it."""
    with Servers([CONFIG] * SERVERS) as servers:
        ledger = Ledger()
        found = Outage(ledger, urls=servers.urls)
        async with AsyncVllmUnified({"transport": ledger}) as client:
            ledger.watch(client)
            balancer = client.create_load_balancer(servers.urls, {"health_check": True})
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_break(servers, found, down))
                async for _ in arrivals(RATE, BEFORE + down + AFTER):
                    tasks.create_task(_call(balancer, found))
            found.end = ledger.now
    return found


async def arrivals(rate: float, seconds: float) -> AsyncIterator[None]:
    """Come back ``rate`` times a second; those that are late are made up for."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    for number in range(round(rate * seconds)):
        await asyncio.sleep(max(began + number / rate - loop.time(), 0.0))
        yield


async def _break(servers: Servers, found: Outage, down: float) -> None:
    await asyncio.sleep(BEFORE)
    found.down_at = found.ledger.now
    for server in range(SERVERS):
        servers.tell(server, "kill")
    await asyncio.sleep(down)
    found.back_at = found.ledger.now
    for server in range(SERVERS):
        servers.tell(server, "restart")
        await asyncio.sleep(BETWEEN_RETURNS)


async def _call(balancer: LoadBalancer, found: Outage) -> None:
    began, failure = found.ledger.now, ""
    try:
        await balancer.generate("Hello", max_tokens=4)
    except VllmError as error:
        failure = type(error).__name__
    found.calls.append((began, found.ledger.now, failure))
