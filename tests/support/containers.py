"""A real container engine for tests: Podman, which speaks Docker's API."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import until
from vllm_unified.servers import ContainerSpec, Engine, ServerSpec

IMAGE = "localhost/vllm-unified-test:1"

_PACKAGES = ("podman", "runc", "iptables")
# crun refuses cgroups of version 1, and limits may not exceed the machine's own.
_CONFIGURATION = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=1024:1024"]
[engine]
runtime = "runc"
"""
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc")


class Podman:
    """A container engine of the test's own: socket, storage and configuration are in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "podman.sock"
        self.url = f"unix://{self.socket}"
        (folder / "containers.conf").write_text(_CONFIGURATION)
        self._environment = {**os.environ, "CONTAINERS_CONF": str(folder / "containers.conf")}
        self._command = ["podman", "--root", str(folder / "root"), "--runroot", str(folder / "run")]

    def run(self, *args: str) -> str:
        """What a command of it says."""
        done = subprocess.run(
            [*self._command, *args],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if done.returncode != 0:
            raise RuntimeError(f"podman {args[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Docker's API on the socket."""
        service = subprocess.Popen(
            [*self._command, "system", "service", "--time=0", self.url],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until(self.socket.exists, 20)
            yield
        finally:
            self.run("rm", "--all", "--force", "--time", "0")
            self.run("rmi", "--all", "--force")
            service.terminate()
            service.wait(20)

    def make_image(self) -> None:
        """An image that has nothing but places for what is mounted."""
        archive = self.folder / "image.tar"
        with tarfile.open(archive, "w") as tar:
            for name in ("tmp", "root"):
                place = tarfile.TarInfo(name)
                place.type, place.mode = tarfile.DIRTYPE, 0o777
                tar.addfile(place)
        self.run("import", str(archive), IMAGE)

    def spec(self, engine: Engine, server: ServerSpec) -> ContainerSpec:
        """This machine's vLLM, in a container: no registry is needed."""
        folders = dict.fromkeys([*_SYSTEM, engine.path, *_interpreters(Path(engine.python))])
        return ContainerSpec(
            server=server,
            image=IMAGE,
            gpus=None,
            docker_url=self.url,
            volumes={folder: f"{folder}:ro" for folder in folders if Path(folder).exists()},
            environment={"HOME": "/tmp", "PATH": "/usr/bin:/bin"},
            entrypoint=(engine.python, "-m", "vllm.entrypoints.openai.api_server"),
        )


@contextlib.contextmanager
def podman() -> Iterator[Podman]:
    """The engine, with its image, for as long as the block runs; skips where there can be none."""
    _install()
    folder = Path(tempfile.mkdtemp(prefix="vu-"))
    try:
        engine = Podman(folder)
        try:
            engine.make_image()
        except RuntimeError as error:
            pytest.skip(f"containers cannot run here: {error}")
        with engine.serving():
            yield engine
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _install() -> None:
    if shutil.which("podman") and shutil.which("runc"):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("there is no Podman, and it cannot be installed here")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *_PACKAGES]
    for command in (["apt-get", "update"], install):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        if done.returncode != 0:
            pytest.skip(f"Podman cannot be installed: {done.stderr.strip()[-300:]}")


def _interpreters(python: Path) -> list[str]:
    """Where a virtual environment's interpreter and its library really are."""
    found = []
    while python.is_symlink():
        python = python.parent / python.readlink()
        found.append(str(python.parent.parent.resolve()))
    return [folder for folder in found if not folder.startswith("/usr") and folder != "/"]
