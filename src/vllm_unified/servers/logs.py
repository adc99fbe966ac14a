"""What a vLLM writes: how far its start is, why it failed; and how much of it is kept."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

TAIL_LINES = 40
"""Lines of a log that an error carries."""
_LONGEST = 20 << 20
_KEPT = 5 << 20
_READ_AT_ONCE = 256 << 10
_LOGS_KEPT = 10
_MOST_LINES = 10_000

# "(EngineCore pid=12) ERROR 11-22 15:30:41 [core.py:133] " and the like, before vLLM's lines.
_PREFIX = re.compile(
    r"^(\(\w[^)]*pid=\d+\) )?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]+\] ?)?"
)
_EXCEPTION = re.compile(r"^((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\w*)(?:: (.*))?$")
_USAGE = re.compile(r"^\S+: error: (.+)$")
_PYDANTIC_DETAIL = re.compile(r"^  (?:Value error|Assertion failed), (.+)$|^  (\S.+ \[type=.+)$")
_PYDANTIC_TAIL = re.compile(r"\s*\[type=\w+, input_value=.*$")

# Each says only that another process failed, and that process's own words are in the log.
_WRAPPERS = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "Worker failed with error",
    "Engine process failed to start",
    "EngineCore encountered a fatal error",
    "EngineCore encountered an issue",
    "cancelled",
)
_STOPPED = ("KeyboardInterrupt", "SystemExit", "asyncio.exceptions.CancelledError")

_MILESTONES = (
    ("Resolved architecture", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading the model"),
    ("Loading weights took", "weights loaded, preparing memory"),
    ("KV cache size", "warming up"),
    ("Starting vLLM server", "starting the HTTP server"),
)

_HINTS = (
    (
        re.compile("Address already in use", re.I),
        "Another program listens on this port: choose another, or port=None for a free one.",
    ),
    (
        re.compile("out of memory|Cannot allocate memory|not enough memory", re.I),
        "Free some "
        "memory, or lower kv_cache_gib (CPU), gpu_memory_utilization (GPU) or max_model_len.",
    ),
    (
        re.compile("less than requested memory for kv"),
        "Lower kv_cache_gib, or free some memory.",
    ),
    (
        re.compile("KV cache", re.I),
        "Raise kv_cache_gib (CPU) or gpu_memory_utilization (GPU), or lower max_model_len.",
    ),
    (
        re.compile("greater than the derived max_model_len"),
        "Lower max_model_len to what the model supports.",
    ),
    (
        re.compile("outgoing traffic has been disabled"),
        "The model is not in the local cache, and "
        "HF_HUB_OFFLINE is set: unset it, or give a local folder.",
    ),
)


def progress_of(line: str) -> str | None:
    """A short message for a line of the log that is a milestone of the start."""
    return next((said for mark, said in _MILESTONES if mark in line), None)


def failure_cause(log: str) -> str | None:
    """The engine's own words for why it failed, or ``None`` where the log has none.

    The last exception that is not a mere wrapper ("Engine core initialization failed. See root
    cause above."), with its class; for a usage error, the parser's message.
    """
    lines = [_PREFIX.sub("", line.rstrip()) for line in log.splitlines()]
    said = list(_exceptions(lines))
    causes = [cause for cause in said if not any(wrapper in cause for wrapper in _WRAPPERS)]
    return next(reversed(causes or said), None)


def failure_hint(cause: str) -> str | None:
    """What to do about a cause, where it is a known one."""
    return next((hint for pattern, hint in _HINTS if pattern.search(cause)), None)


def is_port_taken(cause: str) -> bool:
    """Whether the server failed only because its port was in use."""
    return "address already in use" in cause.lower()


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, 10,000 at most; empty where it cannot be read."""
    lines = max(0, min(lines, _MOST_LINES))
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 400 * lines))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:]) if lines else ""


def since(log: Path, begin: int) -> str:
    """What was written after the first ``begin`` bytes; the end of it, if that is much."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            # A log that is shorter now was cut meanwhile.
            file.seek(max(begin if begin <= size else 0, size - _READ_AT_ONCE))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def cut(log: Path) -> bool:
    """Where a log is over 20 MB, move its newest 5 MB to ``NAME.1``, and empty it.

    Who has it open for appending goes on writing at its new end; what is written in the moment
    between is lost. Returns whether it was cut.
    """
    try:
        if log.stat().st_size <= _LONGEST:
            return False
        with log.open("r+b") as file:
            file.seek(-_KEPT, os.SEEK_END)
            kept = file.read()
            descriptor = os.open(
                older(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
            )
            with os.fdopen(descriptor, "wb") as copy:
                copy.write(kept[kept.find(b"\n") + 1 :])
            file.truncate(0)
    except OSError:
        return False  # a full disk, say: there is no better time to keep a server running
    return True


def older(log: Path) -> Path:
    """Where the end of what was cut from a log is."""
    return log.with_name(f"{log.name}.1")


def prune(folder: Path, *, spare: Collection[str] = (), keep: int = _LOGS_KEPT) -> None:
    """Remove the logs of servers but for the newest ``keep``, and those in ``spare``."""
    dated = []
    for path in folder.glob("server-*.log"):
        with contextlib.suppress(OSError):
            dated.append((path.stat().st_mtime, path))
    for _, path in sorted(dated, reverse=True)[keep:]:
        if str(path) not in spare:
            path.unlink(missing_ok=True)
            older(path).unlink(missing_ok=True)


def _exceptions(lines: list[str]) -> Iterator[str]:
    for index, line in enumerate(lines):
        if usage := _USAGE.match(line):
            yield usage[1]
        elif match := _EXCEPTION.match(line):
            name, message = match[1].rpartition(".")[2], match[2] or ""
            if match[1] in _STOPPED:
                continue
            if name == "ValidationError" and (detail := _pydantic_detail(lines[index + 1 :])):
                name, message = "ValueError", detail
            yield f"{name}: {message}" if message else name


def _pydantic_detail(following: list[str]) -> str | None:
    """The first error of a pydantic ``ValidationError``, whose own line only counts them."""
    for index, line in enumerate(following[:3]):
        if match := _PYDANTIC_DETAIL.match(line):
            return _PYDANTIC_TAIL.sub("", _with_continuation(match, following[index + 1 :]))
    return None


def _with_continuation(match: re.Match[str], following: list[str]) -> str:
    text: str = match[1] or match[2]
    for line in following:
        if "[type=" in text or line.startswith("    For further information"):
            break
        text = f"{text}\n{line}"
    return text
