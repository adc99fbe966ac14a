"""``models``, ``engine`` and ``doctor``, and the help of all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_unified.cli
from tests.cli.conftest import Cli
from tests.support import answers
from tests.support.scripted import ScriptedServer
from vllm_unified import __version__
from vllm_unified.cli.commands import COMMANDS, load

# models


def test_models(cli: Cli, vllm: ScriptedServer) -> None:
    done = cli("models", "--url", vllm.url)
    title, base, adapter = done.out.splitlines()
    assert title.split() == ["model", "context", "base", "model", "loaded", "from"]
    assert base.split() == ["SmolLM2", "2048", "/models/a" + "b" * 90]
    assert adapter.split() == ["poet", "SmolLM2", "/adapters/poet"]
    assert adapter.index("/adapters") == base.index("/models") == title.index("loaded")


def test_models_as_json(cli: Cli, vllm: ScriptedServer) -> None:
    cards = cli("models", "--json", "--url", vllm.url).json
    assert [card["id"] for card in cards] == ["SmolLM2", "poet"]


# engine


def test_engine_list_without_an_engine_says_how_to_get_one(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    done = cli("engine", "list")
    assert (done.code, done.out) == (0, "")
    assert "vllm-unified engine install" in done.err


def test_engine_list_as_json(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert cli("engine", "list", "--json").json == []


def test_engine_remove_of_an_unknown_one(cli: Cli) -> None:
    done = cli("engine", "remove", "nope")
    assert done.code == 1
    assert "there is no managed engine 'nope'" in done.err


# doctor


def findings(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in found}


def test_doctor_finds_the_server_well(cli: Cli, vllm: ScriptedServer, cache: Path) -> None:
    done = cli("doctor", "--json", "--url", vllm.url)
    assert done.code == 0
    found = findings(done.json)
    assert found["server"]["state"] == "ok"
    assert "serves SmolLM2, poet; it generated a token in" in found["server"]["text"]
    assert found["system"]["state"] == found["processor"]["state"] == "ok"
    assert str(cache) in found["disk"]["text"]


def test_doctor_tells_a_server_that_cannot_generate(cli: Cli, vllm: ScriptedServer) -> None:
    vllm.reply(answers.response()).reply(answers.BUSY_ANSWER)
    done = cli("doctor", "--json", "--url", vllm.url)
    assert done.code == 1
    problem = findings(done.json)["server"]
    assert problem["state"] == "problem"
    assert "currently busy" in problem["text"]
    assert "something listens on port" in problem["text"]
    assert "add a server" in problem["advice"]


def test_doctor_tells_that_nobody_is_there(cli: Cli, nobody: str) -> None:
    done = cli("doctor", "--url", nobody)
    assert done.code == 1
    problem, advice = done.out.splitlines()[-2:]
    assert problem.startswith("problem server:")
    assert "nothing listens on port" in problem
    assert "vllm-unified serve" in advice
    assert advice.index("Is the") == problem.index("no connection")


def test_doctor_without_a_server_is_content(
    cli: Cli, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has named no server may want none yet."""
    monkeypatch.setattr("vllm_unified.cli.target.DEFAULT_API_URL", nobody)
    done = cli("doctor", "--json")
    assert done.code == 0
    assert findings(done.json)["server"]["state"] == "note"


# Help


def commands() -> Iterator[tuple[str, ...]]:
    yield ()
    for name in COMMANDS:
        yield (name,)
        yield from ((name, inner) for inner in getattr(load(name), "commands", ()))


@pytest.mark.parametrize("path", [*commands()], ids=" ".join)
def test_help(cli: Cli, path: tuple[str, ...]) -> None:
    done = cli(*path, "--help")
    assert done.code == 0
    assert f"Usage: vllm-unified {' '.join(path)}".rstrip() in done.out
    assert cli(*path, "-h").out == done.out


def test_help_names_the_exit_codes_and_where_the_key_comes_from(cli: Cli) -> None:
    text = re.sub(r"\s+", " ", cli("--help").out)
    assert "3 no server reached" in text
    assert "VLLM_API_KEY" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_for_what_the_list_says(name: str) -> None:
    first, _, _ = (load(name).help or "").partition("\n\n")

    assert " ".join(first.split()) == COMMANDS[name]


def test_every_command_is_in_the_list() -> None:
    docs = (path.read_text() for path in Path(vllm_unified.cli.__file__).parent.glob("*.py"))
    written = {found[1] for doc in docs if (found := re.match('"""``vllm-unified ([a-z]+)', doc))}

    assert written == set(COMMANDS)


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["nope"]], ids=" ".join)
def test_what_needs_no_command_imports_none(args: list[str]) -> None:
    """Half a second of imports is long for who wants to know an option."""
    assert rooms_after(*args) == {"cli", "version"}


def test_completion_of_a_command_imports_none() -> None:
    assert rooms_after(COMP_WORDS="vllm-unified s", COMP_CWORD="1") == {"cli", "version"}


def rooms_after(*args: str, **completion: str) -> set[str]:
    """The rooms of which a command has imported something, in a process of its own."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from vllm_unified.cli import main; main()"
    )
    if completion:
        completion["_VLLM_UNIFIED_COMPLETE"] = "complete_bash"
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **completion},
    )
    modules = done.stderr.splitlines()[-1].split()
    return {name.split(".")[1] for name in modules if name.startswith("vllm_unified.")}


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"vllm-unified {__version__}\n"
