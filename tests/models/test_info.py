"""What is known of a model: from each source, of two that disagree, and as both clients ask."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.models.recorded import METRICS, V0_6, V0_11, recorded
from tests.models.test_metrics import scrape
from tests.support import answers
from tests.support.clients import KINDS, make_client
from tests.support.scripted import STALL, Reply, Request, ScriptedServer
from vllm_unified import (
    AsyncVllmUnified,
    AuthenticationError,
    ConnectError,
    ModelInfo,
    ModelNotFoundError,
    ProtocolError,
)
from vllm_unified.models import facts
from vllm_unified.models.info import merged_info
from vllm_unified.results import ModelCard
from vllm_unified.servers import RunningServer, ServerSpec
from vllm_unified.servers.locks import FileLock
from vllm_unified.servers.records import alive_lock, write_record
from vllm_unified.simulator import BackgroundSimulator, Fleet

CARDS = [
    ModelCard(id="llama", root="/models/llama", max_model_len=8192),
    ModelCard(id="alias", root="/models/llama", max_model_len=8192),
    ModelCard(id="poet", root="/adapters/poet", parent="llama"),
]

# Each source


def test_the_configuration_of_a_real_server() -> None:
    found = facts.of_server_info(recorded("server_info-json-0.32.0.json").encode())
    assert found == {
        "max_model_len": 2048,
        "dtype": "bfloat16",
        "quantization": None,
        "gpu_memory_utilization": 0.92,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "device": "cpu",
        "kv_cache_tokens": 46592,
        "kv_cache_dtype": "auto",
        "prefix_caching": True,
        "is_multimodal": False,
        "lora_enabled": True,
        "lora_slots": 1,
        "max_lora_rank": 16,
    }


def test_the_text_of_a_real_server_says_less_and_the_same() -> None:
    text = facts.of_server_info(recorded("server_info-text-0.32.0.json").encode())
    full = facts.of_server_info(recorded("server_info-json-0.32.0.json").encode())
    assert text.items() <= full.items()
    assert {"dtype", "quantization", "tensor_parallel_size", "device"} <= text.keys()


def test_a_text_of_a_quantized_model() -> None:
    text = (
        "model='/m', dtype=torch.float16, max_seq_len=4096, tensor_parallel_size=4, "
        "quantization=awq_marlin, kv_cache_dtype=fp8, device_config=cuda"
    )
    found = facts.of_server_info(msgspec.json.encode({"vllm_config": text}))
    assert (found["quantization"], found["dtype"]) == ("awq_marlin", "float16")
    assert (found["tensor_parallel_size"], found["device"]) == (4, "cuda")


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"vllm_config": 3}', b"<html>"])
def test_a_configuration_that_is_none_says_nothing(body: bytes) -> None:
    assert facts.of_server_info(body) == {}


def test_the_labels_of_a_real_server() -> None:
    assert facts.of_metrics(scrape(METRICS)) == {
        "gpu_memory_utilization": 0.92,
        "kv_cache_dtype": "auto",
        "prefix_caching": True,
        "kv_cache_tokens": 46592,
        "lora_enabled": True,
        "lora_slots": 1,
    }


def test_labels_of_older_servers() -> None:
    old = facts.of_metrics(scrape(V0_6))
    assert (old["gpu_memory_utilization"], old["kv_cache_tokens"]) == (0.9, 16000)
    assert old["prefix_caching"] is False
    two_engines = facts.of_metrics(scrape(V0_11))
    assert (two_engines["kv_cache_tokens"], two_engines["kv_cache_dtype"]) == (3200, "fp8")


def test_labels_that_say_none_are_not_known() -> None:
    line = (
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="None",'
        'enable_prefix_caching="None",gpu_memory_utilization="None"} 1\n'
    )
    assert facts.of_metrics(scrape(line)) == {}


def test_the_newest_series_of_adapters_counts() -> None:
    lines = 'vllm:lora_requests_info{max_lora="4"} 9\nvllm:lora_requests_info{max_lora="2"} 5\n'
    assert facts.of_metrics(scrape(lines))["lora_slots"] == 4


def test_the_list_of_models() -> None:
    found = facts.of_cards(CARDS, None)
    assert (found["id"], found["root"], found["parent"]) == ("llama", "/models/llama", None)
    assert found["served_names"] == ("llama", "alias")
    assert (found["max_model_len"], found["lora_enabled"]) == (8192, True)
    assert facts.of_cards(CARDS[:2], "alias")["id"] == "alias"
    assert "lora_enabled" not in facts.of_cards(CARDS[:2], None), "there may be none yet"


def test_an_adapter_has_the_context_of_its_base() -> None:
    found = facts.of_cards(CARDS, "poet")
    assert (found["root"], found["parent"]) == ("/adapters/poet", "llama")
    assert (found["served_names"], found["max_model_len"]) == (("llama", "alias"), 8192)


def test_a_launch_says_what_was_asked_for_and_what_vllm_does_without() -> None:
    assert facts.of_spec(ServerSpec(), device="cpu") == {
        "dtype": "bfloat16",
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "lora_enabled": False,
        "device": "cpu",
    }
    spec = ServerSpec(
        dtype="half",
        quantization="awq",
        gpu_memory_utilization=0.5,
        tensor_parallel_size=2,
        enable_lora=True,
        max_loras=3,
    )
    assert facts.of_spec(spec, device="cuda") == {
        "dtype": "float16",
        "quantization": "awq",
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "lora_enabled": True,
        "lora_slots": 3,
        "max_lora_rank": 16,
        "device": "cuda",
    }


def test_arguments_win_over_the_rest_of_a_launch() -> None:
    args = ("--dtype=float32", "-q", "gptq", "-tp", "4", "--gpu_memory_utilization", "0.7")
    found = facts.of_spec(ServerSpec(dtype="bfloat16", extra_args=args), device="cpu")
    assert (found["dtype"], found["quantization"]) == ("float32", "gptq")
    assert (found["tensor_parallel_size"], found["gpu_memory_utilization"]) == (4, 0.7)


def test_a_dtype_left_to_vllm_is_not_known_from_the_launch() -> None:
    assert "dtype" not in facts.of_spec(ServerSpec(), device="cuda")
    assert "dtype" not in facts.of_spec(ServerSpec(dtype="auto"), device="cpu")


def test_a_launch_with_a_file_of_options_may_be_anything() -> None:
    spec = ServerSpec(extra_args=("--config", "vllm.yaml"))
    assert facts.of_spec(spec, device="cpu") == {}
    assert facts.left_to_model(spec) == set()


@pytest.mark.parametrize(
    ("config", "method", "bits"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq", 4),
        ({"quant_method": "gptq", "bits": 8}, "gptq", 8),
        ({"quant_method": "fp8"}, "fp8", 8),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
            },
            "compressed-tensors",
            4,
        ),
        ({"quant_method": "mxfp4"}, "mxfp4", None),
    ],
)
def test_a_quantized_checkpoint(config: dict[str, Any], method: str, bits: int | None) -> None:
    for whole in (
        {"quantization_config": config},
        {"text_config": {"quantization_config": config}},
    ):
        found = facts.of_checkpoint(whole, set())
        assert (found["quantization"], found.get("quantization_bits")) == (method, bits)


def test_a_plain_checkpoint_says_only_what_was_left_to_it() -> None:
    config = {"torch_dtype": "bfloat16"}
    assert facts.of_checkpoint(config, set()) == {}
    left = facts.left_to_model(ServerSpec())
    assert facts.of_checkpoint(config, left) == {"dtype": "bfloat16", "quantization": None}
    left = facts.left_to_model(ServerSpec(quantization="fp8", dtype="float16"))
    assert facts.of_checkpoint(config, left) == {}


def test_weights_of_32_bits_are_converted_so_their_dtype_says_nothing() -> None:
    found = facts.of_checkpoint({"dtype": "float32"}, {"dtype"})
    assert "dtype" not in found


# Of two sources


def test_the_first_source_is_believed_and_named() -> None:
    found = merged_info("m", [("a", {"dtype": "float16"}), ("b", {"dtype": "x", "version": "1"})])
    assert (found.id, found.dtype, found.version) == ("m", "float16", "1")
    assert found.sources == {"dtype": "a", "version": "b"}


def test_none_is_a_fact_too() -> None:
    found = merged_info("m", [("a", {"quantization": None}), ("b", {"quantization": "awq"})])
    assert (found.quantization, found.sources) == (None, {"quantization": "a"})


@pytest.mark.parametrize(
    ("device", "sizes", "devices"),
    [("cuda", (2, 3, 4), 24), ("cpu", (2, 1, 1), 0), (None, (1, 1, 1), None), ("cuda", (2,), None)],
)
def test_devices_in_use(device: str | None, sizes: tuple[int, ...], devices: int | None) -> None:
    names = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    known = dict(zip(names, sizes, strict=False)) | ({"device": device} if device else {})
    assert merged_info("m", [("a", known)]).num_gpu == devices


# As clients ask


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of our own, so that no server of this machine is seen."""
    monkeypatch.setenv("VLLM_UNIFIED_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=KINDS)
async def vllm(
    request: pytest.FixtureRequest, vllm_simulator: BackgroundSimulator
) -> AsyncIterator[AsyncVllmUnified]:
    async with make_client(request.param, api_url=vllm_simulator.url) as client:
        yield client


async def test_all_that_a_server_in_development_mode_says(vllm: AsyncVllmUnified) -> None:
    found = await vllm.get_model_info()
    assert isinstance(found, ModelInfo)
    assert (found.id, found.max_model_len, found.version) == ("sim", 4096, "0.32.0")
    assert (found.dtype, found.quantization) == ("bfloat16", None)
    assert (found.gpu_memory_utilization, found.num_gpu) == (0.92, 0)
    assert (found.kv_cache_tokens, found.lora_enabled) == (65536, False)
    assert found.sources["max_model_len"] == "/v1/models"
    assert found.sources["dtype"] == found.sources["quantization"] == "/server_info"
    assert list(found.sources) == [
        name for name in ModelInfo.__struct_fields__ if name in found.sources
    ]


async def test_without_development_mode_only_the_labels_tell(vllm_fleet: Fleet) -> None:
    server = vllm_fleet.add(dev_mode=False, enable_lora=True, max_loras=2)
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        found = await vllm.get_model_info()
    assert (found.gpu_memory_utilization, found.lora_slots) == (0.92, 2)
    assert found.sources["gpu_memory_utilization"] == "/metrics"
    assert (found.dtype, found.quantization, found.num_gpu) == (None, None, None)
    assert found.sources.keys().isdisjoint({"dtype", "quantization", "num_gpu"})


async def test_an_unknown_model(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator
) -> None:
    with pytest.raises(ModelNotFoundError, match="'nope'; it serves sim") as caught:
        await vllm.get_model_info(model="nope")
    assert caught.value.endpoint == vllm_simulator.url


async def test_nobody_is_there(vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator) -> None:
    vllm_simulator.kill()
    with pytest.raises(ConnectError):
        await vllm.get_model_info()


async def test_without_the_key_there_is_little(vllm_fleet: Fleet) -> None:
    server = vllm_fleet.add(model="m", api_keys=("ours",), dev_mode=False)
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        found = await vllm.get_model_info()
        assert (found.id, found.version, found.max_model_len) == ("m", "0.32.0", None)
        assert found.gpu_memory_utilization == 0.92
    quiet = vllm_fleet.add(model="m", api_keys=("ours",), disable_log_stats=True)
    async with AsyncVllmUnified(api_url=quiet.url) as vllm:
        with pytest.raises(AuthenticationError):
            await vllm.get_model_info()


async def test_a_source_that_hangs_takes_no_longer_than_the_timeout(
    server: ScriptedServer,
) -> None:
    def respond(request: Request) -> Reply:
        if request.target == "/version":
            return [answers.response({"version": "0.32.0"})]
        if request.target == "/v1/models":
            return [answers.response({"object": "list", "data": [{"id": "m"}]})]
        return [STALL]

    server.respond(respond)
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        began = time.monotonic()
        found = await vllm.get_model_info(timeout=0.2)
        assert time.monotonic() - began < 5
    assert (found.id, found.version, found.dtype) == ("m", "0.32.0", None)


async def test_something_else_than_a_vllm(server: ScriptedServer) -> None:
    server.always(answers.response("<html>", content_type="text/html"))
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        with pytest.raises(ProtocolError):
            await vllm.get_model_info()


async def test_of_a_fleet_the_one_that_serves_it_is_asked(vllm_fleet: Fleet) -> None:
    vllm_fleet.add(model="a").kill()
    urls = [vllm_fleet.servers[0].url, *(vllm_fleet.add(model=name).url for name in "bc")]
    async with AsyncVllmUnified(resources={"endpoints": urls}) as vllm:
        assert (await vllm.get_model_info()).id == "b"
        assert (await vllm.get_model_info(model="c")).id == "c"
        with pytest.raises(ModelNotFoundError, match="it serves b"):
            await vllm.get_model_info(model="a")


async def test_an_adapter_is_known_by_its_base(vllm_fleet: Fleet) -> None:
    server = vllm_fleet.add(model="m", enable_lora=True)
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        await vllm.load_lora_adapter(adapter_name="poet", adapter_path="/adapters/poet")
        found = await vllm.get_model_info(model="poet")
        base = await vllm.get_model_info()
    assert (found.id, found.root, found.parent) == ("poet", "/adapters/poet", "m")
    own = {"id": "poet", "root": "/adapters/poet", "parent": "m"}
    assert msgspec.structs.replace(base, **own) == found


async def test_nothing_is_generated_for_it(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator
) -> None:
    await vllm.get_model_info()
    assert {each.method for each in vllm_simulator.requests} == {"GET"}


# What this machine knows


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"torch_dtype": "float16"}))
    return str(tmp_path / "model")


@pytest.fixture
def local(vllm_fleet: Fleet, checkpoint: str) -> BackgroundSimulator:
    """A server that tells little of itself."""
    return vllm_fleet.add(model=checkpoint, served_model_names=("m", "alias"), dev_mode=False)


@pytest.fixture
def record(local: BackgroundSimulator, checkpoint: str) -> Iterator[RunningServer]:
    """The record of that server, as its supervisor keeps it."""
    server = RunningServer(
        fingerprint="f",
        state="ready",
        supervisor_pid=1,
        pid=2,
        url=local.url,
        model="m",
        engine="cuda-0.32.0",
        log_path="/log",
        started_at=0.0,
        spec=ServerSpec(model=checkpoint, served_model_name="m", max_model_len=4096),
    )
    with FileLock(alive_lock("f")) as lock:
        assert lock.try_acquire()
        write_record(server)
        yield server


async def info(
    server: BackgroundSimulator, url: str | None = None, model: str | None = None
) -> ModelInfo:
    async with AsyncVllmUnified(api_url=url or server.url) as vllm:
        return await vllm.get_model_info(model=model)


async def test_a_server_that_we_run_is_known_from_its_launch(
    local: BackgroundSimulator, record: RunningServer
) -> None:
    found = await info(local, local.url.replace("127.0.0.1", "localhost"))
    assert (found.dtype, found.sources["dtype"]) == ("float16", "config.json")
    assert (found.quantization, found.sources["quantization"]) == (None, "config.json")
    assert (found.num_gpu, found.sources["num_gpu"]) == (1, "launch record")
    assert (found.lora_enabled, found.sources["lora_enabled"]) == (False, "launch record")


@pytest.mark.usefixtures("record")
async def test_an_alias_has_the_launch_too(local: BackgroundSimulator) -> None:
    found = await info(local, model="alias")
    assert (found.id, found.served_names) == ("alias", ("m", "alias"))
    assert (found.num_gpu, found.sources["num_gpu"]) == (1, "launch record")


@pytest.mark.parametrize(
    ("engine", "device"),
    [
        ("cpu-0.32.0", "cpu"),
        ("environment-cpu-0.32.0", "cpu"),
        ("environment-cuda-0.32.0", "cuda"),
        ("vllm/vllm-openai:latest", None),
    ],
)
async def test_the_engine_tells_what_it_runs_on(
    local: BackgroundSimulator, record: RunningServer, engine: str, device: str | None
) -> None:
    write_record(msgspec.structs.replace(record, engine=engine))
    assert (await info(local)).device == device


async def test_a_server_that_others_run_is_not(local: BackgroundSimulator) -> None:
    found = await info(local)
    assert found.sources.keys().isdisjoint({"dtype", "quantization", "num_gpu", "lora_enabled"})


@pytest.mark.parametrize(
    "change",
    [
        {"url": "http://127.0.0.1:9"},
        {"model": "other"},
        {"state": "starting"},
        {"spec": ServerSpec(model="/another/model")},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_the_record_of_another_server_says_nothing(
    local: BackgroundSimulator, record: RunningServer, change: dict[str, Any]
) -> None:
    write_record(msgspec.structs.replace(record, **change))
    assert "launch record" not in (await info(local)).sources.values()


async def test_the_folder_of_a_server_elsewhere_is_not_ours(
    server: ScriptedServer, tmp_path: Path
) -> None:
    """Behind a path there is a gateway, and the model is somewhere else."""
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    card = {"id": "m", "root": str(tmp_path), "max_model_len": 2048}

    def respond(request: Request) -> Reply:
        if request.target.endswith("/v1/models"):
            return [answers.response({"object": "list", "data": [card]})]
        return [answers.error("404 Not Found", "Not Found")]

    server.respond(respond)
    async with AsyncVllmUnified() as vllm:
        here = await vllm.get_model_info(server.url)
        elsewhere = await vllm.get_model_info(f"{server.url}/gateway")
    assert (here.quantization, here.max_model_len) == ("awq", 2048)
    assert "quantization" not in elsewhere.sources
