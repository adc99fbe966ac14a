"""ContainerServer, against a small Docker engine whose containers are simulators."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.clients import KINDS, Kind, make_client
from tests.support.fake_docker import IMAGE, FakeDocker, fake_docker
from tests.support.waiting import eventually
from vllm_unified.errors import (
    ConfigurationError,
    ConnectError,
    ContainerConflictError,
    ContainerEngineError,
    ContainerError,
    ImageNotFoundError,
    ServerError,
    ServerStartError,
)
from vllm_unified.servers import ContainerServer, ContainerSpec, ServerSpec
from vllm_unified.servers.restarts import Pacing

KEY = "sk-very-secret"
HOLDER = """
import asyncio, sys
import msgspec
from vllm_unified.servers import ContainerServer, ContainerSpec

async def main():
    async with ContainerServer(msgspec.json.decode(sys.argv[1], type=ContainerSpec)) as server:
        print(server.url, flush=True)
        await asyncio.sleep(300)

asyncio.run(main())
"""
PACING = Pacing(first_pause=0.02, longest_pause=0.05)


# Docker's SDK leaves the socket open of a connection that it cannot make.
unconnected = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_UNIFIED_CACHE", str(tmp_path / "cache"))
    for module in ("run", "keeper"):
        monkeypatch.setattr(f"vllm_unified.servers.containers.{module}._POLL", 0.02)


@pytest.fixture
def docker() -> Iterator[FakeDocker]:
    with fake_docker() as engine:
        yield engine


def spec_for(docker: FakeDocker, *, max_restarts: int = 3, **fields: Any) -> ContainerSpec:
    server = ServerSpec(model="org/model", api_key=KEY, max_restarts=max_restarts)
    return ContainerSpec(
        **{"server": server, "image": IMAGE, "docker_url": docker.url, "gpus": None, **fields}
    )


def server_for(docker: FakeDocker, *, keep: bool = False, **fields: Any) -> ContainerServer:
    return ContainerServer(spec_for(docker, **fields), keep=keep, pacing=PACING, start_timeout=30)


async def test_it_starts_answers_and_is_removed(docker: FakeDocker) -> None:
    server = server_for(docker)
    async with server:
        status = await server.get_container_status()
        assert (status.state, status.health, status.restarts) == ("running", "ok", 0)
        assert status.url == server.url == f"http://127.0.0.1:{docker.only.port}"
        assert status.name == docker.only.name
        assert status.started_at == pytest.approx(1795377600.123456)
        assert "Resolved architecture" in await server.get_container_logs()
        async with server.client(stop=False) as vllm:
            assert (await vllm.generate("Hello", max_tokens=3)).text
    assert docker.containers == {}
    after = await server.status()
    assert (after.state, after.health, after.name) == ("absent", "stopped", status.name)


async def test_the_engine_gets_the_whole_order(docker: FakeDocker, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    fields: dict[str, Any] = {"gpus": ("0", "1"), "volumes": {"/data": "/inside:ro"}}
    server = ServerSpec(model=str(model), api_key=KEY)
    async with server_for(docker, server=server, **fields):
        sent = docker.only.order
        environment = docker.only.environment
    host = sent["HostConfig"]
    assert host["Binds"] == [f"{model}:{model}:ro", "/data:/inside:ro"]
    [request] = host["DeviceRequests"]
    assert (request["DeviceIDs"], request["Capabilities"]) == (["0", "1"], [["gpu"]])
    assert host["ShmSize"] == 8 * 2**30
    assert host["PortBindings"]["8000/tcp"][0]["HostIp"] == "127.0.0.1"
    assert (environment["VLLM_API_KEY"], environment["HF_HUB_OFFLINE"]) == (KEY, "1")
    assert KEY not in str({**sent, "Env": None})


async def test_the_links_of_a_model_lead_somewhere(docker: FakeDocker, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "abc").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../blobs/abc")
    async with server_for(docker, server=ServerSpec(model=str(snapshot))):
        binds = docker.only.order["HostConfig"]["Binds"]
    assert binds == [f"{snapshot}:{snapshot}:ro", f"{blobs}:{blobs}:ro"]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_first_request_starts_it_once(docker: FakeDocker, kind: Kind) -> None:
    said: list[str] = []
    server = ContainerServer(spec_for(docker), progress=said.append)
    assert docker.calls == []
    vllm = make_client(kind, **server._client_settings({}, stop=True))
    async with vllm:
        assert docker.calls == []
        results = await asyncio.gather(*(vllm.generate("Hello", max_tokens=2) for _ in range(5)))
        assert all(result.text for result in results)
        assert docker.only.starts == 1
    assert docker.containers == {}
    assert said[0] == f"making a container of {IMAGE}"


def test_a_blocking_client_starts_and_stops_it(docker: FakeDocker) -> None:
    with server_for(docker).blocking_client() as vllm:
        assert vllm.generate("Hello", max_tokens=2).text
        assert docker.only.status == "running"
    assert docker.containers == {}


async def test_a_client_may_leave_it(docker: FakeDocker) -> None:
    server = server_for(docker)
    async with server.client(stop=False) as vllm:
        await vllm.generate("Hello", max_tokens=1)
    assert docker.only.status == "running"
    await server.stop()
    assert docker.containers == {}


async def test_other_servers_are_reached_without_a_container(docker: FakeDocker) -> None:
    async with server_for(docker).client(max_retries=0) as vllm:
        with pytest.raises(ConnectError):
            await vllm.make_request("http://127.0.0.1:1", "Hello")
    assert docker.calls == []


async def test_a_request_that_gives_up_does_not_end_the_start(docker: FakeDocker) -> None:
    docker.held.clear()
    async with server_for(docker).client() as vllm:
        first = asyncio.create_task(vllm.generate("Hello", max_tokens=1))
        await eventually(lambda: bool(docker.containers))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        docker.held.set()
        assert (await vllm.generate("Hello", max_tokens=1)).text
        assert docker.only.starts == 1


@pytest.mark.parametrize("how", ["killed", "removed"])
async def test_one_that_is_ended_from_outside_comes_back(docker: FakeDocker, how: str) -> None:
    back: list[ContainerServer] = []
    said: list[str] = []
    async with server_for(docker) as server, server.client(stop=False) as vllm:
        following = asyncio.create_task(server.follow(back.append, progress=said.append))
        await vllm.generate("Hello", max_tokens=1)
        url = server.url
        (docker.kill if how == "killed" else docker.remove)(docker.only)
        assert (await vllm.generate("Hello", max_tokens=1)).text
        await eventually(lambda: back == [server])
        status = await server.status()
        assert (status.restarts, status.health, server.url) == (1, "ok", url)
        words = "exit code 137" if how == "killed" else "was removed"
        assert words in status.last_exit
        assert words in said[0]
    assert await following == "the container was stopped"


async def test_one_that_somebody_else_restarted_is_waited_for(
    docker: FakeDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_unified.servers.containers.keeper._POLL", 60.0)
    async with server_for(docker) as server:
        await server.ready(doubted=True)
        docker.kill(docker.only)
        docker.start(docker.only)
        await server.ready(doubted=True)
        status = await server.status()
        assert (status.restarts, docker.only.starts) == (1, 2)
        assert "somebody else" in status.last_exit


async def test_one_that_hangs_is_started_again(docker: FakeDocker) -> None:
    pacing = Pacing(first_pause=0.02, look_every=0.02, hung_after=0.5)
    async with ContainerServer(spec_for(docker), pacing=pacing) as server:
        process = docker.only.process
        assert process is not None
        process.hang()
        await eventually(lambda: docker.only.starts == 2, 10)
        await server.ready()
        status = await server.status()
        assert status.restarts >= 1
        assert "hung: no token for 0.5 s" in status.last_exit


async def test_after_so_many_ends_in_a_row_it_is_given_up(docker: FakeDocker) -> None:
    async with server_for(docker, max_restarts=2) as server:
        following = asyncio.create_task(server.follow())
        docker.fail_starts = 9
        docker.kill(docker.only)
        reason = await following
        assert "ended 3 times in a row; the last time" in reason
        assert "ValueError: no such weights" in reason
        assert docker.only.starts == 3
        async with server.client(stop=False) as vllm:
            with pytest.raises(ServerStartError, match="3 times in a row"):
                await vllm.generate("Hello")
        assert await server.follow() == reason
        docker.fail_starts = 0
        await server.start_container()
        assert (await server.status()).health == "ok"


async def test_a_restart_keeps_container_and_address(docker: FakeDocker) -> None:
    async with server_for(docker) as server:
        id, url = docker.only.id, server.url
        await server.restart_container()
        assert (docker.only.id, docker.only.starts, server.url) == (id, 2, url)
        assert (await server.status()).restarts == 0
    with pytest.raises(ServerError, match="does not run"):
        await server.restart()


async def test_it_can_be_stopped_and_started_again(docker: FakeDocker) -> None:
    server = server_for(docker)
    await server.stop_container()
    async with server.client() as vllm:
        await vllm.generate("Hello", max_tokens=1)
        await server.stop_container(timeout=1)
        assert docker.containers == {}
        assert (await vllm.generate("Hello", max_tokens=1)).text


async def test_one_that_a_killed_program_left_is_taken_over(docker: FakeDocker) -> None:
    spec = spec_for(docker)
    with subprocess.Popen(  # noqa: ASYNC220 - it starts at once
        [sys.executable, "-c", HOLDER, msgspec.json.encode(spec).decode()],
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        url = (await asyncio.to_thread(holder.stdout.readline)).strip()
        async with ContainerServer(spec) as beside:
            assert (beside.adopted, beside.url) == (True, url)
        assert docker.only.status == "running", "its maker lives"
        holder.kill()
    async with ContainerServer(spec) as server:
        assert (server.adopted, server.url, docker.only.starts) == (True, url, 1)
    assert docker.containers == {}


async def test_one_that_ended_meanwhile_is_started_again(docker: FakeDocker) -> None:
    async with server_for(docker, keep=True) as left:
        pass
    assert docker.only.order["Labels"]["vllm-unified.keep"] == "true"
    docker.kill(docker.only)
    async with server_for(docker) as server:
        assert (server.adopted, server.url, docker.only.starts) == (True, left.url, 2)
    assert docker.only.status == "running", "it was meant to be kept"
    await server.start_container()
    await server.end()
    assert docker.containers == {}


async def test_two_programs_share_one_and_the_first_ends_it(docker: FakeDocker) -> None:
    async with server_for(docker) as first:
        async with server_for(docker) as second:
            assert (first.adopted, second.adopted) == (False, True)
            assert first.url == second.url
        assert docker.only.status == "running"
    assert docker.containers == {}


async def test_a_missing_image_is_named_with_what_to_do(docker: FakeDocker) -> None:
    with pytest.raises(ImageNotFoundError, match="docker pull org/none:2"):
        await server_for(docker, image="org/none:2").start_container()
    with pytest.raises(ImageNotFoundError, match="pull access denied"):
        await ContainerServer(spec_for(docker, image="org/none:2"), pull=True).start_container()
    assert docker.containers == {}


async def test_an_image_is_pulled(docker: FakeDocker) -> None:
    docker.pullable.add("org/some:2")
    said: list[str] = []
    spec = spec_for(docker, image="org/some:2")
    async with ContainerServer(spec, pull=True, progress=said.append):
        pass
    assert [message for message in said if "%" in message] == [
        f"pulling org/some:2: {percent} % of what is known to come" for percent in (25, 100)
    ]


async def test_a_taken_port_is_replaced_by_another(docker: FakeDocker) -> None:
    docker.taken_ports = 1
    server = server_for(docker)
    before = server.url
    async with server.client() as vllm:
        assert (await vllm.generate("Hello", max_tokens=1)).text
        assert server.url != before
        assert len(docker.containers) == 1


async def test_a_port_that_was_chosen_is_not_replaced(docker: FakeDocker) -> None:
    docker.taken_ports = 1
    with pytest.raises(ContainerConflictError, match="ports=None"):
        await server_for(docker, ports=free_port()).start_container()
    assert docker.containers == {}


async def test_a_name_that_another_container_has_is_told(docker: FakeDocker) -> None:
    async with server_for(docker, name="mine"):
        with pytest.raises(
            ContainerConflictError, match="one of ours, with another spec"
        ) as caught:
            await server_for(docker, name="mine", shm_size="1g").start_container()
        assert "docker rm -f mine" in str(caught.value)
        assert docker.only.status == "running"


async def test_a_failing_start_has_the_engines_words_and_leaves_nothing(docker: FakeDocker) -> None:
    docker.fail_starts = 1
    with pytest.raises(ServerStartError, match="ValueError: no such weights") as caught:
        await server_for(docker).start_container()
    assert "no such weights" in caught.value.log
    assert docker.containers == {}


async def test_a_start_has_a_deadline(docker: FakeDocker) -> None:
    docker.silent = True
    server = ContainerServer(spec_for(docker), start_timeout=0.2)
    with pytest.raises(ServerStartError, match=r"not ready within 0\.2 s"):
        await server.start_container()
    assert docker.containers == {}


async def test_cancelling_the_start_removes_the_container(docker: FakeDocker) -> None:
    docker.silent = True
    start = asyncio.create_task(server_for(docker).start_container())
    await eventually(lambda: bool(docker.containers) and docker.only.status == "running")
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert docker.containers == {}


async def test_cancelling_while_it_is_made_removes_the_container(docker: FakeDocker) -> None:
    docker.held.clear()
    start = asyncio.create_task(server_for(docker).start_container())
    await eventually(lambda: bool(docker.containers))
    start.cancel()
    asyncio.get_running_loop().call_later(0.05, docker.held.set)
    with pytest.raises(asyncio.CancelledError):
        await start
    assert docker.containers == {}


async def test_stopping_ends_a_start_and_tells_who_waits(docker: FakeDocker) -> None:
    docker.silent = True
    server = server_for(docker)
    start = asyncio.create_task(server.start_container())
    await eventually(lambda: bool(docker.containers) and docker.only.status == "running")
    await server.stop()
    with pytest.raises(ServerError, match="stopped while it started"):
        await start
    assert docker.containers == {}


@unconnected
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "no container engine answers"),
        (PermissionError(13, "Permission denied"), "permission denied"),
    ],
)
async def test_an_engine_that_cannot_be_used(
    error: OSError | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if error is not None:  # root may do everything
        monkeypatch.setattr("docker.transport.unixconn.UnixHTTPConnection.connect", _raising(error))
    url = f"unix://{tmp_path}/none.sock"
    server = ContainerServer(ContainerSpec(docker_url=url, server=ServerSpec(model="m")))
    with pytest.raises(ContainerEngineError, match=words) as caught:
        await server.start_container()
    assert url in str(caught.value)
    found = await server.validate_container_capabilities()
    assert not found.ok
    assert words in found.problems[0]


def _raising(error: OSError) -> Any:
    def connect(connection: object) -> None:
        raise error

    return connect


async def test_without_the_sdk_the_extra_is_named(
    docker: FakeDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(ConfigurationError, match=r"vllm-unified\[docker\]"):
        await server_for(docker).start_container()


@unconnected
async def test_an_engine_that_goes_away_for_a_while_is_no_end(docker: FakeDocker) -> None:
    path = docker.url.removeprefix("unix://")
    async with server_for(docker) as server:
        os.rename(path, f"{path}.away")
        with pytest.raises(ContainerEngineError):
            await server.status()
        os.rename(f"{path}.away", path)
        docker.kill(docker.only)
        await eventually(lambda: docker.only.starts == 2)
        await server.ready()
        assert (await server.status()).health == "ok"


async def test_no_error_shows_the_key(docker: FakeDocker) -> None:
    docker.images.clear()
    with pytest.raises(ContainerError) as caught:
        await server_for(docker).start_container()
    error: BaseException | None = caught.value
    shown = "".join(traceback.format_exception(caught.value))
    while error is not None:
        response = getattr(error, "response", None)
        shown += str(vars(error)) + str(getattr(response, "request", None))
        assert getattr(response, "request", None) is None
        error = error.__cause__ or error.__context__
    assert KEY not in shown


async def test_what_is_in_the_way_is_told_beforehand(docker: FakeDocker, tmp_path: Path) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        fields: dict[str, Any] = {"gpus": "all", "image": "org/none:2", "ports": port}
        server = server_for(docker, volumes={str(tmp_path / "nope"): "/x"}, **fields)
        found = await server.validate_container_capabilities()
    assert (found.engine, found.api_version, found.gpu_runtime) == ("Docker 27.0.0", "1.45", False)
    assert (found.image_present, found.port_free, found.memory_bytes) == (False, False, 2**34)
    for words in ("NVIDIA Container Toolkit", "docker pull org/none:2", f"port {port}", "no /"):
        assert sum(words in problem for problem in found.problems) == 1
    docker.runtimes["nvidia"] = {}
    fine = await server_for(docker, gpus="all").validate_container_capabilities()
    assert (fine.ok, fine.gpu_runtime) == (True, True)


async def test_a_name_in_the_way_is_told_beforehand(docker: FakeDocker) -> None:
    async with server_for(docker, name="mine") as server:
        assert (await server.validate_container_capabilities()).ok
        other = server_for(docker, name="mine", shm_size="1g")
        [problem] = (await other.validate_container_capabilities()).problems
        assert "docker rm -f mine" in problem


async def test_a_stop_ends_a_restart_too(docker: FakeDocker) -> None:
    server = server_for(docker)
    await server.start_container()
    docker.silent = True
    restarts = [asyncio.create_task(server.restart()) for _ in range(2)]
    await eventually(lambda: docker.only.starts == 2)
    await server.stop()
    for restart in restarts:
        with pytest.raises(ServerError, match="stopped while it started"):
            await restart
    assert docker.containers == {}


async def test_requests_wait_for_a_restart(docker: FakeDocker) -> None:
    async with server_for(docker) as server, server.client(stop=False) as vllm:
        docker.held.clear()
        said: list[str] = []
        restart = asyncio.create_task(server.restart(progress=said.append))
        await eventually(lambda: docker.only.status == "exited")
        answer = asyncio.create_task(vllm.generate("Hello", max_tokens=1))
        docker.held.set()
        await restart
        assert (await answer).text
        assert said[0] == "restarting vLLM in its container"
        assert docker.only.starts == 2


def test_one_that_was_never_stopped_is_told(docker: FakeDocker) -> None:
    async def leave_it() -> None:
        await server_for(docker).start_container()

    def forget_it() -> None:
        asyncio.run(leave_it())
        gc.collect()

    with pytest.warns(ResourceWarning, match="was never stopped"):
        forget_it()
    assert docker.only.status == "running"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
