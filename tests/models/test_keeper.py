"""Adapters that are kept, and those that are loaded when they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.models.test_lora import CONFIG, asked, paths
from tests.support.clients import KINDS, make_client
from tests.support.waiting import eventually
from vllm_unified import AdapterError, AsyncVllmUnified, ModelNotFoundError
from vllm_unified.models.lora.keeper import Keeper
from vllm_unified.simulator import Simulator

INTERVAL = 0.02


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look every few milliseconds, in place of seconds."""
    monkeypatch.setattr(Keeper.__init__, "__kwdefaults__", {"interval": INTERVAL})


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch, often: None) -> None:
    """No look in the time of a test."""
    monkeypatch.setattr(Keeper.__init__, "__kwdefaults__", {"interval": 60.0})


@pytest.fixture
async def servers() -> AsyncIterator[list[Simulator]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Simulator(CONFIG)) for _ in range(3)]


@pytest.fixture(params=KINDS)
async def either(
    request: pytest.FixtureRequest, servers: list[Simulator]
) -> AsyncIterator[AsyncVllmUnified]:
    async with make_client(request.param, resources=members(servers), timeout=60) as vllm:
        yield vllm


@pytest.fixture
async def vllm(servers: list[Simulator]) -> AsyncIterator[AsyncVllmUnified]:
    async with AsyncVllmUnified(members(servers), timeout=60) as vllm:
        yield vllm


@pytest.fixture
async def alone(servers: list[Simulator]) -> AsyncIterator[AsyncVllmUnified]:
    async with AsyncVllmUnified(api_url=servers[0].url, timeout=60) as vllm:
        yield vllm


def members(servers: list[Simulator]) -> dict[str, Any]:
    return {"endpoints": {n: server.url for n, server in zip("abc", servers, strict=True)}}


def told(vllm: AsyncVllmUnified, event: str) -> list[Any]:
    events: list[Any] = []
    vllm.on(event, events.append)
    return events


# Kept


async def test_a_server_that_was_restarted_gets_its_adapter_again(
    either: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    lost, loaded = told(either, "adapter_lost"), told(either, "adapter_loaded")
    await either.load_lora_adapter(adapter_name="x", adapter_path="/x", replicas=2)
    first = next(server for server in servers if paths(server))
    await first.restart()
    await eventually(lambda: paths(first) == {"x": "/x"})
    await eventually(lambda: len(loaded) == 3)
    assert [(event.adapter, event.path) for event in lost] == [("x", "/x")]
    assert lost[0].endpoint == loaded[2].endpoint
    assert sum(bool(paths(server)) for server in servers) == 2


async def test_a_request_that_meets_a_restarted_server_is_answered(
    seldom: None, alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/x")
    await servers[0].restart()
    answers = await asyncio.gather(
        *(alone.generate("Hi", model="x", max_tokens=1) for _ in range(20))
    )
    assert {answer.model for answer in answers} == {"x"}
    assert asked(servers[0], "/v1/load_lora_adapter") == 2


async def test_a_stream_that_meets_a_restarted_server_is_answered(
    seldom: None, alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/x")
    await servers[0].restart()
    assert (await alone.stream("Hi", model="x", max_tokens=3).collect()).model == "x"


async def test_what_is_not_kept_is_not_loaded_again(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/x", keep=False)
    await servers[0].restart()
    with pytest.raises(ModelNotFoundError):
        await alone.generate("Hi", model="x")
    assert paths(servers[0]) == {}


async def test_what_was_unloaded_stays_unloaded(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    unloaded = told(alone, "adapter_unloaded")
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/x")
    await alone.load_lora_adapter(adapter_name="y", adapter_path="/y")
    await alone.unload_lora_adapter(name="x")
    looks = asked(servers[0], "/v1/models")
    await eventually(lambda: asked(servers[0], "/v1/models") > looks + 3)
    assert paths(servers[0]) == {"y": "/y"}
    assert [event.adapter for event in unloaded] == ["x"]


async def test_the_new_version_is_the_one_that_is_kept(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/v1")
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/v2")
    await servers[0].restart()
    await eventually(lambda: paths(servers[0]) == {"x": "/v2"})


async def test_a_replica_whose_server_is_gone_goes_elsewhere(
    vllm: AsyncVllmUnified, servers: list[Simulator], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("keeper", "placement"):
        monkeypatch.setattr(f"vllm_unified.models.lora.{module}.PATIENCE_SECONDS", 0.1)
    lost = told(vllm, "adapter_lost")
    await vllm.load_lora_adapter(adapter_name="x", adapter_path="/x", replicas=1)
    first = next(server for server in servers if paths(server))
    first.kill()
    others = [server for server in servers if server is not first]
    await eventually(lambda: sum(paths(server) == {"x": "/x"} for server in others) == 1)
    assert [event.adapter for event in lost] == ["x"]
    assert (await vllm.generate("Hi", model="x", max_tokens=1)).model == "x"


async def test_who_joins_gets_what_all_have(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    fleet = alone.create_load_balancer([servers[0].url])
    await alone.load_lora_adapter(fleet, adapter_name="x", adapter_path="/x")
    fleet.add_endpoint(servers[1].url)
    await eventually(lambda: paths(servers[1]) == {"x": "/x"})


async def test_what_cannot_be_loaded_again_is_told_once(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    lost = told(alone, "adapter_lost")
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/x")
    servers[0].fail_next("error_500", times=1000, path="/v1/load_lora_adapter")
    await servers[0].restart()
    await eventually(lambda: asked(servers[0], "/v1/load_lora_adapter") > 4)
    assert [type(event.error) for event in lost] == [type(None), AdapterError]
    servers[0].heal()
    await eventually(lambda: paths(servers[0]) == {"x": "/x"})


async def test_nothing_looks_any_more_after_the_end(servers: list[Simulator]) -> None:
    async with AsyncVllmUnified(api_url=servers[0].url) as vllm:
        await vllm.load_lora_adapter(adapter_name="x", adapter_path="/x")
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "LoRA adapters"]


async def test_without_adapters_nobody_looks(
    vllm: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await vllm.generate("Hi", max_tokens=1)
    assert await vllm.list_lora_adapters() == []
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "LoRA adapters"]


# On demand


async def test_on_demand_it_is_loaded_by_the_first_request(
    either: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    result = await either.load_lora_adapter(adapter_name="x", adapter_path="/x", on_demand=True)
    assert result.success
    assert result.endpoints == ()
    assert [each.endpoints for each in await either.list_lora_adapters()] == [()]
    assert (await either.generate("Hi", lora_adapter="x", max_tokens=1)).model == "x"
    assert sum(bool(paths(server)) for server in servers) == 1


async def test_a_hundred_requests_load_it_once(
    vllm: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await vllm.load_lora_adapter(adapter_name="x", adapter_path="/x", on_demand=True)
    answers = await asyncio.gather(
        *(vllm.generate("Hi", model="x", max_tokens=1) for _ in range(100))
    )
    assert {answer.model for answer in answers} == {"x"}
    assert sum(asked(server, "/v1/load_lora_adapter") for server in servers) == 1


async def test_who_leaves_does_not_stop_the_loading_for_the_others(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/x", on_demand=True)
    first, *others = [
        asyncio.create_task(alone.generate("Hi", model="x", max_tokens=1)) for _ in range(3)
    ]
    await asyncio.sleep(0)
    first.cancel()
    assert {answer.model for answer in await asyncio.gather(*others)} == {"x"}
    await asyncio.wait([first])
    assert first.cancelled()
    assert asked(servers[0], "/v1/load_lora_adapter") == 1


async def test_the_least_recently_used_gives_way(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    """Where the server has two slots."""
    for name in "xyz":
        await alone.load_lora_adapter(adapter_name=name, adapter_path=f"/{name}", on_demand=True)
    for name in "xyxz":
        await alone.generate("Hi", model=name, max_tokens=1)
    assert sorted(paths(servers[0])) == ["x", "z"]


async def test_as_many_as_the_caller_says(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    for name in "xyz":
        await alone.load_lora_adapter(
            adapter_name=name, adapter_path=f"/{name}", on_demand=True, max_adapters=1
        )
        await alone.generate("Hi", model=name, max_tokens=1)
    assert sorted(paths(servers[0])) == ["z"]


async def test_one_with_requests_in_flight_does_not_give_way(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    for name in "xy":
        await alone.load_lora_adapter(
            adapter_name=name, adapter_path=f"/{name}", on_demand=True, max_adapters=1
        )
    async with alone.stream("Hi", model="x", max_tokens=50, ignore_eos=True):
        waiting = asyncio.create_task(alone.generate("Hi", model="y", max_tokens=1))
        await eventually(lambda: alone.list_endpoints()[0].in_flight == 1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        assert sorted(paths(servers[0])) == ["x"]
    assert (await waiting).model == "y"
    assert sorted(paths(servers[0])) == ["y"]


async def test_many_adapters_take_turns(vllm: AsyncVllmUnified, servers: list[Simulator]) -> None:
    """More adapters at once than all servers may have: each request is answered."""
    for number in range(8):
        await vllm.load_lora_adapter(
            adapter_name=f"x{number}", adapter_path=f"/{number}", on_demand=True, max_adapters=1
        )
    answers = await asyncio.gather(
        *(vllm.generate("Hi", model=f"x{number % 8}", max_tokens=1) for number in range(64))
    )
    assert [answer.model for answer in answers] == [f"x{number % 8}" for number in range(64)]
    assert all(len(paths(server)) <= 1 for server in servers)


async def test_a_server_that_forgot_it_loads_it_again(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/x", on_demand=True)
    await alone.generate("Hi", model="x", max_tokens=1)
    await servers[0].restart()
    assert (await alone.generate("Hi", model="x", max_tokens=1)).model == "x"


async def test_what_was_there_before_and_got_lost_is_loaded_on_demand(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    servers[0].service.models.load("x", "/x", in_place=False)
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/x", on_demand=True)
    await alone.generate("Hi", model="x", max_tokens=1)
    assert asked(servers[0], "/v1/load_lora_adapter") == 0
    servers[0].service.models.unload("x")
    assert (await alone.generate("Hi", model="x", max_tokens=1)).model == "x"


async def test_who_waits_for_an_adapter_that_is_unloaded_is_told_that_it_is_unknown(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    for name in "xy":
        await alone.load_lora_adapter(
            adapter_name=name, adapter_path=f"/{name}", on_demand=True, max_adapters=1
        )
    async with alone.stream("Hi", model="x", max_tokens=50, ignore_eos=True):
        waiting = asyncio.create_task(alone.generate("Hi", model="y", max_tokens=1))
        await eventually(lambda: asked(servers[0], "/v1/models") > 2)
        await alone.unload_lora_adapter(name="y")
    with pytest.raises(ModelNotFoundError):
        await waiting
    assert sorted(paths(servers[0])) == ["x"]


async def test_it_is_loaded_where_a_server_is_left(
    vllm: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    servers[0].kill()
    await vllm.load_lora_adapter(adapter_name="x", adapter_path="/x", on_demand=True)
    assert (await vllm.generate("Hi", model="x", max_tokens=1)).model == "x"


async def test_what_cannot_be_loaded_fails_each_request_with_an_error_of_its_own(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/missing", on_demand=True)
    errors = await asyncio.gather(
        *(alone.generate("Hi", model="x", max_tokens=1) for _ in range(3)), return_exceptions=True
    )
    assert {type(error) for error in errors} == {AdapterError}
    assert len({id(error) for error in errors}) == 3
    assert all("finds no adapter at /missing" in str(error) for error in errors)
    assert asked(servers[0], "/v1/load_lora_adapter") == 1


async def test_an_adapter_that_fits_no_server_is_not_taken(alone: AsyncVllmUnified) -> None:
    with pytest.raises(AdapterError, match="base_model is 'other'"):
        await alone.load_lora_adapter(
            adapter_name="x", adapter_path="/x", base_model="other", on_demand=True
        )
    assert await alone.list_lora_adapters() == []


async def test_what_is_on_demand_no_more_is_not_loaded(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/x", on_demand=True)
    await alone.unload_lora_adapter(name="x")
    with pytest.raises(ModelNotFoundError):
        await alone.generate("Hi", model="x")
    assert asked(servers[0], "/v1/load_lora_adapter") == 0
