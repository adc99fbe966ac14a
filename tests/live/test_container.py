"""vLLM in a container, on a real container engine."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest

from tests.support.containers import Podman, podman
from tests.support.vllm import OWN_SERVERS
from vllm_unified.errors import (
    ContainerConflictError,
    ContainerEngineError,
    ImageNotFoundError,
)
from vllm_unified.servers import ContainerServer, ContainerSpec, ServerSpec, find_engine

pytestmark = [pytest.mark.live, pytest.mark.timeout(900), OWN_SERVERS]

KEY = "sk-container"
QUESTION = "What is the capital of France?"
LOADING = {"loading the model", "weights loaded, preparing memory", "warming up"}
"""Steps of a start. The log is looked at now and then: a quick one may be over by then."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Podman]:
    with podman() as made:
        yield made


@pytest.fixture(scope="module")
def spec(engine: Podman) -> ContainerSpec:
    installed = find_engine("cpu")
    assert installed is not None
    server = ServerSpec(served_model_name="container-test", api_key=KEY, max_model_len=1024)
    return engine.spec(installed, server)


async def test_the_life_of_a_server(engine: Podman, spec: ContainerSpec) -> None:
    said: list[str] = []
    server = ContainerServer(spec, progress=said.append)
    assert (await server.validate_container_capabilities()).problems == ()
    async with server.client() as vllm:
        began = time.monotonic()
        answer = await vllm.chat(QUESTION, max_tokens=20, temperature=0)
        took("the first answer, start included", began)
        assert "Paris" in answer.text
        assert not LOADING.isdisjoint(said)

        status = await server.get_container_status()
        assert (status.state, status.health, status.model) == ("running", "ok", "container-test")
        assert status.id is not None
        assert "Resolved architecture" in await server.get_container_logs(1000)
        assert KEY not in engine.run("top", status.id, "args")
        assert KEY not in await server.get_container_logs(10_000)

        following = asyncio.create_task(server.follow())
        began = time.monotonic()
        await asyncio.to_thread(engine.run, "kill", "--signal", "KILL", status.id)
        answer = await vllm.chat(QUESTION, max_tokens=20, temperature=0)
        took("the next answer after SIGKILL", began)
        assert "Paris" in answer.text
        after = await server.get_container_status()
        assert (after.restarts, after.url, after.health) == (1, status.url, "ok")
        assert "exit code 137" in after.last_exit

        began = time.monotonic()
        await server.restart_container()
        took("a restart", began)
        assert (await vllm.chat(QUESTION, max_tokens=20, temperature=0)).text == answer.text

        began = time.monotonic()
        await server.stop_container()
        took("the stop", began)
        assert await following == "the container was stopped"
        assert engine.run("ps", "--all", "--quiet") == ""


async def test_a_missing_image_is_named(engine: Podman, spec: ContainerSpec) -> None:
    server = ContainerServer(msgspec.structs.replace(spec, image="localhost/none:1"))
    with pytest.raises(ImageNotFoundError, match="docker pull localhost/none:1"):
        await server.start_container()
    assert engine.run("ps", "--all", "--quiet") == ""


async def test_a_taken_port_is_told(engine: Podman, spec: ContainerSpec) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = ContainerServer(msgspec.structs.replace(spec, ports=taken.getsockname()[1]))
        with pytest.raises(ContainerConflictError, match="the port is taken"):
            await server.start_container()
    assert engine.run("ps", "--all", "--quiet") == ""


async def test_a_taken_name_is_told(engine: Podman, spec: ContainerSpec) -> None:
    engine.run("create", "--name", "mine", spec.image, "/bin/true")
    server = ContainerServer(msgspec.structs.replace(spec, name="mine"))
    with pytest.raises(ContainerConflictError, match="docker rm -f mine"):
        await server.start_container()
    engine.run("rm", "mine")


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
async def test_an_engine_that_is_not_there_is_told(engine: Podman, spec: ContainerSpec) -> None:
    server = ContainerServer(msgspec.structs.replace(spec, docker_url=f"{engine.url}.none"))
    with pytest.raises(ContainerEngineError, match="no container engine answers"):
        await server.start_container()


def took(what: str, began: float) -> None:
    print(f"{what}: {time.monotonic() - began:.1f} s")
