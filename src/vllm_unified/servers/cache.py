"""Where this library keeps what it installs, converts, logs and runs.

::

    <root>/engines/   a virtual environment per vLLM
    <root>/models/    converted models
    <root>/checkpoints/  quantized copies of models
    <root>/tools/     what makes those: a virtual environment
    <root>/logs/      of installs and servers
    <root>/run/       sockets, records and locks of the servers that run now
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from vllm_unified.errors import EngineError

# sockaddr_un holds 108 bytes with the final NUL; a socket's name takes 22 of them.
_LONGEST_RUN_DIR = 80
_LOGS_KEPT = 10


def cache_root() -> Path:
    """The folder that holds everything.

    ``$VLLM_UNIFIED_CACHE``, else ``$XDG_CACHE_HOME/vllm-unified``, else
    ``~/.cache/vllm-unified``. It need not exist yet.
    """
    if own := os.environ.get("VLLM_UNIFIED_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "vllm-unified"


def engines_dir() -> Path:
    """Where managed engines are; made if missing."""
    return _made(cache_root() / "engines")


def models_dir() -> Path:
    """Where converted models are; made if missing."""
    return _made(cache_root() / "models")


def checkpoints_dir() -> Path:
    """Where quantized copies of models are; made if missing."""
    return _made(cache_root() / "checkpoints")


def tools_dir() -> Path:
    """Where the environments of tools are; made if missing."""
    return _made(cache_root() / "tools")


def logs_dir() -> Path:
    """Where the logs of installs and servers are; made if missing, readable by its owner only."""
    return _private(cache_root() / "logs")


def run_dir() -> Path:
    """Where sockets, records and locks of running servers are; its owner's only.

    Under the cache, unless that path is too long for a Unix socket: then under the system's
    folder for temporary files, by user and cache.

    Raises:
        EngineError: the folder belongs to somebody else.
    """
    folder = cache_root() / "run"
    if len(os.fsencode(folder)) > _LONGEST_RUN_DIR:
        digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"vllm-unified-{os.getuid()}-{digest}"
    return _private(folder)


def prune_logs(prefix: str, *, keep: int = _LOGS_KEPT) -> None:
    """Remove the oldest logs whose name starts with ``prefix``, all but the newest ``keep``."""
    dated = [(_modified(path), path) for path in logs_dir().glob(f"{prefix}*.log")]
    for _, path in sorted(dated, reverse=True)[keep:]:
        path.unlink(missing_ok=True)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(
            f"cannot make the folder {folder}: {error.strerror}",
            hint="Set VLLM_UNIFIED_CACHE to a folder that you may write to.",
        ) from error
    return folder


def _private(folder: Path) -> Path:
    _made(folder.parent)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise PermissionError(1, "it is not a folder of this user")
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise EngineError(
            f"cannot use the folder {folder}: {error.strerror}",
            hint="Set VLLM_UNIFIED_CACHE to a folder that is yours.",
        ) from error
    return folder
