"""The guide, section by section, with its own calls, on a real vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.live.conftest import KEY
from tests.support.clients import KINDS, Kind, make_client
from vllm_unified import (
    AsyncVllmUnified,
    AuthenticationError,
    ConfigurationError,
    ModelNotFoundError,
    VllmError,
)

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]

DRAGONS = "Tell me a short story about dragons"


@pytest.fixture(params=KINDS)
async def vllm(request: pytest.FixtureRequest, url: str) -> AsyncIterator[AsyncVllmUnified]:
    kind: Kind = request.param
    async with make_client(kind, metadata={"timeout": 120_000}) as client:
        yield client


async def test_initialization(url: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_URL", url)
    async with AsyncVllmUnified() as vllm:
        assert (await vllm.generate("Hello", max_tokens=1)).text
    monkeypatch.delenv("VLLM_API_URL")
    settings = {"vllm_api_url": url, "vllm_model": model, "timeout": 60000}
    async with AsyncVllmUnified({}, settings) as vllm:
        assert vllm.settings.timeout == 60.0
        assert (await vllm.generate("Hello", max_tokens=1)).model == model


async def test_text_generation(vllm: AsyncVllmUnified, url: str, model: str) -> None:
    result = await vllm.make_request(url, DRAGONS, model)
    assert result.text
    assert result.usage.completion_tokens <= 16  # vLLM's default

    with_params = await vllm.make_request(
        url,
        {
            "prompt": DRAGONS,
            "max_tokens": 200,
            "min_tokens": 30,
            "temperature": 0.7,
            "top_p": 0.95,
        },
        model,
    )
    assert 30 <= with_params.usage.completion_tokens <= 200
    assert with_params.finish_reason in ("stop", "length")
    assert with_params.metadata.endpoint == url


async def test_chat_completion(vllm: AsyncVllmUnified, url: str, model: str) -> None:
    chat_result = await vllm.chat(
        [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        {"model": model, "temperature": 0, "max_tokens": 40, "endpoint_url": url},
    )
    assert "Paris" in chat_result.content


async def test_streaming_generation(vllm: AsyncVllmUnified, url: str, model: str) -> None:
    stream = vllm.stream_generation(
        url,
        "Tell me a story about dragons",
        model,
        {"temperature": 0.7, "max_tokens": 24, "ignore_eos": True},
    )
    texts = [chunk.text async for chunk in stream]
    assert len(texts) > 8
    assert "".join(texts) == stream.text == stream.result.text
    assert stream.ending == "complete"
    assert stream.usage is not None
    assert stream.usage.completion_tokens == 24


async def test_batch_processing(vllm: AsyncVllmUnified, url: str, model: str) -> None:
    prompts = [
        "What is the capital of France?",
        "What is the capital of Italy?",
        "What is the capital of Germany?",
    ]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    results = await vllm.process_batch(url, chats, model, {"temperature": 0, "max_tokens": 30})
    for city, answer in zip(("Paris", "Rome", "Berlin"), results, strict=True):
        assert city in answer
    plain = await vllm.process_batch(url, prompts, model, {"temperature": 0.1})
    assert len(plain) == 3
    assert all(isinstance(text, str) for text in plain)


async def test_batch_with_metrics_and_errors(vllm: AsyncVllmUnified, url: str, model: str) -> None:
    prompts: list[Any] = [
        "Paris is the capital of",
        {"prompt": "Rome is", "max_tokens": 2},
        {"prompt": "nobody", "model": "non-existent-model"},
        "long " * 3000,
    ]
    params = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    done = await vllm.process_batch_with_metrics(url, prompts, model, params, on_error="return")
    assert [type(text).__name__ for text in done.texts] == [
        "str",
        "str",
        "ModelNotFoundError",
        "ContextLengthError",
    ]
    assert (done.metrics.succeeded, done.metrics.failed) == (2, 2)
    assert done.metrics.completion_tokens == 6


async def test_batch_packed(vllm: AsyncVllmUnified, url: str, model: str) -> None:
    prompts = [f"{number} and {number} is" for number in range(12)]
    params = {"model": model, "temperature": 0, "max_tokens": 3, "ignore_eos": True}
    prompts[5] = "long " * 3000
    async with vllm.stream_batch(
        prompts, params, endpoint_url=url, ordered=True, pack=4
    ) as answers:
        found = [answer async for answer in answers]
        metrics = answers.metrics
    assert [answer.index for answer in found if answer.error is not None] == [5]
    assert metrics.packed >= 8
    for answer in found:
        if answer.result is not None:
            assert answer.result.usage.completion_tokens == 3
            assert answer.result.usage.prompt_tokens > 0


async def test_custom_endpoint_handlers(vllm: AsyncVllmUnified, url: str, model: str) -> None:
    handler = vllm.create_vllm_endpoint_handler(url, model)
    result = await handler({"prompt": "Hello, world!"})
    assert result.model == model

    param_handler = vllm.create_vllm_endpoint_handler_with_params(
        url, model, {"temperature": 0.7, "top_p": 0.95, "max_tokens": 3, "ignore_eos": True}
    )
    applied = await param_handler({"prompt": "Hello, world!"})
    assert applied.usage.completion_tokens == 3
    own = await param_handler({"prompt": "Hello, world!", "max_tokens": 2})
    assert own.usage.completion_tokens == 2


async def test_endpoint_multiplexing(vllm: AsyncVllmUnified, url: str, model: str) -> None:
    endpoint1 = vllm.create_endpoint(
        {"url": url, "api_key": KEY, "max_concurrent_requests": 5, "max_retries": 3}
    )
    endpoint2 = vllm.create_endpoint(
        {"url": url, "apiKey": "key2", "maxConcurrentRequests": 10, "maxRetries": 5}
    )

    result1 = await vllm.make_request_with_endpoint(endpoint1, "Hello, world!", model)
    assert result1.model == model
    with pytest.raises(AuthenticationError):  # each has a key of its own
        await vllm.make_request_with_endpoint(endpoint2, "How are you?", model)

    stats1, stats2 = vllm.get_stats(endpoint1), vllm.get_stats(endpoint2)
    assert (stats1.requests, stats1.success, stats1.errors) == (1, 1, 0)
    assert (stats2.requests, stats2.success, stats2.errors) == (1, 0, 1)
    assert stats1.completion_tokens == result1.usage.completion_tokens
    assert stats2.errors_by_class == {"AuthenticationError": 1}


async def test_endpoint_multiplexing_at_its_limit(
    vllm: AsyncVllmUnified, url: str, model: str
) -> None:
    endpoint = vllm.create_endpoint({"url": url, "max_concurrent_requests": 2})
    prompts = ["Hello, world!"] * 6

    await asyncio.gather(
        *(vllm.make_request_with_endpoint(endpoint, prompt, model) for prompt in prompts)
    )

    stats = vllm.get_stats(endpoint)
    assert (stats.requests, stats.success, stats.in_flight) == (6, 6, 0)
    assert stats.queue_wait is not None
    assert stats.queue_wait.max > 0
    chat = await vllm.chat_with_endpoint(
        endpoint, "What is the capital of France?", temperature=0, max_tokens=30
    )
    assert "Paris" in chat.content
    assert await vllm.test_endpoint(endpoint)
    vllm.reset_stats(endpoint)
    assert vllm.get_stats(endpoint).requests == 0
    assert await vllm.remove_endpoint(endpoint)


async def test_a_fleet(vllm: AsyncVllmUnified, url: str, model: str) -> None:
    members = {"one": {"url": url}, "other": {"url": url}}
    fleet = vllm.create_load_balancer(members, {"strategy": "round_robin", "health_check": True})

    for _ in range(4):
        await vllm.make_request_with_load_balancer(fleet, "Hello, world!", model)
    stream = fleet.stream("Hello, world!", model=model, max_tokens=8, ignore_eos=True)
    assert (await stream.collect()).usage.completion_tokens == 8

    requests = [vllm.get_stats(name).requests for name in members]
    assert sum(requests) == 5
    assert min(requests) == 2
    await fleet.close()


async def test_model_information(vllm: AsyncVllmUnified, url: str, model: str) -> None:
    model_info = await vllm.get_model_info(url, model, timeout=60)
    assert model_info.max_model_len == 2048
    assert model_info.dtype == "bfloat16"
    assert model_info.quantization is None
    assert model_info.gpu_memory_utilization is not None
    assert f"{model_info.gpu_memory_utilization * 100:g}%" == "92%"  # vLLM's default


async def test_model_statistics(vllm: AsyncVllmUnified, url: str, model: str) -> None:
    await vllm.make_request(url, "Hello", model, max_tokens=4)
    stats = await vllm.get_model_statistics(url, model)
    assert stats.statistics.requests_processed >= 1
    assert stats.statistics.avg_generation_time is not None
    assert 0 < stats.statistics.avg_generation_time < 120
    assert stats.statistics.throughput is not None
    assert stats.statistics.throughput > 0


async def test_error_handling(vllm: AsyncVllmUnified, url: str) -> None:
    with pytest.raises(ModelNotFoundError, match="non-existent-model") as caught:
        await vllm.make_request(url, "Tell me a story", "non-existent-model")
    error: VllmError = caught.value
    assert error.status_code == 404
    assert error.retry_after is None
    assert not error.is_transient_error
    assert "list_models" in str(error)


async def test_environment_variables(url: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_URL", url)
    monkeypatch.setenv("VLLM_MODEL", model)
    monkeypatch.setenv("VLLM_TIMEOUT", "45000")
    async with AsyncVllmUnified() as vllm:
        assert vllm.settings.timeout == 45.0
        assert (await vllm.generate("Hello", max_tokens=1)).model == model


async def test_metadata_in_both_spellings(url: str, model: str) -> None:
    metadata: dict[str, Any] = {
        "vllm_api_url": url,
        "vllmModel": model,
        "timeout": 60000,
        "maxRetries": 3,
        "max_concurrent_requests": 10,
        "queueSize": 100,
    }
    async with AsyncVllmUnified({}, metadata) as vllm:
        settings = vllm.settings
        assert (settings.max_retries, settings.max_concurrent_requests) == (3, 10)
        assert settings.queue_size == 100
        assert (await vllm.generate("Hello", max_tokens=1)).text
    with pytest.raises(ConfigurationError, match="vllmModel"):
        AsyncVllmUnified({}, {"vllm_model": "one", "vllmModel": "another"})


async def test_priority_call_over_metadata_over_environment_over_default(
    url: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answering(metadata: dict[str, Any] | None, **call: Any) -> str:
        async with AsyncVllmUnified({}, metadata) as vllm:
            result = await vllm.make_request(url, "Hello", max_tokens=1, **call)
        return result.model

    assert await answering(None) == model  # default: the server's own choice
    monkeypatch.setenv("VLLM_MODEL", "from-environment")
    with pytest.raises(ModelNotFoundError, match="from-environment"):
        await answering(None)
    with pytest.raises(ModelNotFoundError, match="from-metadata"):
        await answering({"vllm_model": "from-metadata"})
    assert await answering({"vllm_model": "from-metadata"}, model=model) == model
