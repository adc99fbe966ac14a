"""100,000 prompts from a list in memory, and what a row costs beside a bare loop.

    python benchmarks/batch.py [--prompts 100000] [--profile]

The server answers every request with the same bytes and has a process of its own. The bare loop
sends the same bodies over the same transport, as many at a time, and decodes the answers: no
line, no limit, no retries, no order. Cost is CPU time of this process; memory is its resident set.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import multiprocessing
import os
import pstats
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline import MemoryTransport
from pipeline import bare as without_pipeline

from vllm_unified import AsyncVllmUnified
from vllm_unified.results import ResultMetadata
from vllm_unified.settings import Settings
from vllm_unified.simulator import Fleet
from vllm_unified.wire.http import HttpTransport
from vllm_unified.wire.requests import WireRequest, generation_request
from vllm_unified.wire.responses import generation_decoder

AT_ONCE = 64
ROUNDS = 3
PARAMS = {"model": "sim", "max_tokens": 16, "temperature": 0}
WARM_UP = 2_000
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _serve(pipe: Connection) -> None:
    with Fleet() as fleet:
        pipe.send(fleet.add(fixed_answer=True).url)
        pipe.recv()


@contextlib.contextmanager
def fixed_server() -> Iterator[str]:
    """The address of a server in a process of its own."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,))
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join()


def memory() -> float:
    """Resident set of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / 1e6


def make_prompts(count: int) -> list[str]:
    """Prompts of about 100 characters, all different."""
    return [
        f"Question {number}: what is {number} times 7? " + "Think. " * 10 for number in range(count)
    ]


async def bare(url: str, prompts: list[str]) -> int:
    """The prompts over the bare transport; how many were answered."""
    transport = HttpTransport(Settings())
    waiting = iter(prompts)
    headers = {"Content-Type": "application/json"}
    answered = 0

    async def worker() -> None:
        nonlocal answered
        for prompt in waiting:
            request = generation_request({"prompt": prompt, **PARAMS})
            response = await transport.open(
                "POST", url + request.path, headers=headers, body=request.body
            )
            body = await response.read(2**20)
            response.close()
            generation_decoder(request)(body, ResultMetadata())
            answered += 1

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    await transport.close()
    return answered


async def batch(url: str, prompts: list[str], pack: int | None = 1) -> int:
    """The prompts by the client, their answers taken and dropped; how many were answered."""
    async with (
        AsyncVllmUnified(api_url=url, max_concurrent_requests=AT_ONCE) as vllm,
        vllm.stream_batch(prompts, PARAMS, pack=pack) as answers,
    ):
        return sum([answer.error is None async for answer in answers])


async def measure(run: Callable[[], Awaitable[int]]) -> tuple[float, float]:
    """Microseconds of CPU for each prompt, and prompts per second."""
    cpu, clock = time.process_time(), time.perf_counter()
    answered = await run()
    seconds = time.perf_counter() - clock
    return (time.process_time() - cpu) / answered * 1e6, answered / seconds


async def layers(prompts: list[str]) -> None:
    """CPU of a prompt where the transport answers from memory: the bare loop, a loop over the
    pipeline of a request, and the batch on top of that; medians."""
    settings = {"api_url": "http://gpu:8000", "max_concurrent_requests": AT_ONCE}

    async def loop(send: Callable[[WireRequest], Awaitable[object]]) -> int:
        waiting = iter(prompts)

        async def worker() -> None:
            for prompt in waiting:
                await send(generation_request({"prompt": prompt, **PARAMS}))

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
        return len(prompts)

    transport = MemoryTransport()
    async with AsyncVllmUnified({"transport": transport}, **settings) as vllm:
        fleet = vllm.create_load_balancer(["http://gpu:8000"]).fleet

        async def piped(request: WireRequest) -> object:
            return await fleet.send(request, fleet.settings, generation_decoder(request))

        async def batched() -> int:
            async with vllm.stream_batch(prompts, PARAMS, pack=1) as answers:
                return sum([answer.error is None async for answer in answers])

        ways = {
            "bare loop": lambda: loop(without_pipeline),
            "pipeline": lambda: loop(piped),
            "stream_batch": batched,
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                found[name].append((await measure(way))[0])
    for name, figures in found.items():
        print(f"{name + ', from memory:':28}{statistics.median(figures):6.1f} us of CPU a prompt")


async def compare(url: str, prompts: list[str]) -> None:
    """Both, turn by turn; medians."""
    ways: dict[str, Callable[[list[str]], Awaitable[int]]] = {
        "bare loop": lambda given: bare(url, given),
        "stream_batch, pack=1": lambda given: batch(url, given),
        "stream_batch, pack=4": lambda given: batch(url, given, 4),
        "stream_batch, pack=16": lambda given: batch(url, given, 16),
        "stream_batch": lambda given: batch(url, given, None),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for way in ways.values():
        await way(prompts[:WARM_UP])
    for _ in range(ROUNDS):
        for name, way in ways.items():
            found[name].append(await measure(partial(way, prompts)))
    for name, figures in found.items():
        cpu, rate = (statistics.median(values) for values in zip(*figures, strict=True))
        print(f"{name + ':':22}{rate:8,.0f} prompts/s {cpu:8.1f} us of CPU a prompt")


async def remember(url: str, prompts: list[str]) -> None:
    """Memory while the client answers, and while its texts are kept."""
    before = memory()
    marks = []
    async with (
        AsyncVllmUnified(api_url=url, max_concurrent_requests=AT_ONCE) as vllm,
        vllm.stream_batch(prompts, PARAMS, pack=1) as answers,
    ):
        done = 0
        async for _ in answers:
            done += 1
            if done % max(len(prompts) // 10, 1) == 0:
                marks.append(memory() - before)
    print("stream_batch, MB more after each tenth:", " ".join(f"{mark:.1f}" for mark in marks))
    before = memory()
    async with AsyncVllmUnified(api_url=url, max_concurrent_requests=AT_ONCE) as vllm:
        texts = await vllm.batch(prompts, **PARAMS)
    held = (sys.getsizeof(texts) + sum(map(sys.getsizeof, texts))) / 1e6
    print(f"batch: {memory() - before:.1f} MB more, of which the texts are {held:.1f} MB")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory", action="store_true", help="only the memory")
    chosen = parser.parse_args()
    import uvloop

    prompts = make_prompts(chosen.prompts)
    with fixed_server() as url, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if chosen.profile:
            profiler = cProfile.Profile()
            profiler.runcall(runner.run, batch(url, prompts))
            pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
            return
        runner.run(batch(url, prompts[:WARM_UP]))
        runner.run(remember(url, prompts))
        if not chosen.memory:
            runner.run(layers(prompts))
            runner.run(compare(url, prompts))


if __name__ == "__main__":
    main()
