"""Clients of this library as backends, at simulated servers."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from tests.hardware.backends import taken_over
from tests.support.waiting import eventually
from vllm_unified import AsyncVllmUnified, NoBackendError, VllmUnified
from vllm_unified.hardware import HardwareAbstractionLayer
from vllm_unified.hardware.blocking import BlockingHardwareAbstractionLayer
from vllm_unified.simulator.background import BackgroundSimulator, Fleet
from vllm_unified.simulator.config import Timing

Make = Callable[[str], tuple[Any, Any]]
"""From an address: what is registered, and what has to be closed."""


def _client(url: str) -> tuple[Any, Any]:
    client = AsyncVllmUnified(api_url=url)
    return client, client


def _balancer(url: str) -> tuple[Any, Any]:
    client = AsyncVllmUnified()
    return client.create_load_balancer([url]), client


def _blocking(url: str) -> tuple[Any, Any]:
    client = VllmUnified(api_url=url)
    return client, client


def _blocking_balancer(url: str) -> tuple[Any, Any]:
    client = VllmUnified()
    return client.create_load_balancer([url]), client


async def close(client: Any) -> None:
    closing = client.close()
    if closing is not None:
        await closing


EVERY = pytest.mark.parametrize(
    "make", [_client, _balancer, _blocking, _blocking_balancer], ids=lambda make: make.__name__
)


@EVERY
async def test_every_kind_answers_every_way(
    make: Make, vllm_simulator: BackgroundSimulator
) -> None:
    backend, client = make(vllm_simulator.url)
    async with HardwareAbstractionLayer() as hal:
        for task in ("llm", "chat"):
            hal.register_backend(task, backend)

        result = await hal.run_inference("llm", {"input": "Hello", "model": "sim", "max_tokens": 4})
        assert result.output.usage.completion_tokens == 4
        assert result.text == result.output.text
        assert [each.backend for each in result.attempts] == ["vllm"]
        assert result.attempts[0].endpoint == vllm_simulator.url
        assert "serves sim; context of 4096 tokens" in str(result.selection)
        chat = await hal.run_inference("chat", "Hello", max_tokens=3)
        assert chat.output.message["role"] == "assistant"

        stream = hal.stream_inference("chat", "Hello", max_tokens=6)
        texts = [text async for text in stream.texts()]
        assert stream.usage is not None
        assert stream.usage.completion_tokens == 6
        assert "".join(texts) == stream.result.text
        batch = await hal.batch_inference("llm", ["a", "b", "c"], max_tokens=2)
        assert len(batch) == 3
        with pytest.raises(NoBackendError, match="with other"):
            await hal.run_inference("llm", {"input": "Hello", "model": "other"})
    await close(client)


def left(server: BackgroundSimulator) -> list[bool]:
    """Of each generation that arrived, whether its client went away."""
    return [each.disconnected for each in server.requests if each.method == "POST"]


@EVERY
async def test_leaving_ends_the_servers_work(make: Make, vllm_fleet: Fleet) -> None:
    server = vllm_fleet.add(timing=Timing(inter_token_latency=0.05))
    backend, client = make(server.url)
    async with HardwareAbstractionLayer() as hal:
        hal.register_backend("llm", backend)
        call = asyncio.create_task(hal.run_inference("llm", "Hello", max_tokens=2000))
        await eventually(lambda: left(server) == [False])
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await eventually(lambda: left(server) == [True])
        async with hal.stream_inference("llm", "Hello", max_tokens=2000) as stream:
            await anext(stream)
            assert left(server) == [True, False]
        await eventually(lambda: left(server) == [True, True])
    await close(client)


async def test_embeddings(vllm_fleet: Fleet) -> None:
    server = vllm_fleet.add(tasks=("embed",))
    async with AsyncVllmUnified(api_url=server.url) as vllm, HardwareAbstractionLayer() as hal:
        hal.register_backend("embedding", vllm)
        result = await hal.run_inference("embedding", {"input": ["a", "b"]})
        assert len(result.output.embeddings) == 2


async def test_a_server_that_dies_and_comes_back(vllm_fleet: Fleet) -> None:
    first, second = vllm_fleet.add(), vllm_fleet.add()
    async with (
        AsyncVllmUnified(api_url=first.url, max_retries=0) as one,
        AsyncVllmUnified(api_url=second.url) as other,
        HardwareAbstractionLayer() as hal,
    ):
        hal.register_backend("llm", one, priority=1, name="first")
        hal.register_backend("llm", other, name="second")
        assert (await hal.run_inference("llm", "Hello")).backend == "first"
        first.kill()
        answered = await asyncio.gather(*(hal.run_inference("llm", f"{n}") for n in range(20)))
        assert {each.backend for each in answered} == {"second"}
        assert hal.list_backends()[0].state == "open"
        first.start()
        await taken_over(hal, "first")


async def test_a_handler(vllm_simulator: BackgroundSimulator) -> None:
    async with (
        AsyncVllmUnified(api_url=vllm_simulator.url) as vllm,
        HardwareAbstractionLayer() as hal,
    ):
        hal.register_backend("llm", vllm.create_vllm_endpoint_handler(None, "sim"))
        assert (await hal.run_inference("llm", "Hello", max_tokens=2)).output.model == "sim"


def test_without_await(vllm_simulator: BackgroundSimulator) -> None:
    with VllmUnified(api_url=vllm_simulator.url) as vllm, BlockingHardwareAbstractionLayer() as hal:
        hal.register_backend("llm", vllm)
        assert hal.run_inference("llm", {"input": "Hello", "model": "sim"}).text
        assert hal.select("llm", "Hello").chosen == "vllm"
        with hal.stream_inference("llm", "Hello", max_tokens=5) as stream:
            assert len(list(stream)) >= 5
        assert stream.result.backend == "vllm"
        assert len(hal.batch_inference("llm", ["a", "b"])) == 2
        assert hal.statistics().success == 4
        hal.unregister_backend(vllm)
        hal.register_backend("llm", lambda request: request["input"])
        assert hal.run_inference("llm", "Hello").text == "Hello"


def names(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_both_layers_have_the_same_methods() -> None:
    one, other = HardwareAbstractionLayer, BlockingHardwareAbstractionLayer
    assert names(one) == names(other)
    for name in names(one) - {"close"}:
        expected = inspect.signature(getattr(one, name)).parameters
        assert expected == inspect.signature(getattr(other, name)).parameters
        assert inspect.getdoc(getattr(one, name)) == inspect.getdoc(getattr(other, name))
        assert not inspect.iscoroutinefunction(getattr(other, name))
