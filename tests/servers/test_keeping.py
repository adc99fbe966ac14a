"""A vLLM that dies, hangs, or does not start any more, and its supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.servers.conftest import IMPATIENT, Fakes, Followed, post
from tests.support.waiting import eventually
from vllm_unified.servers import LocalServer, launcher, running_servers

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("code", [0, 1])
async def test_it_is_started_again_whatever_its_exit_code(fakes: Fakes, code: int) -> None:
    async with await LocalServer.start(fakes.spec(max_restarts=3)) as server:
        url, pid = server.url, server.pid
        followed = Followed(server)
        await fakes.tell(server, "exit", code=code)
        await followed.changed()
        assert server.url == url
        assert server.pid != pid
        assert fakes.alive() == {server.pid}
        said = f"ended by itself (exit code {code}): EngineDeadError: the core died"
        assert any(said in line for line in followed.said)
        status = await server.status()
        assert (status.state, status.restarts, status.pid) == ("ready", 1, server.pid)
        assert said in status.last_exit
        [record] = running_servers()
        assert (record.pid, record.restarts, record.state) == (server.pid, 1, "ready")


@pytest.mark.parametrize("mode", ["core", "stray"])
async def test_a_killed_one_leaves_nothing_behind_when_it_is_back(fakes: Fakes, mode: str) -> None:
    async with await LocalServer.start(fakes.spec(mode, max_restarts=3)) as server:
        before = fakes.alive()
        followed = Followed(server)
        os.kill(server.pid, signal.SIGKILL)
        await followed.changed()
        assert len(before) == 2
        assert fakes.alive().isdisjoint(before)


async def test_the_limit_is_told_with_the_last_reason(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec("once", max_restarts=2)) as server:
        followed = Followed(server)
        await fakes.tell(server, "exit", code=0)
        assert await followed.over() == (
            "vLLM ended 3 times in a row; the last time it did not start: "
            "ValueError: no such weights"
        )
        assert len(fakes.pids()) == 3
        assert running_servers() == []


async def test_one_that_hangs_is_started_again(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "PACING", IMPATIENT)
    async with await LocalServer.start(fakes.spec(max_restarts=3)) as server:
        followed = Followed(server)
        await fakes.tell(server, "hang")
        await followed.changed()
        assert any("vLLM hung: no token for 1 s" in line for line in followed.said)


async def test_another_port_is_taken_only_if_the_old_one_is_gone(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec("core", max_restarts=3)) as server:
        url = server.url
        followed = Followed(server)
        async with await _take_the_port_of(server):
            await followed.changed()
            assert server.url != url


async def _take_the_port_of(server: LocalServer) -> asyncio.Server:
    """Listen where the server listened, as soon as it is dead."""
    port = int(server.url.rpartition(":")[2])
    os.kill(server.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while True:
            try:
                return await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0)


async def test_adapters_are_loaded_again_before_it_is_ready(fakes: Fakes, tmp_path: Path) -> None:
    (tmp_path / "poet").mkdir()
    (tmp_path / "gone").mkdir()
    async with await LocalServer.start(fakes.spec(max_restarts=3, enable_lora=True)) as server:
        followed = Followed(server)
        for name in ("poet", "gone"):
            body = {"lora_name": name, "lora_path": str(tmp_path / name)}
            await asyncio.to_thread(post, f"{server.url}/v1/load_lora_adapter", body)
        noted = await server.note_adapters()
        assert noted == {name: str(tmp_path / name) for name in ("poet", "gone")}
        assert running_servers()[0].adapters == noted
        (tmp_path / "gone").rmdir()
        await fakes.tell(server, "exit", code=1)
        await followed.changed()
        assert await server.note_adapters() == {"poet": str(tmp_path / "poet")}
        problem = f"the adapter 'gone' ({tmp_path / 'gone'}) cannot be loaded again: HTTP 404"
        assert any(problem in line for line in followed.said)
        assert problem in server.log_path.read_text()


async def test_a_client_that_joins_in_between_waits_until_it_is_back(fakes: Fakes) -> None:
    spec = fakes.spec(max_restarts=3, delay=0.3)
    async with await LocalServer.start(spec) as server:
        await fakes.tell(server, "exit", code=1)
        await eventually(lambda: len(fakes.pids()) == 2)
        async with await LocalServer.start(spec) as joined:
            assert joined.shared
            assert fakes.alive() == {joined.pid}


async def test_a_supervisor_that_is_killed_during_a_restart_leaves_nothing(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec("core", max_restarts=3, delay=0.3)) as server:
        [running] = running_servers()
        followed = Followed(server)
        os.kill(server.pid, signal.SIGKILL)
        await eventually(lambda: len(fakes.pids()) == 4)
        os.kill(running.supervisor_pid, signal.SIGKILL)
        assert await followed.over() == "the server's supervisor ended"
        await eventually(lambda: not fakes.alive() and running_servers() == [])


async def test_giving_up_the_last_lease_ends_a_restart(fakes: Fakes) -> None:
    server = await LocalServer.start(fakes.spec(max_restarts=3, delay=0.5))
    await fakes.tell(server, "exit", code=1)
    await eventually(lambda: len(fakes.pids()) == 2)
    await server.stop()
    assert not fakes.alive()
    assert running_servers() == []
