"""A model's folder, as far as its weights are concerned."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LARGEST_HEADER = 100 * 2**20


def model_folder(model: str, environment: Mapping[str, str]) -> Path | None:
    """Where a model is on this machine: a folder, or a repository in Hugging Face's cache.

    ``None`` where it is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if model.count("/") != 1:
        return None
    home = environment.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(environment.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    repository = cache / f"models--{model.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = repository / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None


def model_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``; empty where there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def weights_bytes(folder: Path) -> int | None:
    """Bytes of all tensors, from the headers of the safetensors files; ``None`` without any."""
    try:
        sizes = [_tensors_bytes(path) for path in sorted(folder.glob("*.safetensors"))]
    except (OSError, ValueError, struct.error, KeyError, TypeError):
        return None
    return sum(sizes) if sizes else None


def _tensors_bytes(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LARGEST_HEADER:
            raise ValueError("no safetensors file")
        header = json.loads(file.read(length))
    return sum(
        tensor["data_offsets"][1] - tensor["data_offsets"][0]
        for name, tensor in header.items()
        if name != "__metadata__"
    )


def group_size(config: Mapping[str, Any], parts: int = 1) -> int | None:
    """The largest usual group of weights that divides every layer's input, or ``None``.

    Args:
        parts: How many GPUs share a layer.
    """
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else config
    hidden, wide = inner.get("hidden_size"), inner.get("intermediate_size")
    heads, width = inner.get("num_attention_heads"), inner.get("head_dim")
    widths = [hidden, wide]
    if isinstance(heads, int) and isinstance(width, int):
        widths.append(heads * width)
    known = [each for each in widths if isinstance(each, int)]
    if hidden not in known:
        return None
    return next(
        (size for size in (128, 64, 32) if not any(w % (size * parts) for w in known)), None
    )
