"""Quantization of a real vLLM, changed under load; what a fake engine cannot show."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.vllm import OWN_SERVERS
from vllm_unified import (
    AsyncVllmUnified,
    QuantizationError,
    QuantizationResult,
    VllmError,
    VllmUnified,
)
from vllm_unified.models.quantization import quantization_config
from vllm_unified.servers import LocalServer, ServerSpec, running_servers
from vllm_unified.servers.rollouts.facts import gather_facts
from vllm_unified.servers.rollouts.preflight import check
from vllm_unified.servers.rollouts.quantizing import make_checkpoint
from vllm_unified.servers.rollouts.successor import successor

pytestmark = [
    pytest.mark.live,
    OWN_SERVERS,
    # Making the 4-bit checkpoint takes minutes where it is not cached.
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="servers run on Linux only"),
]

SPEC = ServerSpec(
    served_model_name="quantization-test",
    api_key="sk-quantization",
    dev_mode=True,
    max_model_len=1024,
    kv_cache_gib=0.5,
)
PROGRAM = """
import sys
from vllm_unified import VllmUnified

def tell(told):
    print(told.step, flush=True)

with VllmUnified(api_url=sys.argv[1], api_key="sk-quantization") as vllm:
    vllm.set_quantization(enabled=True, method="w8a8", progress=tell)
"""


@pytest.fixture(scope="module", autouse=True)
def _checkpoints() -> None:
    """They are made, where they are missing, before a server shares the processors."""
    for method in ("w8a8", "awq"):
        make_checkpoint("bundled", quantization_config({"enabled": True, "method": method}, {}))


class Load:
    """Small requests, one after the other, to an address that stays the same."""

    def __init__(self, client: AsyncVllmUnified, url: str) -> None:
        self.client = client
        self.url = url
        self.answered = 0
        self.failed: list[VllmError] = []

    async def run(self) -> None:
        while True:
            try:
                await self.client.make_request(
                    self.url, "The capital of France is", max_tokens=4, temperature=0, max_retries=0
                )
                self.answered += 1
            except VllmError as error:
                self.failed.append(error)
            # Two processors are shared with a server that starts: one that is always busy lets it
            # have so little that it takes minutes.
            await asyncio.sleep(0.5)


@asynccontextmanager
async def load(client: AsyncVllmUnified, url: str) -> AsyncIterator[Load]:
    """Load as long as the block runs."""
    made = Load(client, url)
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def server_info(url: str) -> dict[str, Any]:
    """What the engine itself says that it runs."""
    headers = {"Authorization": f"Bearer {SPEC.api_key}"}
    request = urllib.request.Request(f"{url}/server_info?config_format=json", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)["vllm_config"]["model_config"]
    return found


def ours() -> list[str]:
    """Addresses of this test's servers."""
    return [each.url for each in running_servers() if each.model == SPEC.served_model_name]


def show(result: QuantizationResult) -> None:
    before, after = result.before, result.after
    steps = ", ".join(f"{step.name} {step.seconds:.0f} s" for step in result.steps)
    print(
        f"\n{result.quantization['method']}: "
        f"{before.weights_bytes} -> {after.weights_bytes} bytes, "
        f"{before.tokens_per_second:.1f} -> {after.tokens_per_second:.1f} tokens/s, perplexity "
        f"{before.perplexity:.2f} -> {after.perplexity:.2f}, agreement {result.agreement:.2f}; "
        f"{result.duration:.0f} s: {steps}"
    )


async def end_all() -> None:
    for url in ours():
        with suppress(VllmError):
            await (await LocalServer.attach(url)).end()


async def capital(client: AsyncVllmUnified, url: str) -> str:
    question = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    answer = await client.make_request(url, {**question, "max_tokens": 16, "temperature": 0})
    return answer.text


async def test_quantization_changes_under_load_and_no_request_fails() -> None:
    server = await LocalServer.start(SPEC, detached=True)
    await server.stop()
    url = server.url
    try:
        async with (
            AsyncVllmUnified(api_url=url, api_key=SPEC.api_key, timeout=600) as client,
            load(client, url) as traffic,
        ):
            await nothing_happens(client, url)
            awq = await to_awq(client, url)
            await a_program_is_killed(awq)
            await to_w8a8(client, url, awq)
            await to_the_plain_model(client, url)
            assert traffic.failed == []
            assert traffic.answered > 20
            print(f"{traffic.answered} requests, none failed")
    finally:
        await end_all()
    assert ours() == []


async def nothing_happens(client: AsyncVllmUnified, url: str) -> None:
    with pytest.raises(QuantizationError, match="there is no checkpoint /nowhere"):
        await client.set_quantization(url, enabled=True, method="awq", checkpoint="/nowhere")
    with pytest.raises(QuantizationError) as caught:
        await client.set_quantization(url, enabled=True, method="fp8")
    assert caught.value.step == "start"
    assert "serves as before" in str(caught.value)
    print(f"\nfp8: {caught.value.message}")
    assert ours() == [url]
    assert (await asyncio.to_thread(server_info, url))["quantization"] is None


async def to_awq(client: AsyncVllmUnified, url: str) -> QuantizationResult:
    result = await client.set_quantization(
        url, SPEC.served_model_name, {"enabled": True, "method": "awq", "bits": 4}
    )
    show(result)
    info = await asyncio.to_thread(server_info, result.url)
    assert info["quantization"] == "compressed-tensors"
    assert info["model"] == result.quantization["checkpoint"]
    assert result.after.weights_bytes is not None
    assert result.before.weights_bytes is not None
    assert result.after.weights_bytes < result.before.weights_bytes / 2
    assert result.agreement is not None
    assert result.agreement > 0.6
    assert "Paris" in await capital(client, url)
    assert not (await client.set_quantization(url, enabled=True, method="awq")).changed
    assert ours() == [result.url]
    return result


async def a_program_is_killed(before: QuantizationResult) -> None:
    """In the middle of a change: the new server dies with it, and the old one lives."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, before.url, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        while await process.stdout.readline() != b"start\n":
            assert process.returncode is None
        async with asyncio.timeout(120):
            while len(ours()) < 2:  # noqa: ASYNC110 - another process brings it about
                await asyncio.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    async with asyncio.timeout(60):
        while ours() != [before.url]:  # noqa: ASYNC110 - another process brings it about
            await asyncio.sleep(0.05)


async def to_w8a8(client: AsyncVllmUnified, url: str, before: QuantizationResult) -> None:
    result = await client.set_quantization(url, enabled=True, method="w8a8")
    show(result)
    assert result.before.url == before.url
    info = await asyncio.to_thread(server_info, result.url)
    assert info["quantization"] == "compressed-tensors"
    assert info["model"] == result.quantization["checkpoint"]
    assert "w8a8" in Path(info["model"]).name
    assert "Paris" in await capital(client, url)


async def to_the_plain_model(client: AsyncVllmUnified, url: str) -> None:
    result = await client.set_quantization(url, enabled=False)
    show(result)
    info = await asyncio.to_thread(server_info, result.url)
    assert info["quantization"] is None
    assert result.quantization["enabled"] is False
    assert ours() == [result.url]


@pytest.mark.usefixtures("url")
def test_w8a8_with_adapters_is_refused_before_anything_is_done(live_server: LocalServer) -> None:
    spec = ServerSpec(model=live_server.spec.model, enable_lora=True)
    config = quantization_config({"enabled": True, "method": "w8a8"}, {})
    new = successor(spec, config, {})
    facts = gather_facts(spec, live_server.engine, new, config, 0)
    with pytest.raises(QuantizationError, match="LoRA"):
        check(config, facts)


def test_a_server_that_runs_so_is_left_alone(live_server: LocalServer, url: str) -> None:
    with VllmUnified(api_url=url) as client:
        result = client.set_quantization(url, live_server.model, {"enabled": False})
    assert (result.changed, result.url) == (False, url)
