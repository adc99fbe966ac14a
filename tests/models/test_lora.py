"""LoRA adapters on simulated servers: loaded, replaced under load, listed, unloaded, refused."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.adapters import write_adapter
from tests.support.answers import response
from tests.support.clients import KINDS, make_client
from tests.support.scripted import Request, ScriptedServer, Step
from tests.support.waiting import eventually
from vllm_unified import (
    AdapterError,
    AsyncVllmUnified,
    BadRequestError,
    ConfigurationError,
    ConnectError,
    ModelNotFoundError,
    NotFoundError,
    ServerError,
    VllmError,
)
from vllm_unified.models.lora.adapters import Adapter, temporary_name
from vllm_unified.models.lora.site import refusal
from vllm_unified.simulator import Simulator, SimulatorConfig, Timing

CONFIG = SimulatorConfig(model="base", enable_lora=True, max_loras=2)
SLOWLY = Timing(time_to_first_token=0.002, inter_token_latency=0.002)


@pytest.fixture
async def servers() -> AsyncIterator[list[Simulator]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Simulator(CONFIG, timing=SLOWLY)) for _ in range(3)]


@pytest.fixture(params=KINDS)
async def vllm(
    request: pytest.FixtureRequest, servers: list[Simulator]
) -> AsyncIterator[AsyncVllmUnified]:
    members = {name: server.url for name, server in zip("abc", servers, strict=True)}
    async with make_client(
        request.param, resources={"endpoints": members}, model="base", timeout=60
    ) as vllm:
        yield vllm


@pytest.fixture
async def alone(servers: list[Simulator]) -> AsyncIterator[AsyncVllmUnified]:
    """A client of the first server only."""
    async with AsyncVllmUnified(api_url=servers[0].url, timeout=60, max_retries=0) as vllm:
        yield vllm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter on this machine, for the model ``base``."""
    model = tmp_path / "base"
    model.mkdir()
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
    }
    (model / "config.json").write_text(json.dumps(sizes))
    return write_adapter(tmp_path / "v1", model, rank=4)


def paths(server: Simulator) -> dict[str, str]:
    """The adapters of a server, by name."""
    return {name: adapter.path for name, adapter in server.service.models.adapters.items()}


def asked(server: Simulator, path: str) -> int:
    """How many requests of this path it had."""
    return sum(request.path == path for request in server.requests)


# Loading


async def test_the_guides_calls(vllm: AsyncVllmUnified, servers: list[Simulator]) -> None:
    url = servers[0].url
    load_result = await vllm.load_lora_adapter(
        url,
        {"adapter_name": "MyAdapter", "adapter_path": "/path/to/adapter", "base_model": "base"},
    )
    assert load_result.success
    adapters = await vllm.list_lora_adapters(url)
    assert ", ".join(adapter.name for adapter in adapters) == "MyAdapter"
    assert (adapters[0].path, adapters[0].base_model) == ("/path/to/adapter", "base")
    answer = await vllm.make_request(url, "Hi", lora_adapter="MyAdapter", max_tokens=1)
    assert answer.model == "MyAdapter"


@pytest.mark.parametrize(("replicas", "count"), [(1, 1), (2, 2), ("all", 3), (None, 3)])
async def test_as_many_as_are_wanted(
    vllm: AsyncVllmUnified, servers: list[Simulator], replicas: Any, count: int
) -> None:
    result = await vllm.load_lora_adapter(adapter_name="x", adapter_path="/x", replicas=replicas)
    assert len(result.endpoints) == count
    assert sum(paths(server) == {"x": "/x"} for server in servers) == count
    (listed,) = await vllm.list_lora_adapters()
    assert sorted(listed.endpoints) == sorted(result.endpoints)

    answers = [await vllm.generate("Hi", model="x", max_tokens=1) for _ in range(6)]
    assert {len(answer.metadata.attempts) for answer in answers} == {1}


async def test_who_has_fewest_adapters_gets_the_next(
    vllm: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    for name in "uvwxyz":
        await vllm.load_lora_adapter(adapter_name=name, adapter_path=f"/{name}", replicas=1)
    assert [len(paths(server)) for server in servers] == [2, 2, 2]


async def test_more_than_a_server_holds_is_told(
    vllm: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    notes = [
        (await vllm.load_lora_adapter(servers[0].url, adapter_name=n, adapter_path=n)).notes
        for n in ("x", "y", "z")
    ]
    assert notes[:2] == [(), ()]
    assert "has 3 adapters now, and slots for 2 at a time" in notes[2][0]


async def test_the_same_again_is_a_success(
    vllm: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    adapter = {"adapter_name": "x", "adapter_path": "/x"}
    first = await vllm.load_lora_adapter(None, adapter, replicas=2)
    again = await vllm.load_lora_adapter(None, adapter, replicas=2)
    assert not first.already_loaded
    assert again.already_loaded
    assert sorted(again.endpoints) == sorted(first.endpoints)
    more = await vllm.load_lora_adapter(None, adapter)
    assert not more.already_loaded
    assert [asked(server, "/v1/load_lora_adapter") for server in servers] == [1, 1, 1]


async def test_what_another_client_loaded_in_the_same_moment_is_a_success(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    async with AsyncVllmUnified(api_url=servers[0].url) as other:
        results = await asyncio.gather(
            *(
                client.load_lora_adapter(adapter_name="x", adapter_path="/x")
                for client in (alone, other)
            )
        )
    assert all(result.success for result in results)


async def test_unloading(vllm: AsyncVllmUnified, servers: list[Simulator]) -> None:
    await vllm.load_lora_adapter(adapter_name="x", adapter_path="/x", replicas=2)
    assert (await vllm.unload_lora_adapter(None, "x")).endpoints == ()
    assert [paths(server) for server in servers] == [{}, {}, {}]
    with pytest.raises(NotFoundError, match="no adapter 'x'"):
        await vllm.unload_lora_adapter(None, "x")
    with pytest.raises(ModelNotFoundError):
        await vllm.generate("Hi", model="x")


async def test_a_server_in_two_fleets_is_one_server(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    twins = alone.create_load_balancer([{"id": n, "url": servers[0].url} for n in ("one", "two")])
    result = await alone.load_lora_adapter(twins, adapter_name="x", adapter_path="/x")
    assert result.endpoints == ("one", "two")
    assert asked(servers[0], "/v1/load_lora_adapter") == 1


async def test_two_names_of_one_call_must_agree(vllm: AsyncVllmUnified) -> None:
    await vllm.load_lora_adapter(adapter_name="x", adapter_path="/x")
    same = await vllm.make_request(None, {"prompt": "Hi", "loraAdapter": "x"}, "x", max_tokens=1)
    assert same.model == "x"
    with pytest.raises(BadRequestError, match="model='base' and lora_adapter='x'"):
        await vllm.generate("Hi", model="base", lora_adapter="x")


# A new version


async def test_a_new_version_under_load(vllm: AsyncVllmUnified, servers: list[Simulator]) -> None:
    await vllm.load_lora_adapter(adapter_name="x", adapter_path="/v1")
    prompt = {"prompt": "Hi", "max_tokens": 8, "temperature": 0, "seed": 1, "model": "x"}
    old = (await vllm.make_request(None, prompt)).text
    texts: list[str] = []
    done = asyncio.Event()

    async def ask() -> None:
        while not done.is_set():
            texts.append((await vllm.make_request(None, prompt)).text)

    async def stream() -> None:
        while not done.is_set():
            texts.append((await vllm.stream_generation(None, prompt).collect()).text)

    async with asyncio.TaskGroup() as group:
        for work in (ask, stream, ask, stream):
            group.create_task(work())
        await eventually(lambda: len(texts) > 20)
        result = await vllm.load_lora_adapter(adapter_name="x", adapter_path="/v2")
        seen = len(texts)
        await eventually(lambda: len(texts) > seen + 20)
        done.set()

    assert len(result.endpoints) == 3
    assert [paths(server) for server in servers] == [{"x": "/v2"}] * 3
    new = (await vllm.make_request(None, prompt)).text
    assert new != old
    # A simulator's weights depend on the name too, so the temporary name has a text of its own.
    assert len({*texts} - {old, new}) <= 1
    assert texts[:10] == [old] * 10
    assert texts[-10:] == [new] * 10


async def test_two_clients_replace_it_at_once_and_both_have_answers(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    done = asyncio.Event()

    async def ask(client: AsyncVllmUnified) -> None:
        while not done.is_set():
            await client.generate("Hi", model="x", max_tokens=3)

    async with AsyncVllmUnified(api_url=servers[0].url, timeout=60, max_retries=0) as other:
        both = (alone, other)
        for client in both:
            await client.load_lora_adapter(adapter_name="x", adapter_path="/v0")
        async with asyncio.TaskGroup() as group:
            for client in both:
                group.create_task(ask(client))
            for number in range(1, 6):
                await asyncio.gather(
                    *(
                        client.load_lora_adapter(adapter_name="x", adapter_path=f"/v{number}")
                        for client in both
                    )
                )
            done.set()
    assert paths(servers[0]) == {"x": "/v5"}


async def test_servers_that_are_not_chosen_keep_no_old_version(
    vllm: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await vllm.load_lora_adapter(adapter_name="x", adapter_path="/v1")
    result = await vllm.load_lora_adapter(adapter_name="x", adapter_path="/v2", replicas=1)
    assert len(result.endpoints) == 1
    assert sorted(map(str, map(paths, servers))) == ["{'x': '/v2'}", "{}", "{}"]
    assert len(result.notes) == 2


async def test_a_new_version_that_is_refused_leaves_the_old_one(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/v1")
    with pytest.raises(AdapterError, match="finds no adapter at /missing") as told:
        await alone.load_lora_adapter(adapter_name="x", adapter_path="/missing")
    assert "The version at /v1 still runs as 'x'" in str(told.value)
    assert paths(servers[0]) == {"x": "/v1"}
    assert (await alone.generate("Hi", model="x", max_tokens=1)).model == "x"


async def test_a_new_version_that_does_not_generate_leaves_the_old_one(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/v1")
    servers[0].fail_next("error_500", path="/v1/completions")
    with pytest.raises(AdapterError, match="does not generate with it") as told:
        await alone.load_lora_adapter(adapter_name="x", adapter_path="/v2")
    assert "The version at /v1 still runs as 'x'" in str(told.value)
    assert paths(servers[0]) == {"x": "/v1"}


async def test_a_failure_in_the_middle_of_a_replacement_brings_the_old_version_back(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    """The second proof fails, when the old version is gone already."""
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/v1")
    servers[0].fail_next("error_500", path="/v1/completions", model="x")
    with pytest.raises(AdapterError, match="does not generate with it") as told:
        await alone.load_lora_adapter(adapter_name="x", adapter_path="/v2")
    assert "The version at /v1 runs again as 'x'" in str(told.value)
    assert paths(servers[0]) == {"x": "/v1"}
    assert (await alone.generate("Hi", model="x", max_tokens=1)).model == "x"


async def test_what_an_earlier_try_left_is_no_obstacle(
    alone: AsyncVllmUnified, servers: list[Simulator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_unified.models.lora.site.OTHERS_SECONDS", 0.05)
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/v1")
    left = temporary_name(Adapter(name="x", path="/v2"))
    servers[0].service.models.load(left, "/v2", in_place=False)
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/v2")
    assert paths(servers[0]) == {"x": "/v2"}


async def test_changed_files_under_the_same_path_are_refused(
    vllm: AsyncVllmUnified, servers: list[Simulator], folder: Path
) -> None:
    await vllm.load_lora_adapter(adapter_name="x", adapter_path=str(folder))
    os.utime(folder / "adapter_config.json", ns=(1, 1))
    for _ in range(2):
        with pytest.raises(AdapterError, match="have changed since 'x' was loaded") as told:
            await vllm.load_lora_adapter(adapter_name="x", adapter_path=str(folder))
        assert "in a new folder" in str(told.value)
        if paths(servers[0]):
            await vllm.unload_lora_adapter(None, "x")  # that does not clear the prefix cache


# What fails


async def test_files_are_looked_at_before_anything_is_sent(
    vllm: AsyncVllmUnified, servers: list[Simulator], folder: Path
) -> None:
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        await vllm.load_lora_adapter(servers[0].url, adapter_name="x", adapter_path=str(folder))
    assert asked(servers[0], "/v1/load_lora_adapter") == 0
    await vllm.load_lora_adapter(
        servers[0].url, adapter_name="x", adapter_path=str(folder), check=False
    )
    assert paths(servers[0]) == {"x": str(folder)}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 64}, r"rank is 64, and this server takes at most 16\b(.|\n)*--max-lora-rank 64"),
        ({"base_model_name_or_path": "org/other"}, "made for 'org/other'"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
    ],
)
async def test_an_adapter_for_something_else(
    alone: AsyncVllmUnified,
    servers: list[Simulator],
    folder: Path,
    config: dict[str, Any],
    words: str,
) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(AdapterError, match=words) as told:
        await alone.load_lora_adapter(adapter_name="x", adapter_path=str(folder))
    assert told.value.endpoint == servers[0].url
    assert asked(servers[0], "/v1/load_lora_adapter") == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"allow_runtime_lora": False},
            r"while it runs(.|\n)*--enable-lora, with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        ),
        ({"enable_lora": False}, r"has no LoRA(.|\n)*--enable-lora"),
        ({"lora_paths": ()}, r"finds no adapter at /x(.|\n)*where the server runs"),
    ],
)
async def test_a_server_that_refuses(options: dict[str, Any], words: str) -> None:
    async with (
        Simulator(CONFIG, **options) as server,
        AsyncVllmUnified(api_url=server.url) as vllm,
    ):
        with pytest.raises(AdapterError, match=words) as told:
            await vllm.load_lora_adapter(adapter_name="x", adapter_path="/x", check=False)
        assert told.value.status_code in (404, 500)
        assert told.value.endpoint == server.url


def test_a_rank_that_the_server_refuses() -> None:
    """In the words of vLLM 0.32."""
    error = ServerError(
        "Call to add_lora method failed: LoRA rank 16 is greater than max_lora_rank 8.",
        status_code=500,
    )
    found = refusal(error, "x", "/x")
    assert isinstance(found, AdapterError)
    assert "LoRA rank 16 is greater" in found.message
    assert found.hint is not None
    assert "--max-lora-rank 16;" in found.hint


@pytest.mark.parametrize("error", [ConnectError("gone"), VllmError("x", status_code=401)])
def test_what_is_not_about_the_adapter_stays_what_it_is(error: VllmError) -> None:
    assert refusal(error, "x", "/x") is error


async def test_nobody_there(alone: AsyncVllmUnified, servers: list[Simulator]) -> None:
    servers[0].kill()
    with pytest.raises(ConnectError):
        await alone.load_lora_adapter(adapter_name="x", adapter_path="/x")
    with pytest.raises(ConnectError):
        await alone.list_lora_adapters()


async def test_one_of_three_is_down(vllm: AsyncVllmUnified, servers: list[Simulator]) -> None:
    servers[1].kill()
    two = await vllm.load_lora_adapter(adapter_name="x", adapter_path="/x", replicas=2)
    assert sorted(two.endpoints) == ["a", "c"]
    assert list(two.failed) == ["b"]
    with pytest.raises(AdapterError, match="'x' is on 2 servers in place of 3; b: ") as told:
        await vllm.load_lora_adapter(adapter_name="x", adapter_path="/x")
    assert sorted(told.value.endpoints) == ["a", "c"]
    assert isinstance(told.value.failed["b"], ConnectError)
    assert isinstance(told.value.__cause__, ConnectError)
    (listed,) = await vllm.list_lora_adapters()
    assert sorted(listed.endpoints) == ["a", "c"]


async def test_more_replicas_than_servers(vllm: AsyncVllmUnified) -> None:
    for replicas in (4, 0, "some", True):
        with pytest.raises(ConfigurationError, match="replicas"):
            await vllm.load_lora_adapter(
                adapter_name="x",
                adapter_path="/x",
                replicas=replicas,  # type: ignore[arg-type]
            )


async def test_a_server_that_only_says_so(server: ScriptedServer) -> None:
    """A balancer before several vLLMs, for example: one loads, another lists."""

    def respond(request: Request) -> list[Step]:
        if request.target == "/v1/models":
            return [response({"object": "list", "data": [{"id": "base", "root": "base"}]})]
        return [response({})]

    server.respond(respond)
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        with pytest.raises(AdapterError, match=r"does not list it(.|\n)*one vLLM at this address"):
            await vllm.load_lora_adapter(adapter_name="x", adapter_path="/x")
    assert [r.target for r in server.requests if "unload" in r.target] == [
        "/v1/unload_lora_adapter"
    ]


async def test_a_server_that_takes_too_long(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    servers[0].fail_next("stall", path="/v1/load_lora_adapter")
    with pytest.raises(TimeoutError, match="'x' was not loaded in time"):
        await alone.load_lora_adapter(adapter_name="x", adapter_path="/x", timeout=0.2)
    assert paths(servers[0]) == {}


async def test_a_busy_server_proves_it_later(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    servers[0].fail_next("busy", times=2, path="/v1/completions")
    assert (await alone.load_lora_adapter(adapter_name="x", adapter_path="/x")).success


async def test_whoever_leaves_leaves_nothing_half_done(
    alone: AsyncVllmUnified, servers: list[Simulator]
) -> None:
    """Cancelled at any moment of a replacement, it is done in full."""
    await alone.load_lora_adapter(adapter_name="x", adapter_path="/v0")
    for number in range(1, 6):
        path = f"/v{number}"
        before = asked(servers[0], "/v1/unload_lora_adapter")
        load = asyncio.create_task(alone.load_lora_adapter(adapter_name="x", adapter_path=path))
        await eventually(
            lambda before=before: asked(servers[0], "/v1/unload_lora_adapter") > before  # type: ignore[misc]
        )
        load.cancel()
        await asyncio.wait([load])
        assert load.cancelled()
        await eventually(lambda path=path: paths(servers[0]) == {"x": path})  # type: ignore[misc]
