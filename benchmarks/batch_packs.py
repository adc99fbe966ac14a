"""Whether packs pay on a real vLLM of this machine: short prompts, one token each.

    python benchmarks/batch_packs.py [--prompts 200] [--rounds 6]

One prompt to a request, eight, and what the batch finds by itself take turns, each as often first
as last, with prompts of their own beginning, so that no cache of prefixes helps. Prompts per
second. It takes an engine (``vllm-unified engine install``).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

from vllm_unified import AsyncVllmUnified
from vllm_unified.servers import LocalServer, ServerSpec

WAYS: dict[str, dict[str, Any]] = {"pack=1": {"pack": 1}, "pack=8": {"pack": 8}, "automatic": {}}
FIRST = 1000
PARAMS = {"max_tokens": 1, "temperature": 0}


async def measure(prompts: int, rounds: int) -> dict[str, list[float]]:
    """Prompts per second of every way, round by round."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    async with (
        await LocalServer.start(ServerSpec()) as server,
        AsyncVllmUnified(api_url=server.url, model=server.model, timeout=300) as vllm,
    ):
        await vllm.batch(_prompts(FIRST, prompts), **PARAMS)
        for number in range(rounds):
            turn = number % len(WAYS)
            ways = [*WAYS.items()][turn:] + [*WAYS.items()][:turn]
            for place, (way, options) in enumerate(ways):
                texts = _prompts(FIRST + 1 + number * len(WAYS) + place, prompts)
                started = time.perf_counter()
                await vllm.batch(texts, **PARAMS, **options)
                found[way].append(prompts / (time.perf_counter() - started))
                print(f"{number + 1} {way:10} {found[way][-1]:7.1f} prompts/s", flush=True)
    return found


def _prompts(beginning: int, count: int) -> list[str]:
    """Of as many tokens, whatever they begin with: it has digits, which are tokens of their own."""
    return [f"{beginning}, {number}: the capital of France is" for number in range(count)]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    found = asyncio.run(measure(options.prompts, options.rounds))
    print(f"\n{'way':10} {'prompts/s':>10}   lowest and highest")
    for way, rates in found.items():
        print(f"{way:10} {statistics.median(rates):10.1f}   {min(rates):.1f} to {max(rates):.1f}")


if __name__ == "__main__":
    main()
