"""What the strategies gain on servers with prefix caches: hit rates and first tokens.

    python benchmarks/routing.py [--system] [--strategy NAME ...]

40 conversations of 8 turns go through one client to 8 servers in a process of their own, 12 turns
at a time, in random order. Each turn sends all of its conversation so far. A server computes 10,000
prompt tokens per second, and its KV cache holds an eighth of all conversations at their full
length. With ``--system``, all conversations begin with the same system prompt. A figure is the
median of three runs, each on new servers; the largest share is that of the busiest server, as a
multiple of the mean.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import re
import statistics
import urllib.request
from collections.abc import Iterator
from multiprocessing.connection import Connection

import msgspec

from vllm_unified import AsyncVllmUnified, LoadBalancer
from vllm_unified.simulator import Fleet, SimulatorConfig, Timing
from vllm_unified.simulator.vocabulary import WORDS

SERVERS = 8
CONVERSATIONS, TURNS, AT_ONCE = 40, 8, 12
QUESTION, ANSWER, SYSTEM = 150, 50, 600
"""Tokens, about."""
BLOCK = 16
RUNS = 3
STRATEGIES = (
    "round_robin",
    "least_loaded",
    "power_of_two",
    "latency",
    "prefix_aware",
    "session",
)


class Figures(msgspec.Struct, frozen=True):
    """What one run gave, or the medians of several."""

    hit_rate: float
    """Share of the prompt tokens that were found in a cache."""
    computed: float
    """Prompt tokens that were not."""
    mean: float
    """Of the time to the first token, as the next two; in seconds."""
    p50: float
    p90: float
    largest_share: float


class Conversation:
    """Turns of a user and a model, about nothing."""

    def __init__(self, number: int, system: str) -> None:
        self.name = f"conversation {number}"
        self.turns = 0
        self._random = random.Random(number)
        self._messages = [{"role": "system", "content": system}] if system else []

    async def take_turn(self, balancer: LoadBalancer) -> None:
        """Ask, and read the answer to its end."""
        question = words(self._random, QUESTION)
        self._messages.append({"role": "user", "content": question})
        stream = balancer.stream_chat(
            self._messages, session_id=self.name, max_tokens=ANSWER, ignore_eos=True
        )
        async with stream:
            answer = await stream.collect()
        self._messages.append(answer.message)
        self.turns += 1


def words(source: random.Random, count: int) -> str:
    """So many words; a token each."""
    return " ".join(source.choices(WORDS, k=count))


async def converse(balancer: LoadBalancer, system: str) -> None:
    """All turns of all conversations."""
    order = random.Random(0)
    idle = [Conversation(number, system) for number in range(CONVERSATIONS)]

    async def take_turns() -> None:
        while idle:
            conversation = idle.pop(order.randrange(len(idle)))
            await conversation.take_turn(balancer)
            if conversation.turns < TURNS:
                idle.append(conversation)

    await asyncio.gather(*(take_turns() for _ in range(AT_ONCE)))


def config(system: str) -> SimulatorConfig:
    """A server whose cache holds its share of the conversations."""
    tokens = len(system.split()) + TURNS * (QUESTION + ANSWER + 10)
    return SimulatorConfig(
        block_size=BLOCK,
        num_blocks=CONVERSATIONS // 8 * tokens // BLOCK,
        max_num_seqs=16,
        timing=Timing(
            time_to_first_token=0.005,
            per_prompt_token=0.0001,
            inter_token_latency=0.002,
            load_factor=1.0,
        ),
    )


def serve(pipe: Connection, system: str) -> None:
    """The servers, until the pipe is closed."""
    with Fleet() as fleet:
        for _ in range(SERVERS):
            fleet.add(config(system))
        pipe.send(fleet.urls)
        with contextlib.suppress(EOFError):
            pipe.recv()


@contextlib.contextmanager
def servers(system: str) -> Iterator[list[str]]:
    """Addresses of new servers in a process of their own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, system))
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.join()


def prefix_cache(urls: list[str]) -> tuple[float, float]:
    """Prompt tokens that were looked up in the caches of these servers, and those found."""
    queries = hits = 0.0
    for url in urls:
        with urllib.request.urlopen(f"{url}/metrics") as response:
            exposition = response.read().decode()
            queries += counter(exposition, "vllm:prefix_cache_queries_total")
            hits += counter(exposition, "vllm:prefix_cache_hits_total")
    return queries, hits


def counter(exposition: str, name: str) -> float:
    """The sum over the series of a counter."""
    return sum(map(float, re.findall(rf"^{name}(?:\{{.*\}})? (\S+)", exposition, re.MULTILINE)))


async def run(urls: list[str], strategy: str, system: str) -> Figures:
    """All conversations through one client."""
    async with AsyncVllmUnified(timeout=120) as vllm:
        balancer = vllm.create_load_balancer(urls, strategy=strategy)
        await converse(balancer, system)
        found = vllm.get_stats()
        requests = [found.endpoints[endpoint.id].requests for endpoint in balancer.endpoints]
    queries, hits = prefix_cache(urls)
    first_token = found.overall.time_to_first_token
    assert first_token is not None
    return Figures(
        hit_rate=hits / queries,
        computed=queries - hits,
        mean=first_token.mean,
        p50=first_token.p50,
        p90=first_token.p90,
        largest_share=max(requests) / statistics.mean(requests),
    )


def measure(strategy: str, system: str) -> Figures:
    """Medians of several runs."""
    runs = []
    for _ in range(RUNS):
        with servers(system) as urls:
            runs.append(asyncio.run(run(urls, strategy, system)))
    return Figures(*map(statistics.median, zip(*map(msgspec.structs.astuple, runs), strict=True)))


def main() -> None:
    """Print a line for each strategy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--system", action="store_true", help="all share a system prompt")
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    chosen = parser.parse_args()
    system = words(random.Random(-1), SYSTEM) if chosen.system else ""
    print("strategy      hit rate  computed  first token: mean    p50    p90  largest share")
    for strategy in chosen.strategy:
        found = measure(strategy, system)
        print(
            f"{strategy:13} {found.hit_rate:7.0%} {found.computed:10,.0f}"
            f" {found.mean * 1e3:14.0f} ms {found.p50 * 1e3:3.0f} ms {found.p90 * 1e3:3.0f} ms"
            f" {found.largest_share:14.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
