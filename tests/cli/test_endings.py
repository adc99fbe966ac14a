"""How commands end when they cannot do what they should: in words, with an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cli.conftest import Cli
from tests.support import answers
from tests.support.scripted import STALL, ScriptedServer
from tests.support.waiting import until

pytestmark = pytest.mark.processes

KEY = "sk-very-secret"
COMMAND = (sys.executable, "-c", "from vllm_unified.cli import main; main()")

each_command = pytest.mark.parametrize(
    "command", [["generate", "Hi"], ["chat", "Hi"], ["models"]], ids=lambda command: command[0]
)


@each_command
def test_no_server_is_told_in_one_line_with_the_command_that_starts_one(
    cli: Cli, nobody: str, command: list[str]
) -> None:
    done = cli(*command, "--url", nobody)
    assert done.code == 3
    assert done.out == ""
    [line] = done.err.splitlines()
    assert nobody in line
    assert "`vllm-unified serve`" in line


def test_a_name_that_cannot_be_resolved(cli: Cli) -> None:
    done = cli("models", "--url", "http://no-such-host.invalid:8000")
    assert done.code == 3
    assert "no-such-host.invalid" in done.err


@each_command
def test_a_key_that_the_server_does_not_know(
    cli: Cli, vllm: ScriptedServer, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    vllm.reply(answers.response({"error": "Unauthorized"}, status="401 Unauthorized"))
    done = cli(*command, "--url", vllm.url)
    assert done.code == 1
    assert "does not accept the key" in done.err
    assert "VLLM_API_KEY" in done.err
    assert KEY not in done.out + done.err
    assert vllm.requests[0].headers["authorization"] == f"Bearer {KEY}"


def test_what_the_server_says_is_no_markup(cli: Cli, vllm: ScriptedServer) -> None:
    vllm.reply(answers.error("400 Bad Request", "[red]bad[/red] [/]"))
    assert "[red]bad[/red] [/]" in cli("generate", "Hi", "--url", vllm.url).err


@pytest.mark.parametrize("args", [["nope"], ["models", "surplus"], ["engine", "nope"]])
def test_wrong_usage(cli: Cli, args: list[str]) -> None:
    done = cli(*args)
    assert done.code == 2
    assert done.out == ""
    assert args[-1] in done.err


def test_without_its_packages_it_says_what_to_install() -> None:
    block = "import sys; sys.modules['typer'] = None; from vllm_unified.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "The command line is an extra: pip install 'vllm-unified[cli]'\n"


# Ends that come from outside.


@contextmanager
def started(*args: str, buffered: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [*COMMAND, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_reader_that_has_enough(vllm: ScriptedServer) -> None:
    """As ``vllm-unified generate ... | head -1``."""
    vllm.reply(*answers.texts([f"line {number}\n" for number in range(20_000)]))
    with started("generate", "Hi", "--url", vllm.url) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"line 0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 1


@pytest.mark.parametrize(
    "command", [["models", "--json"], ["models"], ["generate", "Hi", "--json"]], ids=" ".join
)
def test_a_reader_that_has_gone(vllm: ScriptedServer, command: list[str]) -> None:
    """As ``vllm-unified models | true``."""
    with started(*command, "--url", vllm.url, buffered=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 1


@pytest.mark.parametrize("json", [[], ["--json"]], ids=["stream", "json"])
def test_ctrl_c(vllm: ScriptedServer, json: list[str]) -> None:
    vllm.reply(STALL)
    with started("generate", "Hi", "--url", vllm.url, *json) as process:
        until(lambda: bool(vllm.requests), 20)
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in complaints
    until(lambda: vllm.open_connections == 0)
