"""Uses of the surface that have to type-check; never run."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, assert_type

import msgspec
import pydantic

from vllm_unified import (
    AsyncVllmUnified,
    BatchAnswer,
    BatchMetrics,
    BatchResult,
    BlockingStream,
    ChatResult,
    EmbeddingResult,
    EndpointHandler,
    GenerationResult,
    GenerationStream,
    Health,
    ModelCard,
    StreamChunk,
    Tokenization,
    ToolCall,
    Usage,
    VllmError,
    VllmUnified,
)


class Struct(msgspec.Struct):
    x: int


@dataclass
class Data:
    x: int


class Model(pydantic.BaseModel):
    x: int


async def asynchronous(vllm: AsyncVllmUnified) -> None:
    async with AsyncVllmUnified(api_url="http://a", metadata={"timeout": 5000}) as client:
        assert_type(client, AsyncVllmUnified)

    result = await vllm.generate("a", max_tokens=5)
    assert_type(result, GenerationResult)
    assert_type(result.text, str)
    assert_type(result.usage, Usage)
    assert_type(
        await vllm.make_request("http://a", {"prompt": "a"}, "m", {"n": 2}), GenerationResult
    )
    assert_type(await vllm.make_request(None, [1, 2, 3]), GenerationResult)
    assert_type(await vllm.make_request(None, [{"role": "user", "content": "a"}]), GenerationResult)

    assert_type((await vllm.chat("a")).parsed, None)
    assert_type((await vllm.chat("a")).tool_calls, tuple[ToolCall, ...])
    assert_type((await vllm.chat("a", response_model=Struct)).parsed, Struct)
    assert_type((await vllm.chat("a", response_model=Data)).parsed, Data)
    assert_type((await vllm.chat("a", response_model=Model)).parsed, Model)
    assert_type((await vllm.chat("a", response_model=list[int])).parsed, list[int])
    assert_type((await vllm.chat("a", response_model={"type": "object"})).parsed, Any)

    stream = vllm.stream("a")
    assert_type(stream, GenerationStream[GenerationResult])
    async with stream as opened:
        async for chunk in opened:
            assert_type(chunk, StreamChunk)
    assert_type(stream.result, GenerationResult)
    assert_type(await vllm.stream_chat("a").collect(), ChatResult[None])
    assert_type((await vllm.stream_chat("a", response_model=Data).collect()).parsed, Data)
    async for text in vllm.stream_chat("a").texts():
        assert_type(text, str)

    assert_type(await vllm.batch(["a", [1, 2], {"prompt": "a"}]), list[str])
    assert_type(await vllm.batch(["a"], on_error="return"), list[str | VllmError])
    assert_type(await vllm.process_batch(None, iter("ab"), on_error="raise"), list[str])
    done = await vllm.process_batch_with_metrics(None, ["a"], on_error="return")
    assert_type(done, BatchResult[str | VllmError])
    async with vllm.stream_batch(["a"]) as answers:
        async for answer in answers:
            assert_type(answer, BatchAnswer)
    assert_type(answers.metrics, BatchMetrics)
    handler = vllm.create_vllm_endpoint_handler("http://a", "m")
    assert_type(handler, EndpointHandler[Awaitable[GenerationResult]])
    assert_type(await handler("a", max_tokens=5), GenerationResult)

    assert_type(await vllm.list_models(), list[ModelCard])
    assert_type(await vllm.tokenize("a"), Tokenization)
    assert_type(await vllm.detokenize([1]), str)
    assert_type(await vllm.embed(["a"]), EmbeddingResult)
    assert_type(await vllm.health(probe=True), Health)


def blocking(vllm: VllmUnified) -> None:
    with VllmUnified(api_url="http://a") as client:
        assert_type(client, VllmUnified)

    assert_type(vllm.generate("a"), GenerationResult)
    assert_type(vllm.chat("a").parsed, None)
    assert_type(vllm.chat("a", response_model=Struct).parsed, Struct)
    assert_type(vllm.chat("a", response_model={"type": "object"}).parsed, Any)

    stream = vllm.stream("a")
    assert_type(stream, BlockingStream[GenerationResult])
    with stream as opened:
        for chunk in opened:
            assert_type(chunk, StreamChunk)
    for text in vllm.stream_chat("a").texts():
        assert_type(text, str)
    assert_type(vllm.stream_chat("a", response_model=Model).collect().parsed, Model)

    assert_type(vllm.batch(["a"], on_progress=print), list[str])
    assert_type(vllm.process_batch_with_metrics(None, ["a"]).texts, list[str])
    with vllm.stream_batch(["a"]) as answers:
        assert_type(next(answers), BatchAnswer)
    handler = vllm.create_vllm_endpoint_handler_with_params("http://a", "m", {"seed": 1})
    assert_type(handler, EndpointHandler[GenerationResult])
    assert_type(handler("a"), GenerationResult)
    assert_type(vllm.health(), Health)


def errors(error: VllmError) -> None:
    assert_type(error.status_code, int | None)
    assert_type(error.retry_after, float | None)
    assert_type(error.is_transient_error, bool)
    try:
        raise error
    except TimeoutError:
        pass
