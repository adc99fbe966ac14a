"""Which servers a command talks to: ``--url``, ``--config``, and the variables for both."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.support.scripted import STALL, ScriptedServer

KEY = "sk-geheim-0123456789"
COMMANDS = [["generate", "Hi"], ["chat", "Hi"], ["models"], ["endpoints"]]

each_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
posix_only = pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file with one endpoint at this address, and these settings."""

    def write(url: str, *settings: str) -> Path:
        file = tmp_path / "fleet.toml"
        lines = ["[settings]", *settings, "[endpoints]", f'gpu1 = "{url}"']
        file.write_text("\n".join(lines))
        return file

    return write


@each_command
def test_the_servers_of_a_file(
    cli: Cli, vllm: ScriptedServer, write: Write, command: list[str]
) -> None:
    assert cli(*command, "--config", str(write(vllm.url))).code == 0
    assert vllm.requests


@each_command
def test_the_file_of_the_environment(
    cli: Cli,
    vllm: ScriptedServer,
    write: Write,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_UNIFIED_CONFIG", str(write(vllm.url)))
    assert cli(*command).code == 0
    assert vllm.requests


@each_command
def test_both_a_file_and_an_address_are_one_too_many(
    cli: Cli, vllm: ScriptedServer, write: Write, command: list[str]
) -> None:
    done = cli(*command, "-c", str(write(vllm.url)), "-u", vllm.url)
    assert (done.code, done.out) == (2, "")
    assert "--url and --config are both given" in done.err
    assert vllm.requests == []


def test_a_file_on_the_command_line_wins_over_an_address_of_the_environment(
    cli: Cli, vllm: ScriptedServer, write: Write, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_URL", nobody)
    assert cli("models", "-c", str(write(vllm.url))).code == 0


def test_an_address_on_the_command_line_wins_over_a_file_of_the_environment(
    cli: Cli, vllm: ScriptedServer, write: Write, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_UNIFIED_CONFIG", str(write(nobody)))
    assert cli("models", "-u", vllm.url).code == 0


def test_a_file_of_the_environment_wins_over_an_address_there(
    cli: Cli, vllm: ScriptedServer, write: Write, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_URL", nobody)
    monkeypatch.setenv("VLLM_UNIFIED_CONFIG", str(write(vllm.url)))
    assert cli("models").code == 0


def test_the_model_of_the_file_wins_over_the_environment(
    cli: Cli, vllm: ScriptedServer, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MODEL", "other")
    cli("generate", "Hi", "-c", str(write(vllm.url, 'model = "poet"')))
    assert vllm.requests[0].json["model"] == "poet"


def test_a_model_on_the_command_line_wins_over_the_file(
    cli: Cli, vllm: ScriptedServer, write: Write
) -> None:
    cli("generate", "Hi", "-c", str(write(vllm.url, 'model = "other"')), "-m", "poet")
    assert vllm.requests[0].json["model"] == "poet"


def test_the_timeout_of_the_file_wins_over_the_commands_default(
    cli: Cli, vllm: ScriptedServer, write: Write
) -> None:
    vllm.reply(STALL)
    file = write(vllm.url, 'timeout = "50ms"', "max_retries = 0")
    done = cli("generate", "Hi", "--json", "-c", str(file))
    assert done.code == 1
    assert "within 0.05 s" in done.err


def test_a_timeout_on_the_command_line_wins_over_the_file(
    cli: Cli, vllm: ScriptedServer, write: Write
) -> None:
    vllm.reply(STALL)
    file = write(vllm.url, 'timeout = "1h"', "max_retries = 0")
    done = cli("generate", "Hi", "--json", "-c", str(file), "--timeout", "0.05")
    assert done.code == 1
    assert "within 0.05 s" in done.err


@each_command
def test_a_file_that_is_wrong_is_wrong_usage(cli: Cli, write: Write, command: list[str]) -> None:
    done = cli(*command, "-c", str(write("http://gpu1:8000", "timeuot = 1")))
    assert (done.code, done.out) == (2, "")
    assert "fleet.toml, [settings]: unknown key 'timeuot'" in done.err


@pytest.mark.parametrize("command", COMMANDS[:-1], ids=lambda command: command[0])
def test_no_server_of_the_file_is_told_in_one_line_with_the_command_that_shows_them(
    cli: Cli, write: Write, nobody: str, command: list[str]
) -> None:
    file = write(nobody, "max_retries = 0")
    done = cli(*command, "--config", str(file))
    assert (done.code, done.out) == (3, "")
    [line] = done.err.splitlines()
    assert line.startswith(f"No server of {file} answers")
    assert f"`vllm-unified endpoints -c {file}`" in line


@posix_only
@each_command
@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_key_that_others_can_read_is_told_in_one_line(
    cli: Cli, vllm: ScriptedServer, write: Write, command: list[str], mode: int
) -> None:
    file = write(vllm.url, f'api_key = "{KEY}"')
    file.chmod(mode)
    done = cli(*command, "-c", str(file))
    assert done.code == 0
    [line] = done.err.splitlines()
    assert line.startswith(f"{file} holds a key, and others can read it")
    assert KEY not in done.out + line


@posix_only
def test_a_key_that_nobody_else_can_read_is_nobodys_business(
    cli: Cli, vllm: ScriptedServer, write: Write
) -> None:
    file = write(vllm.url, f'api_key = "{KEY}"')
    file.chmod(0o600)
    assert cli("models", "-c", str(file)).err == ""


@posix_only
def test_a_file_without_a_key_may_be_read_by_all(
    cli: Cli, vllm: ScriptedServer, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU1_KEY", KEY)
    file = write(vllm.url, 'api_key_env = "GPU1_KEY"')
    file.chmod(0o644)
    assert cli("models", "-c", str(file)).err == ""
    assert vllm.requests[0].headers["authorization"] == f"Bearer {KEY}"


@each_command
def test_the_help_names_the_option_and_its_variable(cli: Cli, command: list[str]) -> None:
    text = cli(command[0], "--help").out
    assert "--config" in text
    assert "VLLM_UNIFIED_CONFIG" in text
