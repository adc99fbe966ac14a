"""The servers that run now: a record each, which its supervisor writes and removes."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Literal

import msgspec

from vllm_unified.servers.cache import run_dir
from vllm_unified.servers.locks import FileLock
from vllm_unified.servers.spec import ServerSpec

RecordedState = Literal["starting", "ready", "restarting", "suspended"]


class RunningServer(msgspec.Struct, frozen=True, kw_only=True):
    """A local server, as its supervisor tells it. There is no key in it."""

    fingerprint: str
    state: RecordedState
    supervisor_pid: int
    pid: int
    """vLLM's process (its HTTP server)."""
    url: str
    model: str
    """The name in requests."""
    engine: str
    """The engine's name."""
    log_path: str
    started_at: float
    """When its supervisor started, in seconds since the Unix epoch."""
    spec: ServerSpec
    """What runs, resolved; without its key, and with the values of its variables masked."""
    detached: bool = False
    """Whether it is kept without any lease."""
    restarts: int = 0
    """How often it was started again after it had ended by itself, or hung."""
    adapters: dict[str, str] = {}
    """LoRA adapters that a restart would load again: name to path."""


def public_spec(spec: ServerSpec) -> ServerSpec:
    """``spec`` as a file may have it: no key, and no values of variables."""
    return msgspec.structs.replace(spec, api_key=None, env=dict.fromkeys(spec.env, "..."))


def socket_path(fingerprint: str) -> Path:
    """Where the supervisor of this server listens for leases."""
    return run_dir() / f"{fingerprint}.sock"


def control_path(fingerprint: str) -> Path:
    """Where the supervisor of this server takes commands."""
    return run_dir() / f"{fingerprint}.ctl"


def start_lock(fingerprint: str) -> Path:
    """Held while somebody joins or launches this server."""
    return run_dir() / f"{fingerprint}.start"


def alive_lock(fingerprint: str) -> Path:
    """Held by the supervisor of this server for all of its life."""
    return run_dir() / f"{fingerprint}.alive"


def write_record(server: RunningServer) -> None:
    """Write or replace the server's record, in one step."""
    path = _record_path(server.fingerprint)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_bytes(msgspec.json.encode(server))
    temporary.replace(path)


def remove_record(fingerprint: str) -> None:
    """Remove the server's record and sockets, if they are there."""
    _record_path(fingerprint).unlink(missing_ok=True)
    socket_path(fingerprint).unlink(missing_ok=True)
    control_path(fingerprint).unlink(missing_ok=True)


def running_servers() -> list[RunningServer]:
    """The servers that run on this machine for this user, oldest first.

    A record counts while its supervisor holds the ``alive`` lock, which the kernel releases with
    the process: a process id that was given to another program deceives nobody. What a crash or a
    reboot left is removed.
    """
    if sys.platform == "win32":
        return []
    found = []
    for path in run_dir().glob("*.json"):
        lock = FileLock(alive_lock(path.stem))
        if lock.try_acquire():
            with lock:
                remove_record(path.stem)
            continue
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found.append(msgspec.json.decode(path.read_bytes(), type=RunningServer))
    return sorted(found, key=lambda server: server.started_at)


def _record_path(fingerprint: str) -> Path:
    return run_dir() / f"{fingerprint}.json"
