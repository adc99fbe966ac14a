"""Join the supervisor of a server, or launch one. Exactly one results, however many try."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from vllm_unified.errors import ServerStartError
from vllm_unified.servers import logs
from vllm_unified.servers.cache import logs_dir
from vllm_unified.servers.engines import Engine
from vllm_unified.servers.lease import Lease
from vllm_unified.servers.locks import FileLock
from vllm_unified.servers.records import running_servers, socket_path, start_lock
from vllm_unified.servers.restarts import Pacing
from vllm_unified.servers.spec import ServerSpec, fingerprint
from vllm_unified.servers.starter import SupervisorConfig

_LISTEN_SECONDS = 30.0
_POLL = 0.02

PACING = Pacing()
"""The times that supervisors get which are launched here."""


class Joined(msgspec.Struct, frozen=True):
    """A lease that was just taken."""

    lease: Lease
    fingerprint: str
    shared: bool
    """Whether the server was there already."""
    log_path: Path | None
    """The server's log, where it was launched here."""


def join_or_launch(
    spec: ServerSpec,
    engine: Engine,
    *,
    start_timeout: float,
    cancel: threading.Event | None = None,
) -> Joined:
    """Take a lease of the server that runs ``spec``, and launch its supervisor if there is none.

    Args:
        spec: What to run, resolved.
        engine: What runs it.
        start_timeout: Seconds that the server may take to be ready.
        cancel: When it is set, waiting ends with ``concurrent.futures.CancelledError``.

    Raises:
        ServerStartError: the supervisor itself does not start.
    """
    mark = fingerprint(spec, engine, os.environ)
    with FileLock(start_lock(mark), cancel=cancel):
        if lease := Lease.connect(socket_path(mark)):
            return Joined(lease, mark, True, None)
        logs.prune(logs_dir(), spare={server.log_path for server in running_servers()})
        log = logs_dir() / f"server-{mark}-{time.strftime('%Y%m%d-%H%M%S')}.log"
        lease = _launch(spec, engine, mark, log, start_timeout)
        try:
            _await_listening(mark, lease, cancel)
        except BaseException:
            lease.close()
            raise
        return Joined(lease, mark, False, log)


def _launch(spec: ServerSpec, engine: Engine, mark: str, log: Path, start_timeout: float) -> Lease:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        config = SupervisorConfig(
            spec=spec,
            engine=engine,
            fingerprint=mark,
            log_path=str(log),
            lease=theirs.fileno(),
            start_timeout=start_timeout,
            pacing=PACING,
        )
        try:
            _spawn(config, log)
        except BaseException:
            ours.close()
            raise
    return Lease.adopt(ours)


def _spawn(config: SupervisorConfig, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        launched = subprocess.run(
            # -P: a file of the user's working directory must not shadow a module.
            [sys.executable, "-P", "-m", "vllm_unified.servers.supervisor"],
            input=msgspec.json.encode(config),
            stdout=descriptor,
            stderr=descriptor,
            pass_fds=(config.lease,),
            start_new_session=True,
            check=False,
        )
    finally:
        os.close(descriptor)
    if launched.returncode != 0:
        raise ServerStartError(
            f"the supervisor did not start (exit code {launched.returncode})",
            log=log.read_text(encoding="utf-8", errors="replace"),
            hint=f"Its log: {log}",
        )


def _await_listening(mark: str, lease: Lease, cancel: threading.Event | None) -> None:
    """Keep the start lock until others can join."""
    deadline = time.monotonic() + _LISTEN_SECONDS
    while time.monotonic() < deadline and not (cancel and cancel.is_set()):
        if socket_path(mark).exists() or lease.ended():
            return
        time.sleep(_POLL)
