"""A batch over HTTP beside vLLM's own offline engine, on a real vLLM of this machine.

    python benchmarks/batch_efficiency.py --data gsm8k_test.jsonl [--prompts 96] [--rounds 5]

The same work for all: so many problems of GSM8K, 64 tokens each, the end of the text ignored. Five
ways, turn by turn, so that they share whatever else the machine does: ``LLM.generate`` in the
engine's own environment; ``batch`` of this client; openai-python with a semaphore; and a loop over
the bare transport with all prompts in flight, which is what HTTP costs without a client. Each run
has prompts of its own beginning, so that no cache of prefixes helps. Medians, in generated tokens
per second. It takes an engine (``vllm-unified engine install``) and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

from vllm_unified import AsyncVllmUnified
from vllm_unified.results import ResultMetadata
from vllm_unified.servers import LocalServer, ServerSpec
from vllm_unified.servers.bundled import ensure_bundled_model
from vllm_unified.servers.engines import Engine, find_engine
from vllm_unified.servers.spec import environment, resolved
from vllm_unified.settings import Settings
from vllm_unified.wire.http import HttpTransport
from vllm_unified.wire.requests import generation_request
from vllm_unified.wire.responses import generation_decoder

PARAMS = {"temperature": 0, "ignore_eos": True}
OFFLINE = """
import json, sys, time
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, tokens = sys.argv[1], int(sys.argv[2])
    llm = LLM(model, dtype="bfloat16", max_model_len=2048, enforce_eager=True)
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    print("ready", file=sys.stderr, flush=True)
    for line in sys.stdin:
        prompts = json.loads(line)
        began = time.perf_counter()
        answers = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        found = sum(len(answer.outputs[0].token_ids) for answer in answers)
        with open(sys.argv[3], "w") as file:
            json.dump([found, seconds], file)
        print("done", file=sys.stderr, flush=True)
"""


class Offline:
    """vLLM's own ``LLM`` in a process of the engine's environment."""

    def __init__(self, engine: Engine, spec: ServerSpec, tokens: int) -> None:
        self._tokens = tokens
        folder = tempfile.mkdtemp()
        self._answer = Path(folder) / "answer.json"
        script = Path(folder) / "offline.py"
        script.write_text(OFFLINE)
        self._process = subprocess.Popen(
            [engine.python, str(script), spec.model, str(tokens), str(self._answer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(spec, engine, os.environ),
        )
        self._wait("ready")

    def _wait(self, word: str) -> None:
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            if line.strip() == word:
                return
        sys.exit("the offline engine ended:\n" + "".join(said[-30:]))

    def run(self, prompts: list[str]) -> float:
        """Tokens per second."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(prompts) + "\n")
        self._process.stdin.flush()
        self._wait("done")
        tokens, seconds = json.loads(self._answer.read_text())
        assert tokens == self._tokens * len(prompts), (tokens, len(prompts))
        return float(tokens / seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


async def ours(url: str, tokens: int, prompts: list[str], pack: int | None = None) -> int:
    """``stream_batch``, as anybody would call it; tokens."""
    params = {**PARAMS, "max_tokens": tokens}
    async with (
        AsyncVllmUnified(api_url=url) as vllm,
        vllm.stream_batch(prompts, params, pack=pack) as answers,
    ):
        async for answer in answers:
            assert answer.error is None, answer.error
        return answers.metrics.completion_tokens


async def openai_python(url: str, model: str, tokens: int, prompts: list[str], at_once: int) -> int:
    """openai-python with a semaphore; tokens."""
    import openai

    gate = asyncio.Semaphore(at_once)
    options: dict[str, Any] = {"max_tokens": tokens, "temperature": 0}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:

        async def answer(prompt: str) -> int:
            async with gate:
                done = await client.completions.create(
                    model=model, prompt=prompt, extra_body={"ignore_eos": True}, **options
                )
            assert done.usage is not None
            return done.usage.completion_tokens

        return sum(await asyncio.gather(*map(answer, prompts)))


async def bare(url: str, tokens: int, prompts: list[str]) -> int:
    """All prompts at once over the bare transport; tokens."""
    transport = HttpTransport(Settings())
    headers = {"Content-Type": "application/json"}

    async def answer(prompt: str) -> int:
        request = generation_request({"prompt": prompt, "max_tokens": tokens, **PARAMS})
        response = await transport.open(
            "POST", url + request.path, headers=headers, body=request.body
        )
        body = await response.read(2**20)
        response.close()
        return generation_decoder(request)(body, ResultMetadata()).usage.completion_tokens

    try:
        return sum(await asyncio.gather(*map(answer, prompts)))
    finally:
        await transport.close()


def timed(way: Callable[[list[str]], Awaitable[int]], prompts: list[str], tokens: int) -> float:
    """Tokens per second."""

    async def run() -> float:
        began = time.perf_counter()
        found = await way(prompts)
        assert found == tokens * len(prompts), (found, len(prompts))
        return found / (time.perf_counter() - began)

    return asyncio.run(run())


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help='JSON lines with a "question"')
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--packs", action="store_true", help="compare sizes of packs instead")
    parser.add_argument("--brief", action="store_true", help="only the first three ways")
    chosen = parser.parse_args()
    lines = chosen.data.read_text().splitlines()[: chosen.prompts]
    questions = [json.loads(line)["question"] for line in lines]
    numbers = iter(range(10**6))

    def fresh() -> list[str]:
        number = next(numbers)
        return [f"{number} Question: {question}\nAnswer:" for question in questions]

    engine = find_engine()
    if engine is None:
        sys.exit("there is no engine: vllm-unified engine install")
    spec = resolved(ServerSpec(), ensure_bundled_model(engine, print))
    server = asyncio.run(LocalServer.start(ServerSpec()))
    found: dict[str, list[float]] = {}

    def note(name: str, rate: float) -> None:
        found.setdefault(name, []).append(rate)
        print(f"{name:36}{rate:7.1f} tokens/s", flush=True)

    tokens = chosen.tokens
    url, name = server.url, server.model
    ways: dict[str, Callable[[list[str]], Awaitable[int]]] = {
        "batch": lambda given: ours(url, tokens, given),
        f"openai-python, {len(questions)} at once": lambda given: openai_python(
            url, name, tokens, given, len(questions)
        ),
        "openai-python, 32 at once": lambda given: openai_python(url, name, tokens, given, 32),
        "bare loop, all at once": lambda given: bare(url, tokens, given),
    }
    if chosen.brief:
        ways = dict(list(ways.items())[:2])
    if chosen.packs:
        ways = {
            f"batch, pack={pack}": lambda given, pack=pack: ours(url, tokens, given, pack)
            for pack in (1, 4, 16, 32)
        }
    try:
        with Offline(engine, spec, tokens) as offline:
            offline.run(fresh()[:8])
            timed(next(iter(ways.values())), fresh()[:8], tokens)
            for _ in range(chosen.rounds):
                note("LLM.generate", offline.run(fresh()))
                for way_name, way in ways.items():
                    note(way_name, timed(way, fresh(), tokens))
    finally:
        asyncio.run(server.stop())
    offline_rate = statistics.median(found["LLM.generate"])
    print()
    for name, rates in found.items():
        middle = statistics.median(rates)
        print(
            f"{name:36}{middle:7.1f} tokens/s ({min(rates):.1f}-{max(rates):.1f}), "
            f"{middle / offline_rate:.3f} of offline"
        )


if __name__ == "__main__":
    main()
