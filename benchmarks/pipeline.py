"""What queue, limit, breaker, retry, statistics and routing cost, and what that grows with.

The transport answers at once, from memory, so that nothing else is measured: CPU time of a request
through a fleet, less that of the bare transport with the same decoding. Rounds are interleaved, and
a figure is the least of them: what others do on the machine only ever adds.

python benchmarks/pipeline.py [endpoints] [at-once] [full] [queue] [streams]
    [--strategy NAME ...] [--profile]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial

from vllm_unified.fleet.directory import Directory
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.fleet.policies import STRATEGIES
from vllm_unified.fleet.stream import GenerationStream
from vllm_unified.results import GenerationResult, ResultMetadata
from vllm_unified.settings import Secret, Settings
from vllm_unified.wire.requests import WireRequest, generation_request
from vllm_unified.wire.responses import generation_decoder

ENDPOINTS = (1, 16, 256)
AT_ONCE = (32, 256, 2048)
QUEUED = (10, 1000, 10_000, 100_000)
STREAMS = (1, 64, 1024, 4096)
USUAL_AT_ONCE = 64
REQUESTS = 20_000
ROUNDS = 5
ANSWER = (
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,'
    b'"text":"a text of some words","logprobs":null,"finish_reason":"stop","stop_reason":null}],'
    b'"usage":{"prompt_tokens":5,"total_tokens":10,"completion_tokens":5}}'
)
SETTINGS = Settings(api_key=Secret("key"), max_concurrent_requests=64, queue_size=200_000)
REQUEST = generation_request(
    {"prompt": "Tell me a short story " * 40, "model": "m", "session_id": "mine"}
)
DECODE = generation_decoder(REQUEST)

Send = Callable[[], Awaitable[object]]


class _Response:
    status = 200
    headers: Mapping[str, str] = {"content-type": "text/event-stream"}

    async def packet(self) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def read(self, limit: int) -> bytes:
        await asyncio.sleep(0)
        return ANSWER

    def close(self) -> None:
        pass


class MemoryTransport:
    """Answers every request at once; as a socket does, in a later turn of the loop. A stream has
    begun at once, and says nothing."""

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> _Response:
        return _Response()

    async def close(self) -> None:
        pass


def make_fleet(strategy: str, endpoints: int) -> Fleet:
    """A fleet of so many endpoints on the transport from memory."""
    directory = Directory(SETTINGS, {}, lambda settings: MemoryTransport())
    urls = [f"http://gpu{number}:8000" for number in range(endpoints)]
    return directory.create_fleet(urls, {"strategy": strategy})


def sender(fleet: Fleet) -> Send:
    """Sends the request through the fleet."""
    return partial(fleet.send, REQUEST, fleet.settings, DECODE)


async def bare(request: WireRequest = REQUEST) -> GenerationResult:
    """A request without a pipeline."""
    headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
    response = await MemoryTransport().open(
        request.method, "http://gpu0:8000" + request.path, headers=headers, body=request.body
    )
    body = await response.read(SETTINGS.max_response_bytes)
    response.close()
    return DECODE(body, ResultMetadata())


async def cost(send: Send, at_once: int) -> float:
    """Microseconds of CPU time for each request, of so many callers; they begin before the clock
    does."""
    requests, done = max(REQUESTS, at_once), 0
    began, ended = [0.0], asyncio.Event()

    async def caller() -> None:
        nonlocal done
        while done < at_once + requests:
            await send()
            done += 1
            if done == at_once:
                began[0] = time.process_time()
            elif done == at_once + requests:
                began.append(time.process_time())
                ended.set()

    callers = [asyncio.create_task(caller()) for _ in range(at_once)]
    await ended.wait()
    await asyncio.gather(*callers)
    return (began[1] - began[0]) / requests * 1e6


async def least(loads: dict[str, tuple[Send, int]]) -> dict[str, float]:
    """Microseconds of each load beyond the bare transport's."""
    rounds: dict[str, list[float]] = {name: [] for name in ("", *loads)}
    for _ in range(ROUNDS):
        rounds[""].append(await cost(bare, USUAL_AT_ONCE))
        for name, (send, at_once) in loads.items():
            rounds[name].append(await cost(send, at_once))
    below = min(rounds.pop(""))
    return {name: min(costs) - below for name, costs in rounds.items()}


async def by_endpoints(strategies: list[str]) -> None:
    """A table of strategies and numbers of endpoints."""
    print(f"\nCPU us a request beyond the bare transport, {USUAL_AT_ONCE} at once, by endpoints")
    for name in strategies:
        loads = {
            str(count): (sender(make_fleet(name, count)), USUAL_AT_ONCE) for count in ENDPOINTS
        }
        print(row(name, await least(loads)), flush=True)


async def by_at_once(strategies: list[str]) -> None:
    """A table of strategies and requests in flight over 16 endpoints, of 1,024 slots."""
    print("\nThe same at 16 endpoints (1,024 slots), by requests at once")
    for name in strategies:
        loads = {str(count): (sender(make_fleet(name, 16)), count) for count in AT_ONCE}
        print(row(name, await least(loads)), flush=True)


async def by_full_endpoints(strategies: list[str]) -> None:
    """A table of strategies and numbers of endpoints that are all full, so that who gives a slot
    back gives it to who waits."""
    print("\nThe same with all slots taken, and 1,000 requests in line, by endpoints")
    for name in strategies:
        loads = {
            str(count): (sender(make_fleet(name, count)), 64 * count + 1000) for count in ENDPOINTS
        }
        print(row(name, await least(loads)), flush=True)


async def by_queued(strategies: list[str]) -> None:
    """A table of numbers of waiting requests, before 1 endpoint and before 16."""
    print("\nThe same with one endpoint (64 slots), and so many requests in line")
    for count in QUEUED:
        loads = {
            f"{count:,}": (sender(make_fleet("least_loaded", 1)), 64 + count),
            "at 16 endpoints": (sender(make_fleet("least_loaded", 16)), 16 * 64 + count),
        }
        print(row("least_loaded", await least(loads)), flush=True)


async def by_streams(strategies: list[str]) -> None:
    """A table of numbers of streams that are open, over 256 endpoints."""
    print("\nThe same at 256 endpoints, with so many open streams beside it")
    for count in STREAMS:
        fleet = make_fleet(strategies[0], 256)
        async with open_streams(fleet, count):
            loads = {f"{count:,}": (sender(fleet), USUAL_AT_ONCE)}
            print(row(strategies[0], await least(loads)), flush=True)


@asynccontextmanager
async def open_streams(fleet: Fleet, count: int) -> AsyncIterator[None]:
    """So many streams that have begun, and wait for their first chunk."""
    request = generation_request({"prompt": "Tell me", "model": "m"}, stream=True)

    async def read() -> None:
        async with GenerationStream(fleet, request, fleet.settings) as stream:
            async for _ in stream:
                pass

    tasks = [asyncio.create_task(read()) for _ in range(count)]
    while sum(each.in_flight for each in fleet.endpoints) < count:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def row(name: str, found: dict[str, float]) -> str:
    """A line of a table."""
    return f"{name:14}" + "".join(f"  {key}: {value:5.1f}" for key, value in found.items())


TABLES = {
    "endpoints": by_endpoints,
    "at-once": by_at_once,
    "full": by_full_endpoints,
    "queue": by_queued,
    "streams": by_streams,
}


async def profiled(strategy: str) -> None:
    """What :func:`main` profiles."""
    await cost(sender(make_fleet(strategy, 256)), USUAL_AT_ONCE)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], default=[])
    parser.add_argument("--strategy", nargs="+", choices=sorted(STRATEGIES))
    parser.add_argument("--profile", action="store_true", help="of one strategy, at 256 endpoints")
    chosen = parser.parse_args()
    strategies = chosen.strategy or list(STRATEGIES)
    if chosen.profile:
        profiler = cProfile.Profile()
        profiler.runcall(asyncio.run, profiled(strategies[0]))
        pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
        return
    for table in chosen.tables or TABLES:
        asyncio.run(TABLES[table](strategies))


if __name__ == "__main__":
    main()
