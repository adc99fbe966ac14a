"""The model of a container: a repository's id, or a folder of this machine that is mounted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from vllm_unified.errors import EngineError
from vllm_unified.servers.bundled import ensure_bundled_model, is_complete
from vllm_unified.servers.cache import models_dir
from vllm_unified.servers.containers.spec import ContainerSpec
from vllm_unified.servers.engines import find_engine
from vllm_unified.servers.spec import BUNDLED, BUNDLED_NAME, resolved


def with_model(
    spec: ContainerSpec, say: Callable[[str], None], cancel: threading.Event
) -> ContainerSpec:
    """``spec`` with its server resolved; the bundled model is made where it is missing. Blocks.

    Raises:
        EngineError: the bundled model is missing, and so is what makes it.
    """
    bundled = _bundled(say, cancel) if spec.server.model == BUNDLED else None
    return msgspec.structs.replace(spec, server=resolved(spec.server, bundled))


def with_known_model(spec: ContainerSpec) -> ContainerSpec:
    """``spec`` with its server resolved as far as it can be without making anything."""
    folder = models_dir() / BUNDLED_NAME
    return msgspec.structs.replace(
        spec, server=resolved(spec.server, folder if is_complete(folder) else None)
    )


def model_folders(model: str) -> tuple[str, ...]:
    """The folders that a local model needs, its own first; none for a repository's id.

    The files of a snapshot in Hugging Face's cache are links to another folder.
    """
    folder = Path(model)
    if not folder.is_absolute() or not folder.is_dir():
        return ()
    needed = {str(folder): None}
    for path in folder.rglob("*"):
        if path.is_symlink():
            target = path.resolve()
            if not target.is_relative_to(folder):
                needed[str(target if target.is_dir() else target.parent)] = None
    return tuple(needed)


def model_bytes(model: str) -> int:
    """The size of a local model's weights; 0 for a repository's id."""
    folder = Path(model)
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _bundled(say: Callable[[str], None], cancel: threading.Event) -> Path:
    folder = models_dir() / BUNDLED_NAME
    if is_complete(folder):
        return folder
    engine = find_engine()
    if engine is None:
        raise EngineError(
            f"{BUNDLED_NAME} is not on this machine, and there is no engine that could make it",
            hint="Give a model's folder or repository id, or run `vllm-unified engine install`.",
        )
    return ensure_bundled_model(engine, say, cancel=cancel)
