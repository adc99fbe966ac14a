"""One client under all loads, in its own environment and process; the figures as JSON lines.

    python -m benchmarks.peers.load KIND CORE WINDOW PATIENCE PORT...

The first port is the one with long answers. A load is so many tasks, or threads, that ask in turn.
It counts after half a second, and when each of them was answered twice (or ``PATIENCE`` seconds
have passed), for ``WINDOW`` seconds. CPU time is that of the whole process, user and system.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.peers.clients import KINDS, Blocking, Client, Unified

PROMPT = "Tell me a short story about dragons"
LONG_PROMPT = "dragons " * 12_500
CHATS = (1, 32, 256, 2048)
STREAMS = (1, 64, 1024)
LONG_AT_ONCE = 32
BATCH = 100_000
SETTLED = 0.5
"""Seconds in which connections are made, and limits found."""


class Count:
    """What a load has done so far."""

    def __init__(self) -> None:
        self.done = 0
        """Requests, or chunks."""
        self.began = 0
        """Streams whose first chunk has come."""
        self.latencies: list[float] = []


def memory() -> int:
    """Bytes of the process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def figures(count: Count, cpu: float, seconds: float) -> dict[str, float]:
    """The figures of a window."""
    found = {"rate": count.done / seconds}
    if count.done:
        found["cpu"] = cpu / count.done
    if count.latencies:
        measured = sorted(corrected(count.latencies))
        found["p50"] = measured[len(measured) // 2]
        found["p99"] = measured[len(measured) * 99 // 100]
    return found


def corrected(latencies: list[float]) -> Iterator[float]:
    """With the requests that a stall kept from being sent (coordinated omission), as HdrHistogram
    adds them: one for each interval that the slow one took, with what would have been its wait."""
    interval = sorted(latencies)[len(latencies) // 2]
    for latency in latencies:
        while latency > 0:
            yield latency
            latency -= interval
            if latency < interval:
                break


class Window:
    """The part of a load that is measured."""

    def __init__(self, seconds: float, patience: float) -> None:
        self._seconds = seconds
        self._patience = patience

    async def measure(self, count: Count, enough: int) -> dict[str, float]:
        """Wait until the load is steady, and then for the window."""
        await asyncio.sleep(SETTLED)
        deadline = time.perf_counter() + self._patience
        while count.done < enough and time.perf_counter() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        before, cpu, began = count.done, time.process_time(), time.perf_counter()
        count.latencies.clear()
        await asyncio.sleep(self._seconds)
        cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
        count.done -= before
        return figures(count, cpu, seconds)


async def chats(client: Client, at_once: int, prompt: str, window: Window) -> dict[str, float]:
    """So many tasks chat."""
    count = Count()

    async def ask() -> None:
        while True:
            started = time.perf_counter()
            await client.chat(prompt)
            if at_once == 1:
                count.latencies.append(time.perf_counter() - started)
            count.done += 1

    return await under_load([ask() for _ in range(at_once)], window.measure(count, 2 * at_once))


async def streams(client: Client, at_once: int, window: Window) -> dict[str, float]:
    """So many tasks stream; the figures are for chunks."""
    count = Count()

    async def read() -> None:
        while True:
            async for _ in client.stream(PROMPT):
                count.done += 1

    return await under_load([read() for _ in range(at_once)], window.measure(count, 20 * at_once))


async def stream_memory(client: Client, at_once: int) -> dict[str, float]:
    """Bytes for each stream, when all are open and have had their first chunk; what a client keeps
    of the chunks that nobody has read yet counts as well."""
    before = memory()
    count, all_open = Count(), asyncio.Event()

    async def read() -> None:
        begun = False
        async for _ in client.stream(PROMPT):
            if not begun:
                begun = True
                count.began += 1
                await all_open.wait()

    async def look() -> dict[str, float]:
        deadline = time.perf_counter() + 8
        while count.began < at_once and time.perf_counter() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        held = memory() - before
        return {"memory": held / count.began, "open": count.began}

    return await under_load([read() for _ in range(at_once)], look())


async def under_load(load: list[Any], measuring: Any) -> dict[str, float]:
    """What is measured while the load runs; then the load is ended."""
    tasks = [asyncio.create_task(each) for each in load]
    try:
        measured: dict[str, float] = await measuring
        for task in tasks:
            if task.done():
                task.result()  # a client that fails is not fast
        return measured
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def batch(client: Unified, pack: int | None) -> dict[str, float]:
    """A whole batch, each prompt in a request of its own or in packs."""
    cpu, began = time.process_time(), time.perf_counter()
    done = await client.batch(BATCH, pack)
    seconds = time.perf_counter() - began
    return {"rate": done / seconds, "cpu": (time.process_time() - cpu) / done}


def tell(scenario: str, found: dict[str, float]) -> None:
    """One line of the result."""
    print(json.dumps({"scenario": scenario, **found}), flush=True)


async def run(name: str, window: Window, ports: list[int]) -> None:
    """All loads, one after the other, with a client of their own each."""
    kind = KINDS[name]
    long_port, usual = ports[:1], ports[1 : 1 + kind.ports]
    loads: list[tuple[str, list[int], Any]] = [
        (f"chat-{n}", usual, lambda client, n=n: chats(client, n, PROMPT, window)) for n in CHATS
    ]
    loads += [
        (f"stream-{n}", usual, lambda client, n=n: streams(client, n, window)) for n in STREAMS
    ]
    loads += [
        ("long-prompt", usual, lambda client: chats(client, LONG_AT_ONCE, LONG_PROMPT, window)),
        ("long-answer", long_port, lambda client: chats(client, LONG_AT_ONCE, PROMPT, window)),
        # One server gets as many at once as it was found to take, and a fixed one tells nothing.
        ("memory", ports[1:], lambda client: stream_memory(client, STREAMS[-1])),
    ]
    if name in ("unified", "unified-fleet"):
        loads += [
            ("batch", usual, lambda client: batch(client, 1)),
            ("batch-packed", usual, lambda client: batch(client, None)),
        ]
    for scenario, chosen, load in loads:
        client = kind.make(chosen)
        try:
            tell(scenario, await load(client))
        except Exception as error:  # noqa: BLE001 - a client that fails has no figure
            print(f"{name} {scenario}: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            with contextlib.suppress(Exception):
                await client.close()


def run_blocking(threads: int, window: Window, port: int) -> None:
    """The blocking client, in as many threads."""
    client = Blocking(port)
    for scenario, ask in (("chat", blocking_chat), ("stream", blocking_stream)):
        count, over = Count(), threading.Event()
        working = [
            threading.Thread(target=ask, args=(client, count, over, threads == 1), daemon=True)
            for _ in range(threads)
        ]
        for thread in working:
            thread.start()
        enough = 20 * threads
        tell(f"{scenario}-{threads}", asyncio.run(window.measure(count, enough)))
        over.set()
        for thread in working:
            thread.join()
    client.close()


def blocking_chat(client: Blocking, count: Count, over: threading.Event, times: bool) -> None:
    """Chat until it is over."""
    while not over.is_set():
        started = time.perf_counter()
        client.chat(PROMPT)
        if times:
            count.latencies.append(time.perf_counter() - started)
        count.done += 1


def blocking_stream(client: Blocking, count: Count, over: threading.Event, _: bool) -> None:
    """Stream until it is over."""
    while not over.is_set():
        for _ in client.stream(PROMPT):
            count.done += 1


def main() -> None:
    """Run one client."""
    name, core, seconds, patience, *ports = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    window = Window(float(seconds), float(patience))
    numbers = [int(port) for port in ports]
    kind = KINDS[name]
    if kind.threads:
        run_blocking(kind.threads, window, numbers[1])
    elif kind.loop == "uvloop":
        import uvloop

        uvloop.run(run(name, window, numbers))
    else:
        asyncio.run(run(name, window, numbers))


if __name__ == "__main__":
    main()
