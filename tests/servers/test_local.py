"""LocalServer, its supervisor and its processes, with a fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.servers.conftest import Fakes
from tests.support.waiting import eventually, until
from vllm_unified.errors import EngineError, ServerStartError
from vllm_unified.servers import LocalServer, ServerSpec, remove_engine, running_servers
from vllm_unified.servers.cache import run_dir
from vllm_unified.servers.guard import living

if TYPE_CHECKING:
    from collections.abc import Iterator

HOLDER = """
import asyncio, sys
import msgspec
from vllm_unified.servers import LocalServer, ServerSpec

async def main():
    spec = msgspec.json.decode(sys.argv[1], type=ServerSpec)
    async with await LocalServer.start(spec) as server:
        print(server.pid, flush=True)
        await asyncio.sleep(300)

asyncio.run(main())
"""

KEY = "sk-very-secret"


def asked(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/whatever", timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def command_lines() -> list[bytes]:
    found = []
    for pid in living():
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


@pytest.fixture
def holder(fakes: Fakes) -> Iterator[subprocess.Popen[str]]:
    """Another program that uses the server; its first line is vLLM's process id."""
    spec = msgspec.json.encode(fakes.spec("core")).decode()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, spec], stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


async def test_starts_answers_and_leaves_nothing(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "for another server")
    said: list[str] = []
    async with await LocalServer.start(fakes.spec(delay=0.4), progress=said.append) as server:
        assert not server.shared
        assert server.model == "fake"
        assert server.pid in fakes.alive()
        assert "VLLM_API_KEY" not in (await asyncio.to_thread(asked, server.url))["env"]
        [running] = running_servers()
        assert (running.pid, running.url, running.state) == (server.pid, server.url, "ready")
        assert "at http://127.0.0.1:" in repr(server)
    assert not fakes.alive()
    assert running_servers() == []
    assert "reading the model's configuration" in said


async def test_a_second_user_joins_and_the_last_one_ends_it(fakes: Fakes) -> None:
    first = await LocalServer.start(fakes.spec())
    second = await LocalServer.start(fakes.spec())
    assert (second.shared, second.pid, second.url) == (True, first.pid, first.url)
    await first.stop()
    assert second.pid in fakes.alive()
    await second.stop()
    await second.stop()
    assert not fakes.alive()


async def test_two_starts_at_once_make_one_server(fakes: Fakes) -> None:
    spec = fakes.spec(delay=0.3)
    servers = await asyncio.gather(*(LocalServer.start(spec) for _ in range(4)))
    assert len({server.pid for server in servers}) == len(fakes.pids()) == 1
    assert sorted(server.shared for server in servers) == [False, True, True, True]
    await asyncio.gather(*(server.stop() for server in servers))
    assert not fakes.alive()


async def test_a_restart_waits_for_the_end_of_the_one_before(fakes: Fakes) -> None:
    first = await LocalServer.start(fakes.spec())
    stopping = asyncio.create_task(first.stop())
    second = await LocalServer.start(fakes.spec())
    await stopping
    assert second.pid in fakes.alive()
    await second.stop()
    assert len(running_servers()) == 0


async def test_the_key_is_nowhere_to_be_seen(fakes: Fakes) -> None:
    open_to_all, server = await asyncio.gather(
        LocalServer.start(fakes.spec()), LocalServer.start(fakes.spec(api_key=KEY))
    )
    async with open_to_all, server:
        assert open_to_all.url != server.url
        seen = await asyncio.to_thread(asked, server.url)
        assert seen["env"]["VLLM_API_KEY"] == KEY
        assert KEY not in str(seen["argv"])
        assert KEY not in repr(server)
        assert server.api_key == KEY
        assert not any(KEY.encode() in command for command in command_lines())
        written = [path for path in (fakes.root / "cache").rglob("*") if path.is_file()]
        assert len(written) > 3
        assert not any(KEY.encode() in path.read_bytes() for path in written)


async def test_a_failing_start_has_the_engines_words(fakes: Fakes) -> None:
    with pytest.raises(ServerStartError, match="ValueError: no such weights") as caught:
        await LocalServer.start(fakes.spec("fail"))
    assert "See root cause above" in caught.value.log
    assert "log" in str(caught.value.hint)
    await eventually(lambda: running_servers() == [])


async def test_a_missing_model_folder_is_named(fakes: Fakes) -> None:
    spec = msgspec.structs.replace(fakes.spec("fail"), model="/nope/model")
    with pytest.raises(ServerStartError, match="There is no folder /nope/model"):
        await LocalServer.start(spec)


async def test_a_start_has_a_deadline(fakes: Fakes) -> None:
    with pytest.raises(ServerStartError, match=r"not ready within 0\.5 s"):
        await LocalServer.start(fakes.spec("hang"), start_timeout=0.5)
    await eventually(lambda: not fakes.alive())


async def test_a_taken_port_is_replaced_by_another(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec("port")):
        assert len(fakes.pids()) == 2


async def test_a_given_port_is_not_replaced(fakes: Fakes) -> None:
    with pytest.raises(ServerStartError, match="Address already in use"):
        await LocalServer.start(fakes.spec("port", port=9))


async def test_cancelling_a_start_leaves_nothing(fakes: Fakes) -> None:
    start = asyncio.create_task(LocalServer.start(fakes.spec("hang")))
    await eventually(lambda: bool(fakes.alive()))
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await eventually(lambda: not fakes.alive() and running_servers() == [])


@pytest.mark.parametrize("steps", [0, 1, 4])
async def test_cancelling_a_start_at_any_time_leaves_nothing(fakes: Fakes, steps: int) -> None:
    start = asyncio.create_task(LocalServer.start(fakes.spec("hang")))
    await asyncio.sleep(0.08 * steps)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await eventually(lambda: not fakes.alive() and running_servers() == [])


@pytest.mark.parametrize("mode", ["core", "stray"])
async def test_a_child_that_ignores_sigterm_is_killed(fakes: Fakes, mode: str) -> None:
    async with await LocalServer.start(fakes.spec(mode)):
        assert len(fakes.alive()) == 2
    assert not fakes.alive()


async def test_the_end_of_vllm_is_told(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec("core")) as server:
        os.kill(server.pid, signal.SIGKILL)
        assert "ended by itself (exit code -9)" in await server.follow()
        assert not fakes.alive()
        assert running_servers() == []


async def test_stopping_ends_a_wait(fakes: Fakes) -> None:
    server = await LocalServer.start(fakes.spec())
    waiting = asyncio.create_task(server.follow())
    await asyncio.sleep(0)
    await server.stop()
    assert not fakes.alive()
    assert await waiting == "the server's supervisor ended"


async def test_a_terminated_supervisor_ends_its_server(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec()) as server:
        [running] = running_servers()
        os.kill(running.supervisor_pid, signal.SIGTERM)
        await server.follow()
        assert not fakes.alive()


async def test_a_killed_supervisor_leaves_nothing(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec("core")) as server:
        [running] = running_servers()
        os.kill(running.supervisor_pid, signal.SIGKILL)
        assert await server.follow() == "the server's supervisor ended"
        await eventually(lambda: not fakes.alive() and running_servers() == [])
    async with await LocalServer.start(fakes.spec()) as again:
        assert not again.shared


def test_a_killed_holder_leaves_nothing(fakes: Fakes, holder: subprocess.Popen[str]) -> None:
    assert holder.stdout is not None
    assert int(holder.stdout.readline()) in fakes.alive()
    holder.kill()
    until(lambda: not fakes.alive() and running_servers() == [])


async def test_an_interrupted_program_does_not_take_the_server_from_others(
    fakes: Fakes, holder: subprocess.Popen[str]
) -> None:
    assert holder.stdout is not None
    pid = int(await asyncio.to_thread(holder.stdout.readline))
    async with await LocalServer.start(fakes.spec("core")) as server:
        assert (server.shared, server.pid) == (True, pid)
        holder.send_signal(signal.SIGINT)
        await asyncio.to_thread(holder.wait, 10)
        assert pid in fakes.alive()


async def test_a_forked_child_holds_no_lease(fakes: Fakes) -> None:
    server = await LocalServer.start(fakes.spec())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        os.close(read)
        await server.stop()
        assert not fakes.alive()
    finally:
        os.close(write)
        await asyncio.to_thread(os.waitpid, child, 0)


async def test_a_server_that_was_never_stopped_is_warned_about(fakes: Fakes) -> None:
    server = await LocalServer.start(fakes.spec())
    with pytest.warns(ResourceWarning, match="was never stopped"):
        del server
    await eventually(lambda: not fakes.alive())


async def test_stale_records_are_removed(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec()):
        [record] = run_dir().glob("*.json")
        left = record.read_bytes()
    stale = record.with_name("0123456789abcdef.json")
    stale.write_bytes(left)
    assert running_servers() == []
    assert not stale.exists()


async def test_an_engine_in_use_is_not_removed(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec()):
        with pytest.raises(EngineError, match="run on the engine"):
            remove_engine("cpu-0.32.0")
    remove_engine("cpu-0.32.0")
    assert not fakes.engine.exists()


async def test_without_an_engine_and_without_leave_to_install(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_engine("cpu-0.32.0")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EngineError, match="no vLLM on this machine"):
        await LocalServer.start(fakes.spec(), install=False)


async def test_other_systems_are_told_so(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(EngineError, match="on Linux only"):
        await LocalServer.start(ServerSpec())


async def test_a_long_cache_path_still_has_a_socket(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = fakes.root / ("d" * 100)
    (fakes.root / "cache").rename(deep)
    monkeypatch.setenv("VLLM_UNIFIED_CACHE", str(deep))
    async with await LocalServer.start(fakes.spec()) as server:
        assert server.pid in living()
