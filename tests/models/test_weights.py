"""What a model's folder says about its weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from vllm_unified.models.weights import group_size, model_config, model_folder, weights_bytes


def write_tensors(path: Path, **sizes: int) -> None:
    """A safetensors file with tensors of these sizes in bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "I8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * end)


def test_adds_the_tensors_of_all_files(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model-00001-of-00002.safetensors", a=100, b=20)
    write_tensors(tmp_path / "model-00002-of-00002.safetensors", c=3)
    assert weights_bytes(tmp_path) == 123


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 16, struct.pack("<Q", 4) + b"nope"])
def test_a_broken_file_has_no_size(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert weights_bytes(tmp_path) is None


def test_no_file_has_no_size(tmp_path: Path) -> None:
    assert weights_bytes(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_broken_configuration_is_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert model_config(tmp_path) == {}


def test_finds_a_repository_in_the_cache_of_hugging_face(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert model_folder("org/name", {"HF_HOME": str(tmp_path)}) == snapshot
    assert model_folder("org/other", {"HF_HOME": str(tmp_path)}) is None
    assert model_folder("name", {"HF_HOME": str(tmp_path)}) is None


@pytest.mark.parametrize(
    ("config", "parts", "size"),
    [
        ({"hidden_size": 576, "intermediate_size": 1536}, 1, 64),
        ({"hidden_size": 4096, "intermediate_size": 11008}, 1, 128),
        ({"hidden_size": 4096, "intermediate_size": 11008}, 2, 128),
        ({"hidden_size": 4096, "intermediate_size": 11008}, 4, 64),
        ({"text_config": {"hidden_size": 96, "intermediate_size": 192}}, 1, 32),
        (
            {
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_attention_heads": 3,
                "head_dim": 32,
            },
            1,
            32,
        ),
        ({"hidden_size": 100, "intermediate_size": 200}, 1, None),
        ({}, 1, None),
    ],
)
def test_the_largest_group_that_fits_all_layers(
    config: dict[str, Any], parts: int, size: int | None
) -> None:
    assert group_size(config, parts) == size
