"""What a supervisor can be told: detach, attach, restart, suspend, end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest

from tests.servers.conftest import Fakes, Followed
from tests.support.waiting import eventually
from vllm_unified.errors import NoSuchServerError, ServerError, ServerStartError
from vllm_unified.servers import LocalServer, RunningServer, running_servers
from vllm_unified.servers.cache import run_dir
from vllm_unified.servers.finding import chosen
from vllm_unified.servers.records import control_path
from vllm_unified.servers.spec import ServerSpec

if TYPE_CHECKING:
    from pathlib import Path

KEY = "sk-very-secret"

STARTER = """
import asyncio, sys
import msgspec
from vllm_unified.servers import LocalServer, ServerSpec

async def main():
    spec = msgspec.json.decode(sys.argv[1], type=ServerSpec)
    async with await LocalServer.start(spec, detached=True) as server:
        print(server.pid)

asyncio.run(main())
"""
SUSPENDER = """
import asyncio
from vllm_unified.servers import LocalServer

async def main():
    async with await LocalServer.attach() as server:
        await server.suspend()
        print("suspended", flush=True)
        await asyncio.sleep(300)

asyncio.run(main())
"""


# Detach and attach


async def test_a_detached_server_outlives_its_starter_and_is_found_again(fakes: Fakes) -> None:
    spec = fakes.spec("core", api_key=KEY, max_restarts=1)
    encoded = msgspec.json.encode(spec).decode()
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", STARTER, encoded],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    [record] = running_servers()
    assert record.detached
    assert record.pid == int(done.stdout)
    server = await LocalServer.attach(record.url)
    assert (server.spec.api_key, server.api_key) == (KEY, KEY)
    assert (server.fingerprint, server.pid, server.shared) == (record.fingerprint, record.pid, True)
    assert server.engine.name == "cpu-0.32.0"
    assert (await server.status()).holders == 1
    await server.stop()
    assert record.pid in fakes.alive()
    again = await LocalServer.attach()
    assert (await again.status()).holders == 1
    await again.end()
    assert not fakes.alive()
    assert running_servers() == []


async def test_a_detached_server_is_kept_alive_with_nobody_there(fakes: Fakes) -> None:
    server = await LocalServer.start(fakes.spec(max_restarts=1), detached=True)
    await fakes.tell(server, "exit", code=0)
    await server.stop()
    await eventually(lambda: len(fakes.alive()) == 1 and len(fakes.pids()) == 2)
    await (await LocalServer.attach()).end()


async def test_a_server_that_was_joined_can_be_detached(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec()) as first:
        joined = await LocalServer.start(fakes.spec(), detached=True)
        assert joined.pid == first.pid
        await joined.stop()
        assert (await first.status()).detached
    assert fakes.alive() == {first.pid}
    await (await LocalServer.attach()).end()


async def test_cancelling_a_detached_start_leaves_nothing(fakes: Fakes) -> None:
    start = asyncio.create_task(LocalServer.start(fakes.spec("hang"), detached=True))
    await eventually(lambda: bool(fakes.alive()))
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await eventually(lambda: not fakes.alive() and running_servers() == [])


async def test_sigterm_ends_a_detached_server(fakes: Fakes) -> None:
    await (await LocalServer.start(fakes.spec("core"), detached=True)).stop()
    [record] = running_servers()
    os.kill(record.supervisor_pid, signal.SIGTERM)
    await eventually(lambda: not fakes.alive() and running_servers() == [])


async def test_nobody_else_can_ask_for_the_key(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec(api_key=KEY)) as server:
        sockets = [*run_dir().glob("*.ctl"), *run_dir().glob("*.sock")]
        assert len(sockets) == 2
        assert all(path.stat().st_mode & 0o077 == 0 for path in [run_dir(), *sockets])
        [record] = run_dir().glob("*.json")
        assert KEY not in record.read_text()
        [running] = running_servers()
        assert running.spec.api_key is None
        assert set(running.spec.env.values()) == {"..."}
        assert running.spec.served_model_name == server.model


async def test_attaching_to_nothing_says_what_runs(fakes: Fakes) -> None:
    with pytest.raises(NoSuchServerError, match="no server runs on this machine"):
        await LocalServer.attach()
    async with await LocalServer.start(fakes.spec()) as server:
        with pytest.raises(NoSuchServerError, match="'nope'") as caught:
            await LocalServer.attach("nope")
        assert server.url in str(caught.value.hint)


# Which one is meant


def record(fingerprint: str, port: int, model: str, *aliases: str, pid: int = 1) -> RunningServer:
    return RunningServer(
        fingerprint=fingerprint,
        state="ready",
        supervisor_pid=pid + 1000,
        pid=pid,
        url=f"http://127.0.0.1:{port}",
        model=model,
        engine="cpu-1",
        log_path="/log",
        started_at=0.0,
        spec=ServerSpec(model="m", aliases=aliases),
    )


ONE = record("aaaa1111", 8000, "one", "first", pid=10)
TWO = record("aaaa2222", 8001, "two", pid=20)
TWIN = record("bbbb3333", 8002, "two", pid=30)


@pytest.mark.parametrize(
    ("where", "meant"),
    [
        ("http://127.0.0.1:8000", ONE),
        ("http://localhost:8001/", TWO),
        ("localhost:8001", TWO),
        ("one", ONE),
        ("first", ONE),
        ("20", TWO),
        ("1030", TWIN),
        ("aaaa2", TWO),
        ("BBBB", TWIN),
    ],
)
def test_a_server_is_meant_by(where: str, meant: RunningServer) -> None:
    assert chosen(where, [ONE, TWO, TWIN]) is meant


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("two", "means more than one"),
        ("aaaa", "means more than one"),
        ("aaa", "is meant by 'aaa'"),
        ("http://127.0.0.1:9", "is meant by"),
        ("http://[", "is meant by"),
        ("", "is meant by"),
        (None, "More than one runs"),
    ],
)
def test_what_means_none_or_several_is_refused(where: str | None, words: str) -> None:
    with pytest.raises(NoSuchServerError, match=words) as caught:
        chosen(where, [ONE, TWO, TWIN])
    assert all(server.fingerprint in str(caught.value.hint) for server in (ONE, TWO, TWIN))


# Restart and end


async def test_a_restart_is_done_when_it_is_ready_and_counts_as_none(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec("core")) as server:
        before, followed, said = fakes.alive(), Followed(server), list[str]()
        await server.restart(progress=said.append)
        assert fakes.alive().isdisjoint(before)
        assert server.pid in fakes.alive()
        await followed.changed()
        assert followed.changes == [(server.url, server.pid)]
        assert "starting vLLM" in said
        status = await server.status()
        assert (status.restarts, status.last_exit, status.state) == (0, "", "ready")


async def test_a_restart_that_fails_says_why(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec("once")) as server:
        with pytest.raises(ServerStartError, match="did not start: ValueError: no such") as caught:
            await server.restart()
        assert "See root cause above" in caught.value.log
        assert not fakes.alive()


async def test_ending_it_is_told_to_all(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec("core")) as server:
        followed = Followed(server)
        other = await LocalServer.attach(server.model)
        await other.end()
        assert not fakes.alive()
        assert await followed.over() == f"stopped by process {os.getpid()}"
        with pytest.raises(ServerError, match="supervisor has ended"):
            await server.status()


async def test_the_status_is_of_the_whole_server(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec("core")) as server:
        status = await server.status()
        assert (status.url, status.pid, status.model) == (server.url, server.pid, server.model)
        assert (status.holders, status.detached, status.health) == (1, False, "ok")
        assert status.uptime > 0
        assert status.memory > 10 << 20
        assert status.supervisor_pid == running_servers()[0].supervisor_pid


async def test_the_logs_are_the_last_lines(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec()) as server:
        assert server.logs(1).endswith("Resolved architecture: Fake")
        assert server.logs(0) == ""


async def test_what_is_no_command_is_refused(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec()) as server:
        reader, writer = await asyncio.open_unix_connection(control_path(server.fingerprint))
        writer.write(b'{"do": "dance"}\n')
        assert b"dance" in await reader.readline()
        writer.write(b"\xff" * 200_000)
        assert await reader.read() == b""
        writer.close()
        assert (await server.status()).state == "ready"


# Suspend and resume


async def test_suspended_it_is_gone_and_resumed_it_is_back(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec("core")) as server:
        url, pid = server.url, server.pid
        await server.suspend()
        assert not fakes.alive()
        status = await server.status()
        assert (status.state, status.health, status.restarts) == ("suspended", "suspended", 0)
        assert running_servers()[0].state == "suspended"
        with pytest.raises(ServerError, match="suspended already"):
            await server.suspend()
        with pytest.raises(ServerError, match="is suspended"):
            await server.restart()
        await server.resume()
        assert server.url == url
        assert server.pid != pid
        assert server.pid in fakes.alive()


async def test_suspending_waits_for_requests_but_not_for_ever(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec()) as server:
        await fakes.tell(server, "busy", running=1)
        suspending = asyncio.create_task(server.suspend(drain_timeout=30))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(suspending), 0.4)
        assert server.pid in fakes.alive()
        await fakes.tell(server, "busy", running=0)
        await suspending
        assert not fakes.alive()
        await server.resume()
        await fakes.tell(server, "busy", running=1)
        await server.suspend(drain_timeout=0.2)
        assert not fakes.alive()


async def test_a_server_whose_suspender_dies_is_resumed(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec()) as server:
        followed = Followed(server)
        with subprocess.Popen(  # noqa: ASYNC220 - it starts at once
            [sys.executable, "-c", SUSPENDER], stdout=subprocess.PIPE, text=True
        ) as suspender:
            assert suspender.stdout is not None
            assert await asyncio.to_thread(suspender.stdout.readline) == "suspended\n"
            assert not fakes.alive()
            suspender.kill()
        await followed.changed()
        assert fakes.alive() == {server.pid}


async def test_a_suspender_that_is_cancelled_leaves_a_running_server(fakes: Fakes) -> None:
    async with await LocalServer.start(fakes.spec()) as server:
        await fakes.tell(server, "busy", running=1)
        suspending = asyncio.create_task(server.suspend())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(suspending), 0.2)
        followed = Followed(server)
        suspending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await suspending
        await fakes.tell(server, "busy", running=0)
        await followed.changed()
        assert fakes.alive() == {server.pid}


async def test_stopping_a_suspended_server_ends_all(fakes: Fakes) -> None:
    server = await LocalServer.start(fakes.spec())
    await server.suspend()
    await server.stop()
    assert not fakes.alive()
    assert running_servers() == []


# Hand over


async def test_all_who_hold_it_go_to_the_successor(fakes: Fakes) -> None:
    old, new = await asyncio.gather(
        LocalServer.start(fakes.spec(name="old")), LocalServer.start(fakes.spec(name="new"))
    )
    other = await LocalServer.attach(old.url)
    async with old, new, other:
        followed, before = Followed(other), old.pid
        await old.hand_over(new)
        assert fakes.alive() == {new.pid}
        assert followed.changes == [(new.url, new.pid)]
        assert (other.fingerprint, other.model, other.spec) == (new.fingerprint, "new", new.spec)
        assert (await new.status()).holders == 2
        assert before not in fakes.alive()
        assert [server.model for server in running_servers()] == ["new"]
        await new.stop()
        assert fakes.alive() == {other.pid}
    assert await followed.over() == "the server's supervisor ended"


async def test_requests_that_run_are_waited_for(fakes: Fakes) -> None:
    old, new = await asyncio.gather(
        LocalServer.start(fakes.spec(name="old")), LocalServer.start(fakes.spec(name="new"))
    )
    async with old, new:
        await fakes.tell(old, "busy", running=2)
        handing = asyncio.create_task(old.hand_over(new))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(handing), 0.4)
        assert old.pid in fakes.alive()
        await fakes.tell(old, "busy", running=0)
        await handing
        assert fakes.alive() == {new.pid}


async def test_the_end_of_vllm_ends_the_waiting(fakes: Fakes) -> None:
    old, new = await asyncio.gather(
        LocalServer.start(fakes.spec(name="old")), LocalServer.start(fakes.spec(name="new"))
    )
    async with old, new:
        await fakes.tell(old, "busy", running=2)
        handing = asyncio.create_task(old.hand_over(new))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(handing), 0.2)
        await fakes.tell(old, "exit", code=1)
        async with asyncio.timeout(60):
            await handing
        assert fakes.alive() == {new.pid}


async def test_holders_that_do_not_follow_are_not_waited_for_long(fakes: Fakes) -> None:
    old, new = await asyncio.gather(
        LocalServer.start(fakes.spec(name="old")), LocalServer.start(fakes.spec(name="new"))
    )
    deaf = await LocalServer.attach("old")
    async with old, new, deaf:
        await old.hand_over(new)
        assert fakes.alive() == {new.pid}
        followed = Followed(deaf)  # what was told it is there still
        await followed.changed()
        assert deaf.pid == new.pid
    await followed.over()


async def test_a_detached_server_hands_that_over_too(fakes: Fakes) -> None:
    old = await LocalServer.start(fakes.spec(name="old"), detached=True)
    new = await LocalServer.start(fakes.spec(name="new"))
    await old.hand_over(new)
    await new.stop()
    await old.stop()
    assert fakes.alive() == {new.pid}
    [left] = running_servers()
    assert (left.model, left.detached) == ("new", True)
    await (await LocalServer.attach()).end()


async def test_a_suspended_server_is_handed_over_at_once(fakes: Fakes) -> None:
    old = await LocalServer.start(fakes.spec(name="old"))
    other = await LocalServer.attach("old")
    async with old, other:
        followed = Followed(other)
        await old.suspend()
        async with await LocalServer.start(fakes.spec(name="new")) as new:
            await old.hand_over(new)
            await followed.changed()
            assert fakes.alive() == {new.pid}
            assert other.fingerprint == new.fingerprint


async def test_it_is_not_handed_over_to_what_is_not_ready(fakes: Fakes) -> None:
    old, new = await asyncio.gather(
        LocalServer.start(fakes.spec(name="old")), LocalServer.start(fakes.spec(name="new"))
    )
    async with old, new:
        await new.suspend()
        with pytest.raises(ServerError, match="the successor is not ready, it is suspended"):
            await old.hand_over(new)
        await new.end()
        with pytest.raises(ServerError, match="supervisor has ended"):
            await old.hand_over(new)
        with pytest.raises(ServerError, match="its own successor"):
            await old.hand_over(old)
        assert (await old.status()).state == "ready"


async def test_the_same_server_can_be_started_again_after_a_hand_over(
    fakes: Fakes, tmp_path: Path
) -> None:
    old, new = await asyncio.gather(
        LocalServer.start(fakes.spec(name="old")), LocalServer.start(fakes.spec(name="new"))
    )
    async with old, new:
        await fakes.tell(old, "busy", running=1)
        handing = asyncio.create_task(old.hand_over(new, drain_timeout=0.5))
        await eventually(lambda: len(running_servers()) == 1)
        async with await LocalServer.start(fakes.spec(name="old")) as again:
            assert not again.shared
            assert handing.done()
            assert fakes.alive() == {new.pid, again.pid}
