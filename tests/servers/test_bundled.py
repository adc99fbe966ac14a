"""Preparing the bundled model, with a converter that is a fake."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import msgspec
import pytest

from vllm_unified.errors import EngineError
from vllm_unified.servers import BUNDLED_NAME, Engine, ensure_bundled_model
from vllm_unified.servers.bundled import ModelManifest, is_complete
from vllm_unified.servers.engines import MANIFEST
from vllm_unified.servers.locks import FileLock

if TYPE_CHECKING:
    from pathlib import Path

# Called as: python -I bundled_convert.py TARGET
CONVERTER = """#!/bin/sh
echo run >> {root}/runs
{failure}
mkdir -p "$3"
for name in config.json tokenizer.json generation_config.json chat_template.jinja; do
  echo "{{}}" > "$3/$name"
done
echo weights > "$3/model.safetensors"
"""


class Converter:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.python = root / "python"
        self.repair()
        self.engine = Engine(
            name="cpu-1",
            kind="cpu",
            version="1",
            python=str(self.python),
            origin="environment",
            path=str(root),
        )

    def repair(self, failure: str = "") -> None:
        self.python.write_text(CONVERTER.format(root=self.root, failure=failure))
        self.python.chmod(0o755)

    def runs(self) -> int:
        return len((self.root / "runs").read_text().splitlines())


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Converter:
    monkeypatch.setenv("VLLM_UNIFIED_CACHE", str(tmp_path / "cache"))
    return Converter(tmp_path)


def test_it_is_converted_once(converter: Converter) -> None:
    folder = ensure_bundled_model(converter.engine)
    assert folder.name == BUNDLED_NAME
    assert ensure_bundled_model(converter.engine) == folder
    assert converter.runs() == 1
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=ModelManifest)
    assert manifest.license == "Apache-2.0"
    assert manifest.files["model.safetensors"] == 8


def test_what_is_damaged_is_converted_again(converter: Converter) -> None:
    folder = ensure_bundled_model(converter.engine)
    (folder / "model.safetensors").write_text("cut")
    assert not is_complete(folder)
    assert is_complete(ensure_bundled_model(converter.engine))
    (folder / MANIFEST).unlink()
    (folder.parent / f".partial-{BUNDLED_NAME}").mkdir()
    assert is_complete(ensure_bundled_model(converter.engine))
    assert converter.runs() == 3
    assert [path.name for path in folder.parent.glob("[!.]*")] == [BUNDLED_NAME]


def test_a_failure_has_the_converters_words(converter: Converter) -> None:
    converter.repair("echo 'ImportError: accelerate is required'; exit 1")
    with pytest.raises(EngineError, match="accelerate is required") as caught:
        ensure_bundled_model(converter.engine)
    assert "install_engine()" in str(caught.value.hint)
    converter.repair()
    assert is_complete(ensure_bundled_model(converter.engine))


def test_a_model_without_its_template_is_none(converter: Converter) -> None:
    converter.repair('mkdir -p "$3"; exit 0')
    with pytest.raises(EngineError, match=r"it wrote no config\.json, .*chat_template\.jinja"):
        ensure_bundled_model(converter.engine)


def test_two_at_once_convert_once(converter: Converter, tmp_path: Path) -> None:
    said: list[str] = []
    waiting = threading.Event()

    def say(message: str) -> None:
        said.append(message)
        waiting.set()

    (tmp_path / "cache" / "models").mkdir(parents=True)
    with FileLock(tmp_path / "cache" / "models" / f".{BUNDLED_NAME}.lock"):
        second = threading.Thread(target=ensure_bundled_model, args=(converter.engine, say))
        second.start()
        assert waiting.wait(5)
    second.join(10)
    assert said[0] == f"another process prepares {BUNDLED_NAME}: waiting for it"
    assert converter.runs() == 1
