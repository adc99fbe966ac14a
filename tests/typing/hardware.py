"""What type checkers see of the hardware layer. Checked by mypy, never run."""

from __future__ import annotations

from typing import assert_type

from vllm_unified import AsyncVllmUnified, BlockingStream, VllmUnified
from vllm_unified.hardware import (
    Backend,
    BlockingHardwareAbstractionLayer,
    Hardware,
    HardwareAbstractionLayer,
    InferenceRequest,
    InferenceResult,
    InferenceStream,
    LocalVllm,
    Plan,
    Selection,
    detect,
    plan,
)
from vllm_unified.hardware.transformers import TransformersBackend
from vllm_unified.results import StreamChunk
from vllm_unified.servers import ServerSpec


class Mine:
    async def infer(self, request: InferenceRequest) -> str:
        return str(request.input)


BACKENDS: list[Backend] = [Mine(), LocalVllm(), TransformersBackend()]


async def layer(hal: HardwareAbstractionLayer, vllm: AsyncVllmUnified) -> None:
    assert_type(hal.register_backend("llm", vllm, priority=1), str)
    result = await hal.run_inference("llm", {"input": "Hello", "model": "m"}, max_tokens=3)
    assert_type(result, InferenceResult)
    assert_type(result.text, str)
    assert_type(await hal.select("llm", "Hello"), Selection)
    stream = hal.stream_inference("chat", "Hello")
    assert_type(stream, InferenceStream)
    async for chunk in stream:
        assert_type(chunk, StreamChunk)
    assert_type(await hal.batch_inference("llm", ["a", "b"]), list[InferenceResult])


def blocking(hal: BlockingHardwareAbstractionLayer, vllm: VllmUnified) -> None:
    hal.register_backend("llm", vllm)
    assert_type(hal.run_inference("llm", "Hello"), InferenceResult)
    assert_type(hal.stream_inference("llm", "Hello"), BlockingStream[InferenceResult])


def machine() -> None:
    assert_type(detect(), Hardware)
    assert_type(plan("bundled"), Plan)
    assert_type(plan("bundled").spec(), ServerSpec)
