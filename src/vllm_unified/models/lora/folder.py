"""An adapter's folder, and its base model's, where they can be read from here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from vllm_unified.errors import AdapterError

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_MAX_HEADER_BYTES = 100 * 2**20


class AdapterFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What an adapter's folder says of it."""

    folder: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] | None = None
    """Of its tensors, by name, where its weights are a safetensors file."""


def folder_here(path: str) -> Path | None:
    """The folder of this machine that a path stands for; ``None``: only the server can know it."""
    folder = Path(path).expanduser()
    return Path(os.path.abspath(folder)) if folder.is_dir() else None


def read_adapter(folder: Path) -> AdapterFiles:
    """Read an adapter's config and the header of its weights.

    Raises:
        AdapterError: it is no adapter in the format of PEFT.
    """
    config = _json(folder / CONFIG)
    if config is None:
        raise AdapterError(
            f"{folder} has no {CONFIG}",
            hint="An adapter is a folder as PEFT's save_pretrained() writes it.",
        )
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise AdapterError(f"{folder} has no weights: none of {', '.join(_WEIGHTS)}")
    return AdapterFiles(
        folder=str(folder), config=config, shapes=_shapes(folder / "adapter_model.safetensors")
    )


def read_model_config(folder: str | None) -> dict[str, Any] | None:
    """A base model's config.json, where its folder is on this machine."""
    try:
        return None if not folder else _json(Path(folder) / "config.json")
    except AdapterError:
        return None


def digest(folder: Path) -> str:
    """What changes when a file in the folder does: of all names, sizes and times of modification.

    Raises:
        AdapterError: the folder cannot be read.
    """
    hashed = hashlib.sha256()
    try:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                stat = path.stat()
                hashed.update(f"{path.relative_to(folder)}\0{stat.st_size}\0".encode())
                hashed.update(f"{stat.st_mtime_ns}\n".encode())
    except OSError as error:
        raise AdapterError(f"{folder} cannot be read: {error}") from error
    return hashed.hexdigest()


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} is not a JSON object")
    return value


def _shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    """From a safetensors file: eight bytes with the length of a JSON header, and the header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _MAX_HEADER_BYTES else b""
        header: dict[str, Any] = dict(json.loads(text))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(
            f"{path} is no safetensors file: {error}", hint="Was it copied to its end?"
        ) from error
    return {
        name: tuple(entry["shape"])
        for name, entry in header.items()
        if isinstance(entry, Mapping) and isinstance(entry.get("shape"), list)
    }
