"""What a test has a model do in a process that has torch; it prints JSON.

``PYTHONPATH=src PYTHON -m tests.live.in_process SCENARIO``. An engine's environment has torch
and transformers, as that of ``pip install 'vllm-unified[local]'`` has; the tests' own has not.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from vllm_unified import AsyncVllmUnified, ContextLengthError, UnsupportedError, VllmError
from vllm_unified.hardware import HardwareAbstractionLayer, LocalVllm, plan
from vllm_unified.hardware.transformers import TransformersBackend
from vllm_unified.servers import ServerSpec

CAPITALS = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin"}
GUIDE = {"input": "Hello, world!", "max_tokens": 4, "temperature": 0}
GREEDY = {"temperature": 0, "max_tokens": 30}


def asking(country: str) -> str:
    return f"What is the capital of {country}?"


async def error_of(call: Any) -> str:
    try:
        await call
    except VllmError as error:
        return type(error).__name__
    return "none"


async def answers() -> dict[str, Any]:
    """Chats, completions, streams, batches and cancellation, through the layer."""
    async with TransformersBackend(threads=1) as backend, HardwareAbstractionLayer() as hal:
        for task in ("llm", "chat", "embedding"):
            hal.register_backend(task, backend)
        before = await backend.capabilities()
        chats = await asyncio.gather(
            *(hal.run_inference("chat", asking(country), **GREEDY) for country in CAPITALS)
        )
        plain = await hal.run_inference("llm", {"input": "Once upon a time"}, temperature=0)
        stream = hal.stream_inference("chat", asking("France"), **GREEDY)
        pieces = [text async for text in stream.texts()]
        stopped = await hal.run_inference("chat", asking("France"), stop="Paris", **GREEDY)
        long = {"max_tokens": 64, "min_tokens": 40, "temperature": 0}
        held = await hal.run_inference("chat", asking("France"), **long)
        seeded = [
            (await hal.run_inference("llm", "Once", seed=7, temperature=1.0)).text for _ in range(2)
        ]
        several = await hal.run_inference("llm", {"input": ["One, two,", "A, B,"]}, temperature=0)
        ids = await hal.run_inference("llm", {"input": [1, 2, 3]}, max_tokens=2)

        endless = {"max_tokens": 5000, "ignore_eos": True}
        started = time.monotonic()
        async with hal.stream_inference("llm", "Once", **endless) as left:
            async for _ in left.texts():
                break
        call = asyncio.create_task(hal.run_inference("llm", "Once", **endless))
        await asyncio.sleep(0.5)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        after_leaving = await hal.run_inference("llm", "Once", max_tokens=1)
        return {
            "before": [before.models, before.device, before.unavailable],
            "chats": [chat.text for chat in chats],
            "finish": chats[0].output.finish_reason,
            "plain": [plain.text, plain.output.finish_reason, plain.output.usage.completion_tokens],
            "stream": [stream.text, pieces, stream.result.output.finish_reason],
            "stopped": [stopped.text, stopped.output.choices[0].stop_reason],
            "held": held.output.usage.completion_tokens,
            "seeded": seeded,
            "several": several.output.texts,
            "ids": ids.output.usage.prompt_tokens,
            "left": [left.ending, after_leaving.output.usage.completion_tokens],
            "leaving_seconds": time.monotonic() - started,
            "errors": [
                await error_of(hal.run_inference("llm", "x", logprobs=3)),
                await error_of(hal.run_inference("llm", "x", max_tokens=100_000)),
                await error_of(hal.run_inference("llm", "x", temperature=-1)),
                await error_of(hal.run_inference("embedding", "x")),
                await error_of(TransformersBackend("/no/such/folder").load()),
            ],
            "names": [UnsupportedError.__name__, ContextLengthError.__name__],
        }


async def failover() -> dict[str, Any]:
    """The guide's section with every kind of backend, what a real server says of its memory, and
    100 requests in whose middle the server is killed."""
    folder = str(Path(__file__).parent)
    spec = ServerSpec(
        dev_mode=True,
        env={"PYTHONPATH": folder},
        extra_args=("--worker-extension-cls", "worker_extension.WeightsReport"),
    )
    found: dict[str, Any] = {}
    async with (
        LocalVllm(spec=spec) as local,
        TransformersBackend(threads=1, max_batch_size=16) as backend,
        HardwareAbstractionLayer() as hal,
    ):
        hal.register_backend("llm", local, priority=1)
        hal.register_backend("llm", backend)
        found["first"] = (await hal.run_inference("llm", GUIDE)).backend
        assert local.server is not None
        found["guide"] = await guide(local.server.url, backend)
        found["plan"] = await planned(local.server.url)

        done: Counter[str] = Counter()
        room = asyncio.Semaphore(16)

        async def ask(number: int) -> None:
            async with room:
                result = await hal.run_inference("llm", {**GUIDE, "input": f"{number} + 1 ="})
            assert result.text
            done[result.backend] += 1
            if done.total() == 30 and local.server is not None:
                found["killed_after"] = dict(done)
                os.kill(local.server.pid, signal.SIGKILL)

        await asyncio.gather(*(ask(number) for number in range(100)))
        found["answered"] = dict(done)
        killed = time.monotonic()
        meanwhile = 0
        while (await hal.run_inference("llm", GUIDE)).backend != "local-vllm":
            meanwhile += 1
            assert time.monotonic() < killed + 400, "it did not take over again"
        found["meanwhile"] = meanwhile
        found["back_after_seconds"] = time.monotonic() - killed
        again = await asyncio.gather(*(hal.run_inference("llm", GUIDE) for _ in range(10)))
        found["again"] = sorted({result.backend for result in again})
        figures = hal.statistics()
        found["statistics"] = [figures.success, figures.errors, figures.failovers]
        found["starts"] = local.starts
    return found


async def guide(url: str, local: TransformersBackend) -> dict[str, str]:
    """The guide's call, with each backend alone."""
    async with AsyncVllmUnified(api_url=url) as vllm:
        fleet = vllm.create_load_balancer([url, url])
        texts = {}
        for name, backend in {"client": vllm, "fleet": fleet, "transformers": local}.items():
            async with HardwareAbstractionLayer() as hal:
                hal.register_backend("llm", backend)
                request = {"input": "Hello, world!", "model": "SmolLM2-135M-Instruct"}
                texts[name] = (await hal.run_inference("llm", request)).text
    return texts


async def planned(url: str) -> dict[str, list[int]]:
    """What was planned, and what the server has: tokens of KV cache, bytes of weights."""
    found = plan("bundled", kv_cache_gib=1.0)
    async with AsyncVllmUnified(api_url=url) as vllm:
        info = await vllm.get_model_info(timeout=60)
    asked = await asyncio.to_thread(
        _post, f"{url}/collective_rpc", {"method": "loaded_weight_bytes"}
    )
    return {
        "kv_cache_tokens": [found.kv_cache_tokens, info.kv_cache_tokens or 0],
        "weights_bytes": [found.weights_bytes, *map(int, asked["results"])],
    }


def _post(url: str, body: object) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


SCENARIOS = {"answers": answers, "failover": failover}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(SCENARIOS[sys.argv[1]]())) + "\n")
