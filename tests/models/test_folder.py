"""What is read of an adapter's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.adapters import write_adapter
from vllm_unified import AdapterError
from vllm_unified.models.lora.folder import digest, folder_here, read_adapter, read_model_config

MODEL = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    return write_adapter(tmp_path / "adapter", model, rank=4)


def test_the_config_and_the_shapes(folder: Path) -> None:
    files = read_adapter(folder)
    assert files.config["r"] == 4
    assert files.shapes is not None
    assert sorted(set(files.shapes.values())) == [(4, 4), (4, 8), (8, 4)]


def test_the_base_models_config(folder: Path) -> None:
    assert read_model_config(str(folder.parent / "model")) == MODEL
    assert read_model_config(str(folder)) is None
    assert read_model_config("org/model") is None
    assert read_model_config(None) is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("adapter_config.json", None, "has no adapter_config.json"),
        ("adapter_config.json", b"{", "adapter_config.json cannot be read"),
        ("adapter_config.json", b"[]", "is not a JSON object"),
        ("adapter_model.safetensors", None, "has no weights"),
        ("adapter_model.safetensors", b"\x05\0\0\0\0\0\0\0{", "no safetensors file"),
        ("adapter_model.safetensors", b"\x01\0\0\0\0\0\0\x007", "no safetensors file"),
        ("adapter_model.safetensors", b"\xff" * 9, "no safetensors file"),
    ],
)
def test_what_is_no_adapter(folder: Path, name: str, content: bytes | None, words: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(AdapterError, match=words) as told:
        read_adapter(folder)
    assert str(folder) in told.value.message


def test_weights_that_are_no_safetensors_are_left_to_the_server(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert read_adapter(folder).shapes is None


def test_the_digest_tells_every_change(folder: Path) -> None:
    before = digest(folder)
    assert digest(folder) == before
    config = folder / "adapter_config.json"
    os.utime(config, ns=(1, 1))
    touched = digest(folder)
    (folder / "more").mkdir()
    (folder / "more" / "notes").write_text("x")
    assert len({before, touched, digest(folder)}) == 3


def test_a_folder_of_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert folder_here("adapter") == folder
    assert folder_here("org/adapter") is None
    assert folder_here(str(folder / "adapter_config.json")) is None
