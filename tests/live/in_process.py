"""What a test has a model do in a process that has torch; it prints JSON.

``PYTHONPATH=src ENGINE_PYTHON -m tests.live.in_process SCENARIO``. The engine's environment has torch
and transformers, as that of ``pip install 'vllm-unified[local]'`` has; the tests' own has not.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from vllm_unified import ContextLengthError, UnsupportedError, VllmError
from vllm_unified.hardware import HardwareAbstractionLayer
from vllm_unified.hardware.transformers import TransformersBackend

CAPITALS = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin"}
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
    async with TransformersBackend() as backend, HardwareAbstractionLayer() as hal:
        for task in ("llm", "chat", "embedding"):
            hal.register_backend(task, backend)
        before = await backend.capabilities()
        chats = await asyncio.gather(
            *(hal.run_inference("chat", asking(country), **GREEDY) for country in CAPITALS)
        )
        alone = await hal.run_inference("chat", asking("Italy"), **GREEDY)
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
            "alone": alone.text,
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


SCENARIOS = {"answers": answers}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(SCENARIOS[sys.argv[1]]())) + "\n")
