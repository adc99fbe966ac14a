"""The command line on a real vLLM, and the vLLM that it starts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from tests.live.conftest import KEY
from vllm_unified.servers import running_servers
from vllm_unified.servers.guard import session_members

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]

COMMAND = (sys.executable, "-c", "from vllm_unified.cli import main; main()")


class Served(msgspec.Struct):
    """What ``serve --json`` prints."""

    url: str
    model: str
    pid: int


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_URL", "VLLM_MODEL", "VLLM_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=300)
    assert KEY not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_demo(url: str) -> None:
    done = run("demo", "--url", url)
    assert done.returncode == 0, done.stderr
    for title in ("Generate", "Chat", "Stream", "Batch", "What to try next"):
        assert f"\n{title}\n" in done.stdout
    assert "Paris" in done.stdout
    assert re.search(
        r"\[80 tokens in [\d.]+ s, \d+ tokens/s, the first after \d+ ms\]", done.stdout
    )
    assert re.search(r"\d of 8 right", done.stdout)
    assert "8/8" in done.stderr


@pytest.fixture(scope="module")
def serve() -> Iterator[subprocess.Popen[str]]:
    """``vllm-unified serve`` in the background."""
    with subprocess.Popen(
        [*COMMAND, "serve", "--json", "--name", "served"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "VLLM_API_KEY": KEY},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def served(serve: subprocess.Popen[str]) -> Served:
    """The server that it says is ready."""
    assert serve.stdout is not None
    text = ""
    while not text.endswith("}\n"):
        line = serve.stdout.readline()
        assert line, serve.communicate()[1]
        text += line
    return msgspec.json.decode(text, type=Served)


def test_what_serve_starts_is_found_by_the_others(served: Served) -> None:
    assert run("generate", "Hi", "-n", "4", "-p", "ignore_eos=true").stdout.strip()
    assert run("chat", "What is the capital of France?", "-t", "0").stdout.count("Paris") == 1
    [card] = json.loads(run("models", "--json").stdout)
    assert card["id"] == "served"


def test_doctor_finds_all_well(served: Served) -> None:
    done = run("doctor", "--json")
    assert done.returncode == 0
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert "problem" not in {finding["state"] for finding in found.values()}
    assert found["server"]["state"] == "ok"
    assert f"{served.url} serves served; it generated a token" in found["server"]["text"]


def test_the_processes_show_no_key(served: Served) -> None:
    for pid in session_members(served.pid):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            assert KEY.encode() not in file.read()


def test_ctrl_c_stops_what_serve_started(served: Served, serve: subprocess.Popen[str]) -> None:
    assert session_members(served.pid)
    serve.send_signal(signal.SIGINT)
    rest, said = serve.communicate(timeout=60)
    assert serve.returncode == 130
    assert rest == ""
    assert f"served is served at {served.url}" in said
    assert said.endswith("Stopping...\n")
    assert KEY not in said
    assert session_members(served.pid) == []
    assert served.pid not in [server.pid for server in running_servers()]
