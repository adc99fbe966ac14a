"""Quantized copies of models, made once and kept."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import msgspec

from vllm_unified.errors import ConfigurationError, EngineError
from vllm_unified.hardware.detect import detect
from vllm_unified.models.weights import weights_bytes
from vllm_unified.servers.cache import checkpoints_dir, logs_dir, prune_logs
from vllm_unified.servers.engines import MANIFEST, Engine, Progress
from vllm_unified.servers.jobs import run_job
from vllm_unified.servers.locks import FileLock
from vllm_unified.servers.rollouts import checkpoint_make
from vllm_unified.servers.rollouts.quantizer import PACKAGES, ensure_quantizer

MAX_LENGTH = 512
"""Tokens of a calibration text that are read."""

_BUNDLED_TEXTS = "calibration.jsonl"
_TEXT_KEYS = ("text", "prompt", "question", "content")
_LAYER = re.compile(r"\((\d+)/(\d+)\): Calibrating")


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What is made of which model."""

    source: str
    """The model's folder, resolved."""
    method: str
    bits: int
    group_size: int | None
    texts: tuple[str, ...]
    """For calibration; none are needed for w8a8."""

    @property
    def name(self) -> str:
        """The checkpoint's folder: the same for the same weights, recipe and tools."""
        source = Path(self.source)
        material = [msgspec.json.encode(self), msgspec.json.encode(PACKAGES)]
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name != MANIFEST:
                status = path.stat()
                material.append(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        digest = hashlib.sha256(b"\0".join(material)).hexdigest()[:12]
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"{source.name}-{self.method}-{self.bits}bit{group}-{digest}"


class CheckpointManifest(msgspec.Struct, frozen=True, kw_only=True):
    """Written into a checkpoint's folder, last."""

    source: str
    """The folder of the model that it was made of."""
    method: str
    bits: int
    group_size: int | None
    calibration_texts: int
    source_bytes: int | None
    """Of tensors."""
    weights_bytes: int | None
    tools: dict[str, str]
    made_at: str
    """ISO 8601, UTC."""
    seconds: float
    """That it took."""
    files: dict[str, int]
    """The size of each file, in bytes."""


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint's folder, if it was made and is whole."""
    folder = checkpoints_dir() / recipe.name
    return folder if checkpoint_manifest(folder) else None


def checkpoint_manifest(folder: Path) -> CheckpointManifest | None:
    """What a checkpoint of this library's making says of itself; ``None`` for any other folder,
    or where a file is missing or of another size."""
    try:
        found = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=CheckpointManifest)
        whole = all((folder / name).stat().st_size == size for name, size in found.files.items())
    except (OSError, msgspec.DecodeError):
        return None
    return found if whole else None


def ensure_checkpoint(
    recipe: Recipe,
    engine: Engine,
    progress: Progress | None = None,
    *,
    cancel: threading.Event | None = None,
) -> Path:
    """The checkpoint's folder; it is made first where it is missing, and llm-compressor installed.

    It is made in a folder of another name, which is renamed when it is whole: an interrupted one
    is no checkpoint, and the next call removes it. A second call for the same one waits.

    Args:
        engine: Its interpreter makes the environment of llm-compressor.
        progress: Called with short messages, in this thread.
        cancel: When it is set, the work stops with ``concurrent.futures.CancelledError``.

    Raises:
        EngineError: it cannot be made; the message has the tool's words and the log's path.
    """
    folder = checkpoints_dir() / recipe.name
    if checkpoint_manifest(folder):
        return folder
    say = progress or (lambda message: None)
    waiting = f"another process makes {recipe.name}: waiting for it"
    lock_path = checkpoints_dir() / f".{recipe.name}.lock"
    with FileLock(lock_path, on_wait=lambda: say(waiting), cancel=cancel) as lock:
        if checkpoint_manifest(folder):
            return folder
        python = ensure_quantizer(engine, say, cancel=cancel)
        temporary = checkpoints_dir() / f".partial-{recipe.name}"
        _remove(temporary)
        try:
            _make(recipe, python, temporary, say, cancel, lock.fileno())
            _remove(folder)
            temporary.replace(folder)
        finally:
            _remove(temporary)
    return folder


def calibration_texts(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The texts: as given, of a JSONL file, or this library's own.

    A line of the file is a string, or an object with ``text``, ``prompt``, ``question`` or
    ``content``.

    Raises:
        ConfigurationError: names the file and the line that is wrong.
    """
    if given is None:
        lines = files(__package__).joinpath(_BUNDLED_TEXTS).read_text(encoding="utf-8")
        return _texts(lines, _BUNDLED_TEXTS)
    if not isinstance(given, str):
        texts = tuple(given)
    else:
        try:
            texts = _texts(Path(given).expanduser().read_text(encoding="utf-8"), given)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"quantization: calibration: {error}") from None
    if not any(text.strip() for text in texts):
        raise ConfigurationError("quantization: calibration has no text")
    return texts


def _texts(lines: str, name: str) -> tuple[str, ...]:
    found = []
    for number, line in enumerate(lines.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            where = f"{name}, line {number}"
            raise ConfigurationError(f"quantization: calibration: {where}: {error}") from None
        if isinstance(item, dict):
            item = next((item[key] for key in _TEXT_KEYS if item.get(key)), None)
        if not isinstance(item, str):
            raise ConfigurationError(
                f"quantization: calibration: {name}, line {number} has no text",
                hint=f"A line is a string, or an object with one of {', '.join(_TEXT_KEYS)}.",
            )
        found.append(item)
    return tuple(found)


def _make(
    recipe: Recipe,
    python: str,
    target: Path,
    say: Progress,
    cancel: threading.Event | None,
    lock: int,
) -> None:
    started = time.monotonic()
    target.mkdir()
    order = target / ".recipe.json"
    order.write_bytes(
        msgspec.json.encode(
            {
                "source": recipe.source,
                "target": str(target),
                "scheme": recipe.method,
                "group_size": recipe.group_size,
                "texts": recipe.texts,
                "max_length": MAX_LENGTH,
            }
        )
    )
    prune_logs("quantize-")
    log = logs_dir() / f"quantize-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    result = run_job(
        [python, "-I", checkpoint_make.__file__, str(order)],
        log=log,
        on_line=lambda line: _tell(line, say),
        cancel=cancel,
        env=_environment(),
        hold=[lock],
    )
    weights = weights_bytes(target)
    if result.code != 0 or weights is None:
        said = [line for line in result.lines if line.strip()][-3:] or ["it wrote no weights"]
        raise EngineError(
            f"cannot make a checkpoint with {recipe.method} of {recipe.source}:\n"
            + "\n".join(said)
            + f"\nThe whole log: {log}"
        )
    order.unlink()
    manifest = CheckpointManifest(
        source=recipe.source,
        method=recipe.method,
        bits=recipe.bits,
        group_size=recipe.group_size,
        calibration_texts=len(recipe.texts),
        source_bytes=weights_bytes(Path(recipe.source)),
        weights_bytes=weights,
        tools=PACKAGES,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 1),
        files={path.name: path.stat().st_size for path in sorted(target.iterdir())},
    )
    (target / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))


def _environment() -> dict[str, str]:
    """Without what would lead the tool to another environment's packages."""
    foreign = {"PYTHONPATH", "PYTHONHOME", "VLLM_API_KEY"}
    env = {name: value for name, value in os.environ.items() if name not in foreign}
    # Beside a server that is busy, threads that wait for one another take many times as long.
    env.setdefault("OMP_NUM_THREADS", str(max(1, detect().cpus - 1)))
    return env | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _tell(line: str, say: Progress) -> None:
    if line.startswith("== "):
        say(line.removeprefix("== "))
    elif match := _LAYER.search(line):
        say(f"quantizing, part {match[1]} of {match[2]}")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
