"""What the pipeline costs: queue, limit, breaker, retry, statistics and routing among 16 endpoints.

The transport answers at once, from memory, so that nothing else is measured: CPU time of a request
through a fleet, less that of the bare transport with the same decoding.

python benchmarks/pipeline.py [--strategy NAME] [--profile]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import statistics
import time
from collections.abc import Mapping
from typing import Any

from vllm_unified.fleet.directory import Directory
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.fleet.policies import STRATEGIES
from vllm_unified.results import GenerationResult, ResultMetadata
from vllm_unified.settings import Secret, Settings
from vllm_unified.wire.requests import WireRequest, generation_request
from vllm_unified.wire.responses import generation_decoder

ENDPOINTS = 16
AT_ONCE = 64
REQUESTS = 20_000
ROUNDS = 7
ANSWER = (
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,'
    b'"text":"a text of some words","logprobs":null,"finish_reason":"stop","stop_reason":null}],'
    b'"usage":{"prompt_tokens":5,"total_tokens":10,"completion_tokens":5}}'
)


class _Response:
    status = 200
    headers: Mapping[str, str] = {}

    async def packet(self) -> bytes:
        return ANSWER

    async def read(self, limit: int) -> bytes:
        await asyncio.sleep(0)
        return ANSWER

    def close(self) -> None:
        pass


class MemoryTransport:
    """Answers every request at once; as a socket does, in a later turn of the loop."""

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> _Response:
        return _Response()

    async def close(self) -> None:
        pass


SETTINGS = Settings(api_key=Secret("key"), max_concurrent_requests=64)


def make_fleet(strategy: str, endpoints: int) -> Fleet:
    """A fleet of so many endpoints on the transport from memory."""
    directory = Directory(SETTINGS, {}, lambda settings: MemoryTransport())
    urls = [f"http://gpu{number}:8000" for number in range(endpoints)]
    return directory.create_fleet(urls, {"strategy": strategy})


async def bare(transport: MemoryTransport, request: WireRequest) -> GenerationResult:
    """A request without a pipeline."""
    headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
    response = await transport.open(
        request.method, "http://gpu0:8000" + request.path, headers=headers, body=request.body
    )
    body = await response.read(SETTINGS.max_response_bytes)
    response.close()
    return generation_decoder(request)(body, ResultMetadata())


async def cost(send: Any) -> float:
    """Microseconds of CPU time for each request, 64 at a time."""

    async def caller(count: int) -> None:
        for _ in range(count):
            await send()

    started = time.process_time()
    await asyncio.gather(*(caller(REQUESTS // AT_ONCE) for _ in range(AT_ONCE)))
    return (time.process_time() - started) / REQUESTS * 1e6


async def measure(strategy: str, endpoints: int) -> tuple[float, float]:
    """Microseconds of the bare transport, and of the pipeline on top; medians."""
    transport, fleet = MemoryTransport(), make_fleet(strategy, endpoints)
    request = generation_request({"prompt": "Tell me a short story", "model": "m"})
    decode = generation_decoder(request)
    bares, pipelines = [], []
    for _ in range(ROUNDS):
        bares.append(await cost(lambda: bare(transport, request)))
        pipelines.append(await cost(lambda: fleet.send(request, fleet.settings, decode)))
    below = statistics.median(bares)
    return below, statistics.median(pipelines) - below


def main() -> None:
    """Print a line for each strategy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", choices=sorted(STRATEGIES))
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    strategies = [chosen.strategy] if chosen.strategy else sorted(STRATEGIES)
    if chosen.profile:
        profiler = cProfile.Profile()
        profiler.runcall(asyncio.run, measure(strategies[0], ENDPOINTS))
        pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
        return
    below, alone = asyncio.run(measure("least_loaded", 1))
    print(f"bare transport and decoding: {below:.1f} us of CPU")
    print(f"one endpoint:                {alone:+.1f} us")
    for strategy in strategies:
        _, added = asyncio.run(measure(strategy, ENDPOINTS))
        print(f"{ENDPOINTS} endpoints, {strategy + ':':16}{added:+.1f} us")


if __name__ == "__main__":
    main()
