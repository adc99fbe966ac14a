"""Model information and statistics, as a real vLLM tells them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from tests.support.clients import KINDS, Kind, make_client
from vllm_unified import AsyncVllmUnified, GenerationResult, Latency, ModelStatistics
from vllm_unified.models import facts
from vllm_unified.servers import LocalServer, running_servers

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]


@pytest.fixture(params=KINDS)
async def vllm(request: pytest.FixtureRequest, url: str) -> AsyncIterator[AsyncVllmUnified]:
    kind: Kind = request.param
    async with make_client(kind, metadata={"timeout": 120_000}, api_url=url) as client:
        yield client


async def test_all_sources_of_a_server_agree(
    vllm: AsyncVllmUnified, live_server: LocalServer, model: str
) -> None:
    # It describes its whole machine the first time, which takes seconds.
    found = await vllm.get_model_info(timeout=60)
    assert (found.id, found.served_names, found.parent) == (model, (model,), None)
    assert (found.dtype, found.quantization, found.max_model_len) == ("bfloat16", None, 2048)
    assert (found.device, found.num_gpu, found.tensor_parallel_size) == ("cpu", 0, 1)
    assert (found.version, found.is_multimodal) == ("0.32.0", False)
    assert (found.prefix_caching, found.lora_enabled) == (True, False)
    assert found.kv_cache_tokens is not None
    assert found.kv_cache_tokens > 10_000
    assert found.sources["dtype"] == "/server_info"
    [record] = [each for each in running_servers() if each.url == live_server.url]
    launched = facts.of_spec(record.spec, device="cpu")
    assert launched["dtype"] == "bfloat16"
    assert launched == {name: getattr(found, name) for name in launched}


def total(latency: Latency) -> float:
    """All seconds of a histogram."""
    return 0.0 if latency.mean is None else latency.mean * latency.count


async def settled(
    vllm: AsyncVllmUnified, enough: Callable[[ModelStatistics], bool]
) -> ModelStatistics:
    """The engine counts just after it has answered."""
    deadline = time.monotonic() + 30
    while not enough(found := await vllm.get_model_statistics()):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)
    return found


async def test_the_statistics_are_of_what_was_sent(vllm: AsyncVllmUnified) -> None:
    idle = await settled(vllm, lambda found: found.statistics.running == 0)
    before = idle.statistics
    began = time.monotonic()
    results: list[GenerationResult] = []
    first_tokens: list[float] = []
    for tokens in (5, 9, 12):
        stream = vllm.stream("Once upon a time", max_tokens=tokens, ignore_eos=True)
        result = await stream.collect()
        assert result.metadata.time_to_first_token is not None
        first_tokens.append(result.metadata.time_to_first_token)
        results.append(result)
    done = before.requests_processed + 3
    found = await settled(vllm, lambda found: found.statistics.requests_processed >= done)
    elapsed = time.monotonic() - began
    after = found.statistics

    assert after.requests_processed == done
    assert after.tokens_generated - before.tokens_generated == 5 + 9 + 12
    prompts = sum(result.usage.prompt_tokens for result in results)
    assert after.prompt_tokens - before.prompt_tokens == prompts
    assert after.errors == before.errors
    assert after.inter_token_latency.count - before.inter_token_latency.count == 4 + 8 + 11
    assert (after.running, after.waiting, found.restarted) == (0, 0, False)

    took = total(after.e2e) - total(before.e2e)
    durations = sum(result.metadata.duration for result in results)
    assert durations / 2 < took < durations
    assert 0 < total(after.ttft) - total(before.ttft) < sum(first_tokens)
    assert after.uptime is not None
    assert before.uptime is not None
    assert after.uptime - before.uptime == pytest.approx(elapsed, abs=2)


async def test_a_window_sees_what_runs_in_it(vllm: AsyncVllmUnified, model: str) -> None:
    await settled(vllm, lambda found: found.statistics.running == 0)
    stream = vllm.stream("Once upon a time", max_tokens=1500, ignore_eos=True)
    await stream.__anext__()
    found = await vllm.get_model_statistics(model=model, window=1.0)
    await stream.close()
    busy = found.statistics
    assert found.interval is not None
    assert 1 <= found.interval < 10
    assert (found.model, busy.running, busy.requests_processed) == (model, 1, 0)
    assert busy.throughput == pytest.approx(busy.tokens_generated / found.interval)
    assert abs(busy.inter_token_latency.count - busy.tokens_generated) <= 1
    assert busy.inter_token_latency.p50 is not None
    assert 0 < busy.inter_token_latency.p50 < 1
