"""Checkpoints: made once, whole or not at all; with a tool that is a fake."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from tests.models.test_weights import write_tensors
from tests.support.waiting import until
from vllm_unified.errors import ConfigurationError, EngineError
from vllm_unified.servers.cache import checkpoints_dir
from vllm_unified.servers.engines import Engine
from vllm_unified.servers.rollouts import checkpoints
from vllm_unified.servers.rollouts.checkpoints import (
    Recipe,
    calibration_texts,
    checkpoint_manifest,
    ensure_checkpoint,
    find_checkpoint,
)

ENGINE = Engine(
    name="e", kind="cpu", version="0.32.0", python=sys.executable, origin="managed", path="/e"
)
TOOL = """
import json, pathlib, struct, sys, time
recipe = json.loads(pathlib.Path(sys.argv[-1]).read_text())
mode = pathlib.Path({mode!r}).read_text()
with open({count!r}, "a") as file:
    file.write("x")
print("== quantizing", flush=True)
print("(3/31): Calibrating: 100%", flush=True)
target = pathlib.Path(recipe["target"])
(target / "config.json").write_text("{{}}")
if mode == "fail":
    sys.exit("ValueError: shapes do not fit")
if mode == "slow":
    time.sleep(60)
header = json.dumps({{"w": {{"dtype": "I8", "shape": [5], "data_offsets": [0, 5]}}}}).encode()
(target / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"12345")
"""


class Tool:
    """A stand-in for llm-compressor's interpreter, and what it does next."""

    def __init__(self, root: Path) -> None:
        self.python = root / "python"
        self.count = root / "count"
        self._mode = root / "mode"
        script = root / "tool.py"
        script.write_text(TOOL.format(mode=str(self._mode), count=str(self.count)))
        self.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
        self.python.chmod(0o755)
        self.count.touch()
        self.will("work")

    def will(self, mode: str) -> None:
        """``work``, ``fail``, or be ``slow``."""
        self._mode.write_text(mode)

    @property
    def runs(self) -> int:
        return len(self.count.read_text())


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    monkeypatch.setenv("VLLM_UNIFIED_CACHE", str(tmp_path / "cache"))
    made = Tool(tmp_path)
    monkeypatch.setattr(checkpoints, "ensure_quantizer", lambda *_, **__: str(made.python))
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    write_tensors(source / "model.safetensors", a=20)
    return Recipe(source=str(source), method="awq", bits=4, group_size=64, texts=("one", "two"))


def leftovers() -> list[Path]:
    return [path for path in checkpoints_dir().iterdir() if path.is_dir()]


def test_is_made_once_and_says_what_it_is(tool: Tool, recipe: Recipe) -> None:
    said: list[str] = []
    folder = ensure_checkpoint(recipe, ENGINE, said.append)
    assert ensure_checkpoint(recipe, ENGINE) == folder == find_checkpoint(recipe)
    assert tool.runs == 1
    assert said == ["quantizing", "quantizing, part 3 of 31"]
    manifest = checkpoint_manifest(folder)
    assert manifest is not None
    assert (manifest.source, manifest.method, manifest.bits) == (recipe.source, "awq", 4)
    assert (manifest.source_bytes, manifest.weights_bytes) == (20, 5)
    assert manifest.calibration_texts == 2
    assert leftovers() == [folder]


def test_another_recipe_or_another_model_is_another_checkpoint(recipe: Recipe) -> None:
    names = {recipe.name, msgspec.structs.replace(recipe, texts=("three",)).name}
    write_tensors(Path(recipe.source) / "model.safetensors", a=21)
    assert len(names | {recipe.name}) == 3


def test_a_failure_says_why_and_leaves_nothing(tool: Tool, recipe: Recipe) -> None:
    tool.will("fail")
    with pytest.raises(EngineError, match="shapes do not fit") as caught:
        ensure_checkpoint(recipe, ENGINE)
    assert "The whole log: " in str(caught.value)
    assert leftovers() == []


def test_a_cancelled_one_ends_the_tool_and_leaves_nothing(tool: Tool, recipe: Recipe) -> None:
    tool.will("slow")
    cancel = threading.Event()
    with ThreadPoolExecutor() as pool:
        making = pool.submit(ensure_checkpoint, recipe, ENGINE, cancel=cancel)
        until(lambda: tool.runs == 1)
        cancel.set()
        with pytest.raises(CancelledError):
            making.result()
    assert leftovers() == []


def test_what_was_interrupted_is_made_anew(tool: Tool, recipe: Recipe) -> None:
    partial = checkpoints_dir() / f".partial-{recipe.name}"
    partial.mkdir()
    (partial / "half").write_text("")
    assert find_checkpoint(recipe) is None
    folder = ensure_checkpoint(recipe, ENGINE)
    assert leftovers() == [folder]
    assert not (folder / "half").exists()


def test_a_damaged_one_is_made_anew(tool: Tool, recipe: Recipe) -> None:
    folder = ensure_checkpoint(recipe, ENGINE)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert find_checkpoint(recipe) is None
    ensure_checkpoint(recipe, ENGINE)
    assert tool.runs == 2
    assert find_checkpoint(recipe) == folder


def test_two_at_once_make_one(tool: Tool, recipe: Recipe) -> None:
    with ThreadPoolExecutor() as pool:
        folders = list(pool.map(lambda _: ensure_checkpoint(recipe, ENGINE), range(3)))
    assert len(set(folders)) == 1
    assert tool.runs == 1


def test_texts_for_calibration(tmp_path: Path) -> None:
    assert len(calibration_texts(None)) == 32
    assert calibration_texts(("a", "b")) == ("a", "b")
    file = tmp_path / "texts.jsonl"
    lines = ['"plain"', '{"text": "of an object"}', "", '{"question": "why?", "answer": "so"}']
    file.write_text("\n".join(lines))
    assert calibration_texts(str(file)) == ("plain", "of an object", "why?")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('"good"\n{bad', "line 2"),
        ('{"other": 1}', "line 1 has no text"),
        ("", "has no text"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=words):
        calibration_texts(str(file))


def test_a_file_of_texts_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        calibration_texts(str(tmp_path / "none"))
