"""The adaptive limit in its place: in an endpoint of a client, between its line and its server.

The server is the simulator's engine without sockets, and time is virtual: it goes on to the next
timer as soon as nothing else is to be done. So an hour takes seconds, and figures are the same on
every machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import pytest

from tests.support.answers import completion_body, usage
from vllm_unified import AsyncVllmUnified, OverloadedError
from vllm_unified.endpoints.adaptive import AdaptiveLimit
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.simulator import SimulatorConfig, Timing
from vllm_unified.simulator.engine import Engine, Job
from vllm_unified.simulator.errors import ApiError
from vllm_unified.simulator.sampling import Sampling

T = TypeVar("T")

CALLERS = 300
CONVERGENCE, STRETCH = 25.0, 10.0
"""Virtual seconds."""
TOKEN_SECONDS = {6: 0.01, 30: 0.02, 150: 0.08}
"""Of a batch of one, by the size of the batch."""
SWEPT = (0.75, 1.0, 1.5)
"""Fixed limits, in batches."""


class VirtualTime(selectors.DefaultSelector):
    """Where an event loop would wait, the time passes at once."""

    now = 1000.0
    """Monotonic seconds."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing will ever happen"
            self.now += max(timeout, 0.0)
        return ready


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
    """Runs a coroutine in virtual time."""
    clock = VirtualTime()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    random.seed(1)
    with asyncio.Runner(loop_factory=partial(asyncio.SelectorEventLoop, clock)) as runner:
        yield runner.run


class Answer:
    """A whole answer."""

    headers: Mapping[str, str] = {}

    def __init__(self, status: int, body: Any) -> None:
        self.status = status
        self._body = json.dumps(body).encode()

    async def packet(self) -> bytes:
        raise NotImplementedError

    async def read(self, limit: int) -> bytes:
        return self._body

    def close(self) -> None: ...


class EngineTransport:
    """A way to an engine."""

    def __init__(self, batch: int, *, admission: bool = False) -> None:
        self.engine = Engine(config(batch, admission=admission))
        self.answers = 0

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> Answer:
        tokens = json.loads(body or b"")["max_tokens"]
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        try:
            (generation,) = self.engine.submit([Job(request_id="", prompt=[1], sampling=sampling)])
        except ApiError as error:
            return Answer(error.status, error.body())
        try:
            async for _ in generation.steps():
                pass
        finally:
            generation.close()
        self.answers += 1
        return Answer(200, completion_body("a", usage=usage(1, tokens)))

    async def close(self) -> None: ...


def config(batch: int, *, admission: bool = False) -> SimulatorConfig:
    """A full batch makes every token take twice as long."""
    return SimulatorConfig(
        max_num_seqs=batch,
        max_num_queued_reqs=batch * 3 // 2 if admission else None,
        timing=Timing(inter_token_latency=TOKEN_SECONDS[batch], load_factor=1.0, jitter=0.1),
    )


class Fixed(AdaptiveLimit):
    """A limit that does not adapt."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, initial=capacity)

    def on_success(self, *, in_flight: int, work: float, now: float) -> None: ...

    def on_overload(self, *, in_flight: int) -> None: ...


class Load:
    """Callers that ask one server, again and again, through one client."""

    def __init__(self, transport: EngineTransport, limit: AdaptiveLimit | None = None) -> None:
        self._transport = transport
        self._vllm = AsyncVllmUnified(resources={"transport": transport}, timeout=1e6)
        self.endpoint: Endpoint = self._vllm.create_endpoint("http://gpu:8000")
        if limit is not None:
            self.endpoint.limit = limit
        self._random = random.Random(0)
        self._callers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self._callers = [asyncio.create_task(self._ask()) for _ in range(CALLERS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for caller in self._callers:
            caller.cancel()
        await asyncio.gather(*self._callers, return_exceptions=True)
        await self._vllm.close()

    async def _ask(self) -> None:
        while True:
            tokens = self._random.randint(3, 9)
            try:
                await self._vllm.make_request(self.endpoint, "Hello", max_tokens=tokens)
            except OverloadedError:
                await asyncio.sleep(0.05 * (1 + self._random.random()))

    async def per_second(self, *, after: float) -> float:
        """Answers per second, ``after`` so many seconds."""
        await asyncio.sleep(after)
        answers = self._transport.answers
        await asyncio.sleep(STRETCH)
        return (self._transport.answers - answers) / STRETCH


async def best_fixed_rate(batch: int) -> float:
    """Answers per second of the best of several limits that do not adapt."""
    rates = []
    for share in SWEPT:
        async with Load(EngineTransport(batch), Fixed(round(share * batch))) as load:
            rates.append(await load.per_second(after=2.0))
    return max(rates)


async def adaptive_rate(batch: int, *, admission: bool) -> float:
    async with Load(EngineTransport(batch, admission=admission)) as load:
        return await load.per_second(after=CONVERGENCE)


@pytest.mark.resilience
@pytest.mark.parametrize("admission", [False, True], ids=["queueing", "admission"])
@pytest.mark.parametrize("batch", TOKEN_SECONDS)
def test_throughput_comes_within_a_tenth_of_the_best_fixed_limit(
    run: Callable[[Coroutine[Any, Any, float]], float], batch: int, admission: bool
) -> None:
    best, adaptive = run(best_fixed_rate(batch)), run(adaptive_rate(batch, admission=admission))
    print(f"best fixed {best:.1f}/s, adaptive {adaptive:.1f}/s, ratio {adaptive / best:.2f}")

    assert adaptive > 0.9 * best


async def follow(batches: list[int]) -> list[float]:
    """Answers per second, while the batch of one server changes."""
    transport = EngineTransport(batches[0])
    rates = []
    async with Load(transport) as load:
        for batch in batches:
            transport.engine.config = config(batch)
            rates.append(await load.per_second(after=CONVERGENCE))
    return rates


@pytest.mark.resilience
@pytest.mark.parametrize("batches", [[30, 150], [150, 6]], ids=["grows", "shrinks"])
def test_throughput_follows_a_server_that_changes(
    run: Callable[[Coroutine[Any, Any, Any]], Any], batches: list[int]
) -> None:
    *_, rate = run(follow(batches))

    assert rate > 0.9 * run(best_fixed_rate(batches[-1]))


async def capacity(transport: EngineTransport, *, after: float) -> int:
    """The limit ``after`` so many seconds."""
    async with Load(transport) as load:
        await asyncio.sleep(after)
        return load.endpoint.capacity


def test_where_more_requests_only_queue_the_limit_comes_down_to_less_than_two_batches(
    run: Callable[[Coroutine[Any, Any, int]], int],
) -> None:
    assert run(capacity(EngineTransport(6), after=20.0)) < 12


def test_refusals_bring_the_limit_to_what_the_server_takes_within_a_second(
    run: Callable[[Coroutine[Any, Any, int]], int],
) -> None:
    assert run(capacity(EngineTransport(6, admission=True), after=1.0)) <= 9


async def most_in_flight() -> int:
    transport, most = EngineTransport(30), 0
    async with Load(transport, Fixed(10)):
        for _ in range(1000):
            most = max(most, transport.engine.unfinished)
            await asyncio.sleep(0.01)
    return most


def test_the_server_never_has_more_requests_than_the_limit_says(
    run: Callable[[Coroutine[Any, Any, int]], int],
) -> None:
    assert run(most_in_flight()) == 10
