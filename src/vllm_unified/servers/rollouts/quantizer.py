"""llm-compressor in an environment of its own: it needs another transformers than vLLM does."""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from vllm_unified.errors import EngineError
from vllm_unified.servers.cache import logs_dir, prune_logs, tools_dir
from vllm_unified.servers.engines import MANIFEST, Engine, Progress, discard
from vllm_unified.servers.installer import pip_environment
from vllm_unified.servers.jobs import JobResult, run_job
from vllm_unified.servers.locks import FileLock
from vllm_unified.servers.pip_output import failure_of, hint_of, progress_of

PACKAGES = {
    "llmcompressor": "0.14.0.1",
    "compressed-tensors": "0.19.0",
    "torch": "2.13.0",
    "transformers": "5.17.0",
    "datasets": "5.2.0",
}
"""What was tried together; its checkpoints are served by vLLM 0.32."""

_NAME = f"llmcompressor-{PACKAGES['llmcompressor']}"
_VERIFY = "import llmcompressor; from transformers import AutoModelForCausalLM"


class ToolManifest(msgspec.Struct, frozen=True, kw_only=True):
    """Written into the environment when it is complete."""

    packages: dict[str, str]
    installed_at: str
    """ISO 8601, UTC."""


def ensure_quantizer(
    engine: Engine, progress: Progress | None = None, *, cancel: threading.Event | None = None
) -> str:
    """The interpreter that has llm-compressor, which is installed first where it is missing.

    What an interrupted install left is removed. A second install waits for the first.

    Args:
        engine: Its interpreter makes the environment.
        progress: Called with short messages, in this thread.
        cancel: When it is set, the install stops with ``concurrent.futures.CancelledError``.

    Raises:
        EngineError: it failed; the message has pip's words and the log's path.
    """
    folder = tools_dir() / _NAME
    python = str(folder / "bin" / "python")
    if _is_complete(folder):
        return python
    say = progress or (lambda message: None)
    waiting = f"another process installs {_NAME}: waiting for it"
    lock_path = tools_dir() / f".{_NAME}.lock"
    with FileLock(lock_path, on_wait=lambda: say(waiting), cancel=cancel) as lock:
        if _is_complete(folder):
            return python
        discard(folder)
        try:
            _Install(folder, say, cancel, lock.fileno()).run(engine)
        except BaseException:
            discard(folder)
            raise
    return python


def _is_complete(folder: Path) -> bool:
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=ToolManifest)
    except (OSError, msgspec.DecodeError):
        return False
    return manifest.packages == PACKAGES and (folder / "bin" / "python").exists()


class _Install:
    """One install under way, whose lock is held."""

    def __init__(
        self, folder: Path, say: Progress, cancel: threading.Event | None, lock: int
    ) -> None:
        self._folder = folder
        self._say = say
        self._cancel = cancel
        self._lock = lock
        prune_logs("tool-")
        self._log = logs_dir() / f"tool-{_NAME}-{time.strftime('%Y%m%d-%H%M%S')}.log"

    def run(self, engine: Engine) -> None:
        self._say(f"making an environment for {_NAME}")
        python = str(self._folder / "bin" / "python")
        self._job([engine.python, "-m", "venv", str(self._folder)])
        pip = [python, "-m", "pip", "--no-input", "--disable-pip-version-check", "install"]
        self._job([*pip, *(f"{name}=={version}" for name, version in PACKAGES.items())])
        self._say(f"trying {_NAME}")
        self._job([python, "-c", _VERIFY])
        manifest = ToolManifest(
            packages=PACKAGES, installed_at=datetime.now(UTC).isoformat(timespec="seconds")
        )
        temporary = self._folder / f".{MANIFEST}"
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        temporary.replace(self._folder / MANIFEST)

    def _job(self, command: list[str]) -> None:
        result: JobResult = run_job(
            command,
            log=self._log,
            on_line=self._on_line,
            cancel=self._cancel,
            env=pip_environment(os.environ),
            hold=[self._lock],
        )
        if result.code != 0:
            raise EngineError(
                f"cannot install {_NAME}, which makes quantized checkpoints:\n"
                f"{failure_of(result.lines)}\nThe whole log: {self._log}",
                hint=hint_of(result.lines),
            )

    def _on_line(self, line: str) -> None:
        if message := progress_of(line):
            self._say(message)
