"""What is sent to a container engine for a spec."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vllm_unified.errors import ConfigurationError
from vllm_unified.servers import ContainerSpec, ServerSpec
from vllm_unified.servers.containers.spec import (
    container_fingerprint,
    container_name,
    container_order,
    engine_host,
    reachable_host,
)

KEY = "sk-very-secret"
SERVER = ServerSpec(model="org/model", api_key=KEY)


def order(port: int = 4000, **fields: Any) -> dict[str, Any]:
    return container_order(ContainerSpec(**{"server": SERVER, **fields}), port)


def test_the_key_is_in_the_environment_and_nowhere_else() -> None:
    sent = order()
    assert sent.pop("environment")["VLLM_API_KEY"] == KEY
    assert KEY not in str(sent)
    assert KEY not in repr(ContainerSpec(server=SERVER, environment={"HF_TOKEN": "hf-secret"}))
    assert "hf-secret" not in repr(ContainerSpec(environment={"HF_TOKEN": "hf-secret"}))


def test_vllm_listens_inside_and_the_port_is_published_on_this_machine_only() -> None:
    sent = order(4000)
    args = sent["command"]
    assert sent["entrypoint"] == ["python3", "-m", "vllm.entrypoints.openai.api_server"]
    assert args[args.index("--host") + 1] == "0.0.0.0"
    assert args[args.index("--port") + 1] == "8000"
    assert args[args.index("--model") + 1] == "org/model"
    assert sent["ports"] == {"8000/tcp": ("127.0.0.1", 4000)}
    named = order(4000, server=msgspec.structs.replace(SERVER, host="localhost"))
    assert named["ports"] == sent["ports"]


def test_on_the_hosts_network_nothing_is_published() -> None:
    sent = order(4000, network="host")
    args = sent["command"]
    assert "ports" not in sent
    assert args[args.index("--host") + 1] == "127.0.0.1"
    assert args[args.index("--port") + 1] == "4000"
    assert sent["network_mode"] == "host"
    assert order(network="models")["network"] == "models"


@pytest.mark.parametrize(
    ("gpus", "request_for"),
    [
        ("all", {"count": -1, "capabilities": [["gpu"]]}),
        (2, {"count": 2, "capabilities": [["gpu"]]}),
        (("0", "GPU-3f"), {"device_ids": ["0", "GPU-3f"], "capabilities": [["gpu"]]}),
    ],
)
def test_gpus_are_device_requests(gpus: Any, request_for: dict[str, Any]) -> None:
    sent = order(gpus=gpus)
    assert sent["device_requests"] == [request_for]
    assert "--enforce-eager" not in sent["command"]


def test_without_gpus_it_is_a_vllm_for_cpus() -> None:
    sent = order(gpus=None)
    assert "device_requests" not in sent
    assert "--enforce-eager" in sent["command"]
    assert sent["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_shared_memory_is_a_size_or_the_machines_own() -> None:
    assert order(gpus=None)["shm_size"] == "8g"
    assert order(shm_size="16g")["shm_size"] == "16g"
    sent = order(ipc_host=True)
    assert sent["ipc_mode"] == "host"
    assert "shm_size" not in sent


def test_folders_of_the_model_are_mounted_for_reading_and_volumes_as_they_say() -> None:
    spec = ContainerSpec(server=SERVER, volumes={"/data": "/inside:ro", "cache": "/var/cache"})
    sent = container_order(spec, 1, folders=("/models/a",))
    assert sent["volumes"] == {
        "/models/a": {"bind": "/models/a", "mode": "ro"},
        "/data": {"bind": "/inside", "mode": "ro"},
        "cache": {"bind": "/var/cache", "mode": "rw"},
    }


def test_arguments_are_added_or_replaced_and_the_environment_wins() -> None:
    server = msgspec.structs.replace(SERVER, extra_args=("--a",), env={"X": "1", "Y": "1"})
    sent = order(server=server, extra_args=("--b",), environment={"X": "2"})
    assert sent["command"][-2:] == ["--a", "--b"]
    assert (sent["environment"]["X"], sent["environment"]["Y"]) == ("2", "1")
    sent = order(entrypoint=("/opt/vllm",), command=("serve", "m"))
    assert (sent["entrypoint"], sent["command"]) == (["/opt/vllm"], ["serve", "m"])


def test_labels_say_whose_it_is() -> None:
    spec = ContainerSpec(server=SERVER)
    assert container_order(spec, 4000, keep=True)["labels"] == {
        "vllm-unified.fingerprint": container_fingerprint(spec),
        "vllm-unified.model": "org/model",
        "vllm-unified.port": "4000",
        "vllm-unified.keep": "true",
    }


def test_a_fingerprint_is_of_the_whole_spec_in_whatever_order() -> None:
    one = ContainerSpec(server=SERVER, environment={"a": "1", "b": "2"})
    same = ContainerSpec(server=SERVER, environment={"b": "2", "a": "1"})
    assert container_fingerprint(one) == container_fingerprint(same)
    assert container_name(one) == f"vllm-unified-{container_fingerprint(one)}"
    others = [
        msgspec.structs.replace(one, server=msgspec.structs.replace(SERVER, api_key="other")),
        msgspec.structs.replace(one, environment={"a": "1"}),
        msgspec.structs.replace(one, image="other"),
    ]
    assert len({container_fingerprint(each) for each in [one, *others]}) == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"gpus": 0}, "gpus: 0"),
        ({"gpus": ()}, "gpus: "),
        ({"image": "two words"}, "image"),
        ({"image": ""}, "image"),
        ({"name": "no/slash"}, "name"),
        ({"shm_size": "much"}, "shm_size"),
        ({"shm_size": "1g", "ipc_host": True}, "contradict"),
        ({"network": "none"}, "network"),
        ({"docker_url": "/var/run/docker.sock"}, "docker_url"),
        ({"volumes": {"/a": "relative"}}, "volumes"),
        ({"volumes": {"/a": "/b:rx"}}, "volumes"),
        ({"ports": 0}, "ports: 0"),
        ({"ports": 1, "server": ServerSpec(port=2)}, "keep one"),
        ({"extra_args": ("--api-key=x",)}, "process list"),
        ({"command": ("--api_key", "x")}, "process list"),
        ({"environment": {"VLLM_API_KEY": "x"}}, "VLLM_API_KEY"),
    ],
)
def test_what_cannot_work_is_told_at_once(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        ContainerSpec(**fields)


def test_files_may_hold_a_spec() -> None:
    text = b'{"gpus": ["0"], "server": {"model": "m"}, "environment": {"A": "1"}}'
    assert msgspec.json.decode(text, type=ContainerSpec).gpus == ("0",)
    with pytest.raises(msgspec.ValidationError, match="gpu_count"):
        msgspec.json.decode(b'{"gpu_count": 1}', type=ContainerSpec)


@pytest.mark.parametrize(
    ("docker_url", "host"),
    [
        (None, None),
        ("unix:///var/run/docker.sock", None),
        ("tcp://127.0.0.1:2375", None),
        ("tcp://gpu1:2376", "gpu1"),
        ("ssh://me@gpu2", "gpu2"),
    ],
)
def test_an_engine_is_here_or_elsewhere(docker_url: str | None, host: str | None) -> None:
    assert engine_host(docker_url) == host


def test_a_server_on_another_machine_must_listen_for_others() -> None:
    assert reachable_host("0.0.0.0", None) == "127.0.0.1"
    assert reachable_host("0.0.0.0", "gpu1") == "gpu1"
    assert reachable_host("10.0.0.5", "gpu1") == "10.0.0.5"
    with pytest.raises(ConfigurationError, match="only that machine"):
        reachable_host("127.0.0.1", "gpu1")
