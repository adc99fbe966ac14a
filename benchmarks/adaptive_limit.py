"""The adaptive limit beside the best fixed one, against simulated servers over HTTP.

    python benchmarks/adaptive_limit.py [--client] [--admission]

Three servers, with batches of 6, 30 and 150, run in a process of their own, each under a load of
300 callers; a fourth load goes from one capacity to another on the way. Fixed limits are swept
first. A figure is the median of three stretches of 5 s. A full batch makes every token take twice
as long. With ``--admission``, servers refuse what is more than one and a half batches; without,
they queue it. With ``--client``, callers use the client, with its line and its retries; without,
a bare gate. The four loads run side by side, so that all takes under two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from multiprocessing.connection import Connection

import msgspec

from vllm_unified import AsyncVllmUnified, OverloadedError
from vllm_unified.endpoints.adaptive import AdaptiveLimit
from vllm_unified.settings import Settings
from vllm_unified.simulator import Fleet, SimulatorConfig, Timing
from vllm_unified.wire.http import HttpTransport

CEILING = 256
CALLERS = 300
TOKENS = (3, 9)
"""Length of an answer, from and to."""
TOKEN_SECONDS = {6: 0.01, 30: 0.02, 150: 0.08}
"""Seconds between tokens for a batch of one; so that answers come at similar rates, and
neither side of the connection lacks a processor."""
SWEPT = (0.75, 1.0, 1.5, 1.7)
"""Fixed limits, in batches."""
WARM_UP, STRETCH, CONVERGENCE, CONVERGENCE_AFTER_CHANGE = 1.5, 5.0, 25.0, 20.0
"""Seconds."""
PAUSE_AFTER_REFUSAL = 0.05
"""Seconds, doubled by jitter at most."""


class Fixed(AdaptiveLimit):
    """A limit that does not adapt."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, initial=capacity)

    def on_success(self, *, in_flight: int, work: float, now: float) -> None:
        """Nothing to learn."""

    def on_overload(self, *, in_flight: int) -> None:
        """Nothing to learn."""


class Gate:
    """Slots before a server, as many as the limit says."""

    def __init__(self, limit: AdaptiveLimit) -> None:
        self.limit = limit
        self.in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Wait for a slot, and take it."""
        if self.in_flight >= self.limit.capacity:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        else:
            self.in_flight += 1

    def leave(self) -> None:
        """Give the slot back; a greater capacity lets several in."""
        self.in_flight -= 1
        while self._waiting and self.in_flight < self.limit.capacity:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self.in_flight += 1


class Load:
    """Callers that ask one server, again and again."""

    def __init__(self, url: str, limit: AdaptiveLimit) -> None:
        self.url = url
        self.limit = limit
        self.answers = 0
        self.refusals = 0
        self._gate = Gate(limit)
        self._transport = HttpTransport(Settings())
        self._random = random.Random(0)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The callers ask as long as this is open."""
        callers = [asyncio.create_task(self._call()) for _ in range(CALLERS)]
        try:
            yield
        finally:
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            await self._transport.close()

    async def per_second(self) -> float:
        """Answers per second: the median of three stretches."""
        return statistics.median([await self._stretch() for _ in range(3)])

    async def _stretch(self) -> float:
        started, answers = time.monotonic(), self.answers
        await asyncio.sleep(STRETCH)
        return (self.answers - answers) / (time.monotonic() - started)

    async def _call(self) -> None:
        while True:
            await self._gate.enter()
            try:
                status = await self._ask()
            finally:
                self._gate.leave()
            if status != 200:
                await asyncio.sleep(PAUSE_AFTER_REFUSAL * (1 + self._random.random()))

    async def _ask(self) -> int:
        tokens = self._random.randint(*TOKENS)
        fields = {"prompt": "Hello", "max_tokens": tokens, "ignore_eos": True}
        response = await self._transport.open(
            "POST",
            f"{self.url}/v1/completions",
            headers={"Content-Type": "application/json"},
            body=msgspec.json.encode(fields),
        )
        await response.read(2**20)
        self._tell(response.status, tokens)
        return response.status

    def _tell(self, status: int, tokens: int) -> None:
        in_flight = self._gate.in_flight
        if status == 200:
            self.answers += 1
            self.limit.on_success(in_flight=in_flight, work=tokens, now=time.monotonic())
        else:
            self.refusals += 1
            self.limit.on_overload(in_flight=in_flight)


class ClientLoad(Load):
    """The same callers, through the client."""

    def __init__(self, url: str, limit: AdaptiveLimit) -> None:
        super().__init__(url, limit)
        self._vllm = AsyncVllmUnified(timeout=600)
        self._vllm.on("retry", self._note_refusal)
        self._endpoint = self._vllm.create_endpoint(url)
        self._endpoint.limit = limit

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The callers ask as long as this is open."""
        async with self._vllm, super().running():
            yield

    async def _call(self) -> None:
        while True:
            self._endpoint.url = self.url  # as if behind one address
            tokens = self._random.randint(*TOKENS)
            try:
                await self._vllm.make_request(
                    self._endpoint, "Hello", max_tokens=tokens, ignore_eos=True
                )
                self.answers += 1
            except OverloadedError:
                self._note_refusal(None)
                await asyncio.sleep(PAUSE_AFTER_REFUSAL * (1 + self._random.random()))

    def _note_refusal(self, _: object) -> None:
        self.refusals += 1


def config(batch: int, *, admission: bool) -> SimulatorConfig:
    """A server with a batch of that size."""
    return SimulatorConfig(
        max_num_seqs=batch,
        max_num_queued_reqs=batch * 3 // 2 if admission else None,
        timing=Timing(inter_token_latency=TOKEN_SECONDS[batch], load_factor=1.0, jitter=0.1),
    )


def serve(pipe: Connection, admission: bool) -> None:
    """Two servers for every batch size, until the pipe is closed."""
    with Fleet() as fleet:
        for batch in [*TOKEN_SECONDS, *TOKEN_SECONDS]:
            fleet.add(config(batch, admission=admission))
        pipe.send(fleet.urls)
        with contextlib.suppress(EOFError):
            pipe.recv()


async def fixed_rate(kind: type[Load], url: str, capacity: int) -> float:
    """Answers per second of a limit that does not adapt."""
    load = kind(url, Fixed(capacity))
    async with load.running():
        await asyncio.sleep(WARM_UP)
        return await load.per_second()


async def watch(limit: AdaptiveLimit, seen: list[int]) -> None:
    """Note the capacity every second."""
    while True:
        seen.append(limit.capacity)
        await asyncio.sleep(1)


@contextlib.asynccontextmanager
async def watched(limit: AdaptiveLimit) -> AsyncIterator[list[int]]:
    """The capacity, second by second, while this is open."""
    seen: list[int] = []
    watching = asyncio.create_task(watch(limit, seen))
    try:
        yield seen
    finally:
        watching.cancel()


async def compare(kind: type[Load], url: str, batch: int) -> tuple[int, float]:
    """Sweep, adapt, and print both; the best fixed limit and its answers per second."""
    rates = {}
    for share in SWEPT:
        capacity = round(share * batch)
        rates[capacity] = await fixed_rate(kind, url, capacity)
    best = max(rates, key=rates.__getitem__)
    load = kind(url, limit := AdaptiveLimit(CEILING))
    async with load.running(), watched(limit) as seen:
        await asyncio.sleep(CONVERGENCE)
        rate = await load.per_second()
    swept = "  ".join(f"{capacity}: {found:.1f}" for capacity, found in rates.items())
    print(f"batch {batch}: fixed limits, answers/s: {swept}")
    print(
        f"  best fixed {best}: {rates[best]:.1f}/s; adaptive {rate:.1f}/s; "
        f"ratio {rate / rates[best]:.3f}; {load.refusals} refusals"
    )
    print(f"  limit, every second: {' '.join(map(str, seen))}", flush=True)
    return best, rates[best]


async def follow(kind: type[Load], urls: dict[int, str]) -> list[tuple[int, float, int, list[int]]]:
    """One limit through changes of capacity: batch, answers/s, refusals, and the limit."""
    found = []
    load = kind(urls[30], limit := AdaptiveLimit(CEILING))
    async with load.running():
        for batch in (30, 150, 6):
            load.url, refusals = urls[batch], load.refusals
            async with watched(limit) as seen:
                await asyncio.sleep(CONVERGENCE_AFTER_CHANGE)
                rate = await load.per_second()
            found.append((batch, rate, load.refusals - refusals, seen))
    return found


async def measure(kind: type[Load], urls: list[str]) -> None:
    """All loads side by side."""
    batches = list(TOKEN_SECONDS)
    following = asyncio.create_task(follow(kind, dict(zip(batches, urls[3:], strict=True))))
    compared = await asyncio.gather(*map(partial(compare, kind), urls[:3], batches))
    best = dict(zip(batches, (rate for _, rate in compared), strict=True))
    print("one limit, while the server changes:")
    for batch, rate, refusals, seen in await following:
        print(f"  batch {batch}: {rate:.1f}/s, ratio {rate / best[batch]:.3f}, {refusals} refusals")
        print(f"    limit, every second: {' '.join(map(str, seen))}")


def main() -> None:
    """Print a comparison for each capacity, and the way through changes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--admission", action="store_true", help="servers refuse what is too much")
    parser.add_argument("--client", action="store_true", help="measure through the client")
    chosen = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, chosen.admission))
    server.start()
    theirs.close()
    try:
        asyncio.run(measure(ClientLoad if chosen.client else Load, ours.recv()))
    finally:
        ours.close()
        server.join()


if __name__ == "__main__":
    main()
