"""LoRA adapters on two real vLLMs: what a look-alike cannot prove."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.adapters import write_adapter
from tests.support.clients import KINDS, make_client
from tests.support.vllm import OWN_SERVERS, all_running
from tests.support.waiting import eventually
from vllm_unified import AdapterError, AsyncVllmUnified, ModelNotFoundError
from vllm_unified.servers import BUNDLED_NAME, LocalServer, ServerSpec
from vllm_unified.servers.cache import models_dir

pytestmark = [pytest.mark.live, pytest.mark.timeout(900), OWN_SERVERS]

SPEC = ServerSpec(
    enable_lora=True,
    max_loras=2,
    max_lora_rank=8,
    max_model_len=1024,
    dev_mode=True,
    env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
)
PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
SLOW = 120.0
"""Seconds for a request: two servers share two cores with everything else."""


class Adapters(msgspec.Struct):
    """Folders on this machine."""

    first: str
    second: str
    large: str
    """Of rank 16."""


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[LocalServer, LocalServer]]:
    other = msgspec.structs.replace(SPEC, env={**SPEC.env, "LORA_TEST": "2"})
    with all_running(SPEC, other) as both:
        yield both[0], both[1]


def loud(adapter: Path) -> Path:
    """The adapter, at a scale at which its random weights change what the model says."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 1024}))
    return adapter


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    folder = tmp_path_factory.mktemp("lora")
    base = models_dir() / BUNDLED_NAME
    return Adapters(
        first=str(loud(write_adapter(folder / "first", base, seed=1))),
        second=str(loud(write_adapter(folder / "second", base, seed=2))),
        large=str(write_adapter(folder / "large", base, rank=16)),
    )


@pytest.fixture
def urls(servers: tuple[LocalServer, LocalServer], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return [server.url for server in servers]


@pytest.fixture(params=KINDS)
async def either(request: pytest.FixtureRequest, urls: list[str]) -> AsyncIterator[Any]:
    async with make_client(request.param, timeout=SLOW) as vllm:
        yield vllm


@pytest.fixture
async def vllm(urls: list[str]) -> AsyncIterator[AsyncVllmUnified]:
    """Both servers; in the end no adapter is left on them."""
    async with AsyncVllmUnified({"endpoints": urls}, timeout=SLOW) as vllm:
        yield vllm
        for adapter in await vllm.list_lora_adapters():
            await vllm.unload_lora_adapter(None, adapter.name)


async def test_the_guides_calls(
    either: AsyncVllmUnified, urls: list[str], adapters: Adapters
) -> None:
    loaded = await either.load_lora_adapter(
        urls[0],
        {
            "adapter_name": "MyAdapter",
            "adapter_path": adapters.first,
            "base_model": BUNDLED_NAME,
        },
    )
    assert loaded.success
    assert not loaded.already_loaded
    found = await either.list_lora_adapters(urls[0])
    assert [(each.name, each.base_model) for each in found] == [("MyAdapter", BUNDLED_NAME)]
    own = await either.make_request(urls[0], PROMPT, lora_adapter="MyAdapter", **GREEDY)
    assert own.model == "MyAdapter"
    base = await either.make_request(urls[0], PROMPT, **GREEDY)
    assert own.text != base.text

    again = await either.load_lora_adapter(
        urls[0], {"adapterName": "MyAdapter", "adapterPath": adapters.first}
    )
    assert again.success
    assert again.already_loaded
    await either.unload_lora_adapter(urls[0], "MyAdapter")
    assert await either.list_lora_adapters(urls[0]) == []
    with pytest.raises(ModelNotFoundError):
        await either.make_request(urls[0], PROMPT, "MyAdapter", max_tokens=1)


async def test_one_replica_and_then_all(
    vllm: AsyncVllmUnified, urls: list[str], adapters: Adapters
) -> None:
    names = {"adapter_name": "wide", "adapter_path": adapters.first}
    one = await vllm.load_lora_adapter(None, names, replicas=1)
    assert len(one.endpoints) == 1
    answers = await asyncio.gather(
        *(vllm.generate(PROMPT, model="wide", max_tokens=1) for _ in range(4))
    )
    assert len({answer.metadata.endpoint for answer in answers}) == 1
    assert all(len(answer.metadata.attempts) == 1 for answer in answers)

    both = await vllm.load_lora_adapter(None, names, replicas="all")
    assert len(both.endpoints) == 2
    assert (await vllm.list_lora_adapters())[0].endpoints == both.endpoints


async def test_a_new_version_under_load(
    vllm: AsyncVllmUnified, urls: list[str], adapters: Adapters
) -> None:
    await vllm.load_lora_adapter(adapter_name="live", adapter_path=adapters.first)
    before = (await vllm.generate(PROMPT, model="live", **GREEDY)).text
    texts: list[str] = []
    done = asyncio.Event()

    async def ask() -> None:
        while not done.is_set():
            texts.append((await vllm.generate(PROMPT, model="live", **GREEDY)).text)

    async def stream() -> None:
        while not done.is_set():
            texts.append((await vllm.stream(PROMPT, model="live", **GREEDY).collect()).text)

    async with asyncio.TaskGroup() as group:
        group.create_task(ask())
        group.create_task(stream())
        await eventually(lambda: len(texts) >= 2, SLOW)
        switched = await vllm.load_lora_adapter(adapter_name="live", adapter_path=adapters.second)
        done.set()

    assert len(switched.endpoints) == 2
    after = (await vllm.generate(PROMPT, model="live", **GREEDY)).text
    assert after != before
    assert texts.count(before) >= 2
    found = await vllm.list_lora_adapters()
    assert [(each.name, each.path) for each in found] == [("live", adapters.second)]
    for url in urls:
        assert (await vllm.make_request(url, PROMPT, "live", **GREEDY)).text == after


async def test_what_does_not_fit_is_told_before_and_by_the_server(
    vllm: AsyncVllmUnified, urls: list[str], adapters: Adapters, tmp_path: Path
) -> None:
    """The refusals in the server's own words come with ``check=False``."""
    large = {"adapter_name": "large", "adapter_path": adapters.large}
    for check in (True, False):
        with pytest.raises(AdapterError, match=r"rank.* 16.*8(.|\n)*--max-lora-rank 16") as told:
            await vllm.load_lora_adapter(urls[0], large, check=check)
        assert told.value.status_code == (None if check else 500)

    foreign = tmp_path / "foreign"
    shutil.copytree(adapters.first, foreign)
    config = foreign / "adapter_config.json"
    config.write_text(config.read_text().replace(BUNDLED_NAME, "llama-7b"))
    with pytest.raises(AdapterError, match=f"llama-7b', and this server serves {BUNDLED_NAME}"):
        await vllm.load_lora_adapter(urls[0], adapter_name="foreign", adapter_path=str(foreign))
    with pytest.raises(AdapterError, match="base_model is 'llama-7b'"):
        await vllm.load_lora_adapter(
            urls[0], {**large, "adapter_path": adapters.first, "base_model": "llama-7b"}
        )
    with pytest.raises(AdapterError, match="finds no adapter at /nowhere/adapter"):
        await vllm.load_lora_adapter(urls[0], adapter_name="lost", adapter_path="/nowhere/adapter")
    assert await vllm.list_lora_adapters() == []


async def test_what_the_server_forgot_is_loaded_for_the_request_that_needs_it(
    vllm: AsyncVllmUnified, urls: list[str], adapters: Adapters
) -> None:
    lost: list[Any] = []
    vllm.on("adapter_lost", lost.append)
    await vllm.load_lora_adapter(urls[1], adapter_name="kept", adapter_path=adapters.first)
    async with AsyncVllmUnified(api_url=urls[1]) as other:
        await other.unload_lora_adapter(urls[1], "kept")

    answer = await vllm.make_request(urls[1], PROMPT, "kept", max_tokens=1)

    assert len(answer.metadata.attempts) == 2
    assert [event.adapter for event in lost] == ["kept"]


async def test_on_demand_one_load_for_all_who_wait(
    vllm: AsyncVllmUnified, adapters: Adapters
) -> None:
    loaded: list[Any] = []
    vllm.on("adapter_loaded", loaded.append)
    await vllm.load_lora_adapter(adapter_name="rare", adapter_path=adapters.first, on_demand=True)
    assert [each.endpoints for each in await vllm.list_lora_adapters()] == [()]

    answers = await asyncio.gather(
        *(vllm.generate(PROMPT, lora_adapter="rare", max_tokens=1) for _ in range(10))
    )

    assert {answer.model for answer in answers} == {"rare"}
    assert [event.adapter for event in loaded] == ["rare"]


async def test_a_server_without_lora_says_how_to_get_it(
    live_server: LocalServer, url: str, adapters: Adapters
) -> None:
    async with AsyncVllmUnified(api_url=url) as vllm:
        for check, words in ((True, "this server has no LoRA"), (False, "while it runs")):
            with pytest.raises(AdapterError, match=words) as told:
                await vllm.load_lora_adapter(
                    url, adapter_name="x", adapter_path=adapters.first, check=check
                )
            assert "--enable-lora" in str(told.value)
            assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in str(told.value)
