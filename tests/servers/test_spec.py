"""Command lines, environments and fingerprints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from vllm_unified.errors import ConfigurationError
from vllm_unified.servers.engines import Engine
from vllm_unified.servers.spec import ServerSpec, command, environment, fingerprint, resolved

if TYPE_CHECKING:
    from pathlib import Path

CPU = Engine(
    name="cpu-1", kind="cpu", version="1", python="/e/bin/python", origin="managed", path="/e"
)
GPU = msgspec.structs.replace(CPU, name="cuda-1", kind="cuda")


def option(args: list[str], flag: str) -> str | None:
    return args[args.index(flag) + 1] if flag in args else None


def test_the_bundled_model_on_a_cpu(tmp_path: Path) -> None:
    spec = resolved(ServerSpec(), tmp_path)
    args = command(spec, CPU, 8123)
    assert args[:3] == ["/e/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert option(args, "--model") == str(tmp_path)
    assert option(args, "--served-model-name") == "SmolLM2-135M-Instruct"
    assert option(args, "--max-model-len") == "2048"
    assert option(args, "--dtype") == "bfloat16"
    assert option(args, "--port") == "8123"
    assert option(args, "--host") == "127.0.0.1"
    assert "--enforce-eager" in args
    env = environment(spec, CPU, {})
    assert (env["VLLM_CPU_KVCACHE_SPACE"], env["HF_HUB_OFFLINE"]) == ("1", "1")


def test_a_gpu_keeps_the_defaults_of_vllm() -> None:
    spec = resolved(ServerSpec(model="org/model"))
    args = command(spec, GPU, 1)
    assert not {"--dtype", "--enforce-eager", "--max-model-len"} & set(args)
    env = environment(spec, GPU, {})
    assert not {"VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"} & env.keys()
    assert env["VLLM_NO_USAGE_STATS"] == "1"


def test_a_fraction_of_a_gib_is_given_in_bytes() -> None:
    spec = ServerSpec(model="m", kv_cache_gib=0.25)
    assert option(command(spec, CPU, 1), "--kv-cache-memory-bytes") == str(2**28)
    env = environment(spec, CPU, {"VLLM_CPU_KVCACHE_SPACE": "4"})
    assert "VLLM_CPU_KVCACHE_SPACE" not in env


def test_lora_and_dev_mode() -> None:
    spec = ServerSpec(model="m", enable_lora=True, max_loras=2, max_lora_rank=8, dev_mode=True)
    args = command(spec, CPU, 1)
    assert "--enable-lora" in args
    assert (option(args, "--max-loras"), option(args, "--max-lora-rank")) == ("2", "8")
    env = environment(spec, CPU, {})
    assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == env["VLLM_SERVER_DEV_MODE"] == "1"


def test_names_quantization_sizes_and_policy() -> None:
    spec = ServerSpec(
        model="m",
        served_model_name="one",
        aliases=("two", "three"),
        quantization="awq",
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        max_num_seqs=4,
        scheduling_policy="priority",
    )
    args = command(spec, GPU, 1)
    names = args.index("--served-model-name")
    assert args[names + 1 : names + 4] == ["one", "two", "three"]
    assert option(args, "--quantization") == "awq"
    assert option(args, "--tensor-parallel-size") == "2"
    assert option(args, "--pipeline-parallel-size") == "3"
    assert option(args, "--max-num-seqs") == "4"
    assert option(args, "--scheduling-policy") == "priority"


def test_extra_arguments_and_variables_win() -> None:
    spec = ServerSpec(model="m", extra_args=("--dtype", "half"), env={"VLLM_NO_USAGE_STATS": "0"})
    assert command(spec, CPU, 1)[-2:] == ["--dtype", "half"]
    assert environment(spec, CPU, {})["VLLM_NO_USAGE_STATS"] == "0"


def test_what_is_meant_for_the_client_does_not_reach_the_server() -> None:
    base = {"VLLM_API_KEY": "k", "VLLM_PORT": "tcp://1", "PYTHONPATH": "/x", "HOME": "/home/me"}
    env = environment(ServerSpec(model="m"), CPU, base | {"VLLM_UNIFIED_CACHE": "/c"})
    assert env["HOME"] == "/home/me"
    assert not {"VLLM_API_KEY", "VLLM_PORT", "PYTHONPATH", "VLLM_UNIFIED_CACHE"} & env.keys()


def test_the_key_is_in_the_environment_only() -> None:
    spec = ServerSpec(model="m", api_key="secret", env={"HF_TOKEN": "token"})
    assert environment(spec, CPU, {})["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(command(spec, CPU, 1))
    assert "secret" not in repr(spec)
    assert "token" not in repr(spec)
    assert "secret" not in fingerprint(spec, CPU)


def test_fingerprints_tell_servers_apart() -> None:
    spec = ServerSpec(model="m", env={"A": "1", "B": "2"})
    same = ServerSpec(model="m", env={"B": "2", "A": "1"})
    assert fingerprint(spec, CPU) == fingerprint(same, CPU)
    others = [
        fingerprint(msgspec.structs.replace(spec, api_key="k"), CPU),
        fingerprint(msgspec.structs.replace(spec, max_model_len=5), CPU),
        fingerprint(spec, GPU),
        fingerprint(msgspec.structs.replace(spec, quantization="fp8"), CPU),
        fingerprint(msgspec.structs.replace(spec, aliases=("a",)), CPU),
        fingerprint(spec, CPU, {"CUDA_VISIBLE_DEVICES": "1"}),
        fingerprint(spec, CPU),
    ]
    assert len(set(others)) == 7


def test_a_local_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    spec = resolved(ServerSpec(model="model"))
    assert (spec.model, spec.name) == (str(tmp_path / "model"), "model")


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ""},
        {"port": 0},
        {"port": 70000},
        {"max_model_len": 0},
        {"kv_cache_gib": -1.0},
        {"gpu_memory_utilization": 1.5},
        {"tensor_parallel_size": 0},
        {"pipeline_parallel_size": -1},
        {"max_num_seqs": 0},
        {"max_restarts": -1},
        {"scheduling_policy": "random"},
        {"quantization": " "},
        {"aliases": "name"},
        {"aliases": ("",)},
        {"aliases": ("--flag",)},
        {"extra_args": ("--api-key", "k")},
        {"extra_args": ("--api-key=k",)},
    ],
)
def test_wrong_values_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        ServerSpec(**wrong)
