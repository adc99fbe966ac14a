"""Run a command to its end: its lines are watched, its log kept, and it can be cancelled."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import IO, cast

import msgspec

_POLL = 0.2
_LINES_KEPT = 200
_CHUNK = 65536


class JobResult(msgspec.Struct, frozen=True):
    """How a command ended."""

    code: int
    lines: list[str]
    """Its last lines, output and errors together."""


def run_job(
    command: Sequence[str],
    *,
    log: Path,
    on_line: Callable[[str], None] | None = None,
    cancel: threading.Event | None = None,
    env: Mapping[str, str] | None = None,
    hold: Sequence[int] = (),
) -> JobResult:
    """Run ``command`` until it ends, appending what it says to ``log``.

    Args:
        command: Program and arguments.
        log: A file that is made or appended to.
        on_line: Called with each line.
        cancel: When it is set, the command and its children are killed, and
            ``concurrent.futures.CancelledError`` is raised. Any other exception kills them too.
        env: The environment; ``None`` inherits this process's.
        hold: Open files that the command inherits, such as a lock that must not be free before
            the command has ended, even if this process dies.
    """
    cancel = cancel or threading.Event()
    with log.open("ab") as sink:
        sink.write(f"$ {' '.join(command)}\n".encode())
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            pass_fds=tuple(hold),
        )
        pipe = cast("IO[bytes]", process.stdout)
        try:
            lines = _follow(pipe, sink, on_line, cancel)
            return JobResult(_wait(process, cancel), lines)
        finally:
            _kill(process)
            pipe.close()


def _follow(
    pipe: IO[bytes],
    sink: IO[bytes],
    on_line: Callable[[str], None] | None,
    cancel: threading.Event,
) -> list[str]:
    kept: deque[str] = deque(maxlen=_LINES_KEPT)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if cancel.is_set():
                raise CancelledError
            if not selector.select(_POLL):
                continue
            chunk = os.read(pipe.fileno(), _CHUNK)
            sink.write(chunk)
            sink.flush()
            *whole, rest = (rest + (chunk or b"\n" * bool(rest))).split(b"\n")
            for raw in whole:
                line = raw.decode("utf-8", "replace").rpartition("\r")[2].rstrip()
                kept.append(line)
                if on_line:
                    on_line(line)
            if not chunk:
                return list(kept)


def _wait(process: subprocess.Popen[bytes], cancel: threading.Event) -> int:
    while (code := process.poll()) is None:
        if cancel.is_set():
            raise CancelledError
        time.sleep(_POLL / 10)
    return code


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
