"""Random faults at every server but never at most of them, and what callers notice of it.

Ten minutes in twenty seconds: servers that answer in about 10 ms for 300 ms, a fault every 100 ms
for every 3 s, and the client's times by the same factor.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from tests.resilience.ledger import Ledger, open_connections
from tests.resilience.servers import Servers
from vllm_unified import AsyncVllmUnified, VllmError
from vllm_unified.balancer import LoadBalancer
from vllm_unified.simulator import SimulatorConfig, Timing

COMPRESSION = 30
SERVERS, CALLERS = 8, 200
BETWEEN_FAULTS = 0.1
"""Seconds."""
THINKING = 0.5
"""Mean seconds between an answer and the next question of a caller."""
OPTIONS = {
    "attempt_timeout": "500ms",
    "idle_timeout": "500ms",
    "timeout": "10s",
    "max_retries": 4,
    "health_check": {
        "interval": "330ms",
        "recovery_interval": "100ms",
        "load_interval": "200ms",
        "timeout": "500ms",
    },
}
BREAKER = {"reset_timeout": 10_000 / COMPRESSION}
"""Milliseconds."""
CONFIG = SimulatorConfig(
    timing=Timing(time_to_first_token=0.005, inter_token_latency=0.001, jitter=0.2)
)
SPELLS = ("kill", "hang", "slow", "busy")
"""Troubles that last; a server that has one is down."""
SPELL = (0.3, 1.5)
"""Seconds that they last: 10 to 45 s before the compression."""
STROKES = (
    "reset",
    "reset_after",
    "close_after",
    "stall",
    "stall_after",
    "error_frame",
    "error_500",
)
"""Troubles of single requests."""
WORDS = "river stone lantern winter harbour copper meadow thunder velvet compass".split()


@dataclass
class Chaos:
    """What became of it."""

    seconds: float
    ledger: Ledger
    answered: int = 0
    wrong: list[tuple[str, str]] = field(default_factory=list)
    """Texts that should have been, and were."""
    errors: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    most_down: int = 0
    in_flight: int = -1
    """After the last call has ended, as the lines and the open connections are."""
    waiting: int = -1
    connections: int = -1
    memory: list[int] = field(default_factory=list)
    """Resident bytes, at ten times of equal distance and at the end."""
    continued: int = 0

    @property
    def success(self) -> float:
        """Share of the calls that were answered."""
        return self.answered / self.ledger.calls

    @property
    def amplification(self) -> float:
        """Attempts for each call."""
        return self.ledger.attempts / self.ledger.calls


Ask = Callable[[Any], Awaitable[str]]
"""One question to a load balancer, or to the client's default server."""


def _questions() -> list[Ask]:
    """Completions and chats, whole and in pieces, of several lengths."""
    made: list[Ask] = []
    for number, word in enumerate(WORDS):
        prompt, tokens = f"Tell me about the {word}.", 3 + number

        async def complete(where: Any, prompt: str = prompt, tokens: int = tokens) -> str:
            return str((await where.generate(prompt, max_tokens=tokens)).text)

        async def chat(where: Any, prompt: str = prompt, tokens: int = tokens) -> str:
            return str((await where.chat(prompt, max_tokens=tokens)).text)

        async def stream(where: Any, prompt: str = prompt, tokens: int = tokens) -> str:
            return await _read(where.stream(prompt, max_tokens=tokens))

        async def stream_chat(where: Any, prompt: str = prompt, tokens: int = tokens) -> str:
            return await _read(where.stream_chat(prompt, max_tokens=tokens))

        made += [complete, chat, stream, stream_chat]
    return made


async def _read(stream: Any) -> str:
    async with stream:
        return "".join([text async for text in stream.texts()])


async def run(seconds: float, *, seed: int) -> Chaos:
    """So many seconds of chaos, and the end of all calls."""
    with Servers([CONFIG] * (SERVERS + 1)) as servers:
        *urls, undisturbed = servers.urls
        questions = _questions()
        async with AsyncVllmUnified(api_url=undisturbed) as alone:
            right = [await ask(alone) for ask in questions]
        ledger = Ledger()
        found = Chaos(seconds, ledger)
        async with AsyncVllmUnified({"transport": ledger}) as client:
            ledger.watch(client)
            balancer = client.create_load_balancer(
                [{"url": url, "circuit_breaker": BREAKER} for url in urls], OPTIONS
            )
            pairs = list(zip(questions, right, strict=True))
            await _disturbed(servers, balancer, pairs, found, random.Random(seed))
            found.in_flight = sum(each.in_flight for each in client.list_endpoints())
            found.waiting = balancer.fleet.waiting
            found.continued = client.get_stats().overall.continued
        await asyncio.sleep(0)
        found.connections = open_connections(urls)
    return found


async def _disturbed(
    servers: Servers,
    balancer: LoadBalancer,
    pairs: list[tuple[Ask, str]],
    found: Chaos,
    source: random.Random,
) -> None:
    end = time.monotonic() + found.seconds
    async with asyncio.TaskGroup() as tasks:
        for number in range(CALLERS):
            own = random.Random(source.random())
            tasks.create_task(_call(balancer, pairs, found, own, end), name=f"caller {number}")
        tasks.create_task(_weigh(found))
        tasks.create_task(_Troubles(servers, found, source).cause(end))
    found.memory.append(psutil.Process().memory_info().rss)


async def _call(
    balancer: LoadBalancer,
    pairs: list[tuple[Ask, str]],
    found: Chaos,
    source: random.Random,
    end: float,
) -> None:
    while True:
        await asyncio.sleep(source.expovariate(1 / THINKING))
        if time.monotonic() >= end:
            return
        ask, right = source.choice(pairs)
        try:
            text = await ask(balancer)
        except VllmError as error:
            found.errors[f"{type(error).__name__}: {error.message}"] += 1
        else:
            found.answered += 1
            if text != right:
                found.wrong.append((right, text))


async def _weigh(found: Chaos) -> None:
    for _ in range(10):
        await asyncio.sleep(found.seconds / 10)
        found.memory.append(psutil.Process().memory_info().rss)


class _Troubles:
    """Faults at random, at no more than half of the servers at a time."""

    def __init__(self, servers: Servers, found: Chaos, source: random.Random) -> None:
        self._servers = servers
        self._found = found
        self._random = source
        self._down: set[int] = set()

    async def cause(self, end: float) -> None:
        """Until then; every server is well again when this returns."""
        async with asyncio.TaskGroup() as spells:
            while time.monotonic() < end:
                server = self._random.choice([*set(range(SERVERS)) - self._down])
                if self._random.random() < 0.5 and len(self._down) < SERVERS // 2:
                    self._down.add(server)
                    self._found.most_down = max(self._found.most_down, len(self._down))
                    spells.create_task(self._spell(server))
                else:
                    self._strike(server)
                await asyncio.sleep(self._random.uniform(0.5, 1.5) * BETWEEN_FAULTS)

    def _strike(self, server: int) -> None:
        kind = self._random.choice(STROKES)
        self._found.faults[kind] += 1
        options: dict[str, Any] = {"times": self._random.randint(1, 3)}
        if kind.endswith("_after") or kind == "error_frame":
            options["after_tokens"] = self._random.randint(0, 5)
        if kind.startswith("stall"):
            options["seconds"] = self._random.uniform(*SPELL)
        self._servers.tell(server, "fail_next", kind, **options)

    async def _spell(self, server: int) -> None:
        kind = self._random.choice(SPELLS)
        self._found.faults[kind] += 1
        if kind == "slow":
            self._servers.tell(server, "slow_down", self._random.uniform(5, 20))
        elif kind == "busy":
            self._servers.tell(server, "fail_next", "busy", 1_000_000)
        else:
            self._servers.tell(server, kind)
        await asyncio.sleep(self._random.uniform(*SPELL))
        self._servers.tell(server, "restart" if kind == "kill" else "heal")
        self._down.discard(server)
