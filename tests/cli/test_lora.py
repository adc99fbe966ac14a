"""``vllm-unified lora``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from vllm_unified.simulator import Fleet

LORA: dict[str, Any] = {"model": "dragon", "enable_lora": True}


@pytest.fixture
def file(tmp_path: Path, vllm_fleet: Fleet) -> str:
    """A file with two servers, gpu1 and gpu2."""
    urls = [vllm_fleet.add(**LORA).url for _ in range(2)]
    path = tmp_path / "fleet.toml"
    lines = (f'gpu{number} = "{url}"' for number, url in enumerate(urls, 1))
    path.write_text("\n".join(["[endpoints]", *lines]))
    return str(path)


def test_load_list_and_unload(cli: Cli, file: str) -> None:
    loaded = cli("lora", "load", "poet", "/adapters/poet", "--config", file)
    assert (loaded.code, loaded.err) == (0, "")
    assert loaded.out == "poet is loaded at gpu1, gpu2\n"
    again = cli("lora", "load", "poet", "/adapters/poet", "--config", file)
    assert again.out == "poet was loaded already at gpu1, gpu2\n"

    title, row = cli("lora", "list", "--config", file).out.splitlines()
    assert title.split() == ["adapter", "base", "model", "at", "loaded", "from"]
    assert row.split() == ["poet", "dragon", "gpu1,", "gpu2", "/adapters/poet"]

    assert cli("lora", "unload", "poet", "--config", file).out == "poet is unloaded\n"
    empty = cli("lora", "list", "--config", file)
    assert (empty.code, empty.out) == (0, "")
    assert "No LoRA adapter" in empty.err


def test_as_json(cli: Cli, file: str) -> None:
    loaded = cli("lora", "load", "poet", "/p", "--replicas", "1", "--json", "-c", file).json
    assert loaded.pop("duration") > 0
    assert loaded == {
        "success": True,
        "name": "poet",
        "endpoints": ["gpu1"],
        "already_loaded": False,
        "failed": {},
        "notes": [],
    }
    assert cli("lora", "list", "--json", "-c", file).json == [
        {"name": "poet", "path": "/p", "base_model": "dragon", "endpoints": ["gpu1"]}
    ]
    assert cli("lora", "unload", "poet", "--json", "-c", file).json["success"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("load", "poet", "/missing"), 1, "finds no adapter at /missing"),
        (("load", "poet", "/p", "--base-model", "llama"), 1, "serves dragon"),
        (("load", "poet", "/p", "--replicas", "3"), 2, "there are 2 servers"),
        (("load", "poet", "/p", "--replicas", "some"), 2, "--replicas must be a number"),
        (("unload", "poet"), 1, "there is no adapter 'poet'"),
    ],
)
def test_what_fails(cli: Cli, file: str, arguments: tuple[str, ...], code: int, words: str) -> None:
    done = cli("lora", *arguments, "--config", file)
    assert (done.code, done.out) == (code, "")
    assert words in done.err


def test_nobody_there(cli: Cli, nobody: str) -> None:
    done = cli("lora", "list", "--url", nobody)
    assert done.code == 3
    assert "No vLLM server answers" in done.err


def test_too_many_are_told(cli: Cli, vllm_fleet: Fleet) -> None:
    url = vllm_fleet.add(**LORA).url
    cli("lora", "load", "a", "/a", "--url", url)
    done = cli("lora", "load", "b", "/b", "--url", url)
    assert done.code == 0
    assert "slots for 1 at a time" in done.err


def test_the_help_says_that_nobody_looks_after_it(cli: Cli) -> None:
    assert "restarted has forgotten it" in " ".join(cli("lora", "load", "--help").out.split())
