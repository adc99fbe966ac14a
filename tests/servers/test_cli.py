"""``serve``, ``ps``, ``logs``, ``restart`` and ``stop``, with a fake engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.cli.conftest import Cli, Outcome, cli
from tests.servers.conftest import Fakes
from tests.support.waiting import until
from vllm_unified.cli.ps import duration
from vllm_unified.servers import running_servers

__all__ = ["cli"]  # a fixture

COMMAND = (sys.executable, "-c", "from vllm_unified.cli import main; main()")
KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def _environment(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fakes.spec("core").env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_API_KEY", KEY)


Run = Callable[..., Outcome]


@pytest.fixture
def run(cli: Cli) -> Run:
    """A command in this process, and its exit code."""

    def run(*args: str, code: int = 0) -> Outcome:
        done = cli(*args)
        assert done.code == code, done.err
        assert KEY not in done.out + done.err
        return done

    return run


@contextmanager
def serving(fakes: Fakes, *args: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, "serve", str(fakes.model), "--json", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            until(lambda: any(each.state == "ready" for each in running_servers()), 20)
            yield process
        finally:
            process.kill()
    until(lambda: not fakes.alive())


def test_the_life_of_a_detached_server(fakes: Fakes, run: Run) -> None:
    name = ("--name", "one", "--name", "other", "--max-restarts", "2")
    done = run("serve", str(fakes.model), "-d", *name)
    [record] = running_servers()
    mark = record.fingerprint[:8]
    assert done.out == ""
    assert f"one is served at {record.url}" in done.err
    assert f"vllm-unified logs {mark} --follow" in done.err
    assert f"vllm-unified stop {mark}" in done.err
    assert (record.spec.aliases, record.spec.max_restarts) == (("other",), 2)
    title, row = run("ps").out.splitlines()
    assert title.split()[:5] == ["id", "model", "address", "state", "health"]
    assert row.split()[:4] == [mark, "one", record.url, "ready"]
    assert row.split()[-3:] == ["GiB", "0", "yes"]
    [status] = run("ps", "--json").json
    assert (status["pid"], status["holders"], status["detached"]) == (record.pid, 0, True)
    assert "Resolved architecture" in run("logs", "one", "-n", "1").out
    assert f"one is served at {record.url} again" in run("restart", mark).err
    assert fakes.alive().isdisjoint({record.pid})
    assert len(fakes.alive()) == 2
    assert f"Stopped one at {record.url}" in run("stop").err
    assert not fakes.alive()
    assert "No server runs here" in run("ps").err
    assert run("ps", "--json").json == []


def test_servers_that_are_not_there_or_not_meant(fakes: Fakes, run: Run) -> None:
    for command in ("stop", "restart", "logs"):
        done = run(command, code=3)
        assert "no server runs on this machine" in done.err
        assert "`vllm-unified serve`" in done.err
    assert "No server runs here" in run("stop", "--all").err
    for name in ("one", "two"):
        run("serve", str(fakes.model), "--detach", "--name", name)
    assert "More than one" in run("stop", code=3).err
    assert "keep one of them" in run("stop", "one", "--all", code=2).err
    listed = run("logs", "three", code=3).err
    assert all(server.url in listed for server in running_servers())
    said = run("stop", "--all").err
    assert "Stopped one at" in said
    assert "Stopped two at" in said
    assert not fakes.alive()


def test_serve_shows_restarts_and_ends_with_the_reason(fakes: Fakes) -> None:
    with serving(fakes, "--max-restarts", "1") as process:
        assert process.stderr is not None
        os.kill(running_servers()[0].pid, signal.SIGKILL)
        until(lambda: running_servers()[0].restarts == 1 and _ready(), 20)
        os.kill(running_servers()[0].pid, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    first, second = "ended by itself (exit code -9); it is started again in", "ended 2 times in a"
    assert 0 < said.index(first) < said.index(second)
    assert said.count("is served at http://") == 2
    assert "Traceback" not in said


def _ready() -> bool:
    return running_servers()[0].state == "ready"


def test_logs_follow_until_the_server_ends(fakes: Fakes, run: Run) -> None:
    run("serve", str(fakes.model), "--detach")
    [record] = running_servers()
    with subprocess.Popen(
        [*COMMAND, "logs", "--follow", "-n", "1"], stdout=subprocess.PIPE, text=True
    ) as following:
        assert following.stdout is not None
        assert "Resolved architecture" in following.stdout.readline()
        run("restart")
        assert "Resolved architecture" in following.stdout.readline()
        run("stop", record.fingerprint[:6])
        assert following.wait(20) == 0
        assert following.stdout.read() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m 0s"), (3725, "1h 2m"), (200_000, "2d 7h")],
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert duration(seconds) == text
