"""A cache of the test's own, with an engine that is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import msgspec
import pytest

from tests.support.waiting import eventually, until
from vllm_unified.servers import LocalServer, ServerSpec, launcher, running_servers
from vllm_unified.servers.engines import MANIFEST, Manifest
from vllm_unified.servers.guard import living
from vllm_unified.servers.restarts import Pacing

FAKE = Path(__file__).with_name("fake_engine.py")

if not sys.platform.startswith("linux"):
    collect_ignore_glob = ["test_*.py"]

# Nothing is judged to hang, however busy the machine is; the tests of that are impatient.
PACING = Pacing(
    first_pause=0.05, look_every=0.05, hung_after=60.0, settled=0.05, reaction=1.0, steady_after=60
)
IMPATIENT = msgspec.structs.replace(PACING, hung_after=1.0)


class Fakes:
    """Makes specs for the fake engine, and knows the processes that it started."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = root / "count"
        self.model = root / "model"
        self.model.mkdir()
        self.engine = self.make_engine()

    def make_engine(self) -> Path:
        folder = self.root / "cache" / "engines" / "cpu-0.32.0"
        (folder / "bin").mkdir(parents=True)
        python = folder / "bin" / "python"
        python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" -S "{FAKE}" "$@"\n')
        python.chmod(0o755)
        manifest = Manifest(
            kind="cpu", version="0.32.0", python_version="3.11", packages={}, installed_at=""
        )
        (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        return folder

    def spec(
        self,
        mode: str = "ok",
        *,
        delay: float = 0,
        api_key: str | None = None,
        port: int | None = None,
        max_restarts: int = 0,
        enable_lora: bool = False,
        name: str = "fake",
    ) -> ServerSpec:
        env = {"FAKE_MODE": mode, "FAKE_COUNT": str(self.count), "FAKE_DELAY": str(delay)}
        return ServerSpec(
            model=str(self.model),
            served_model_name=name,
            api_key=api_key,
            port=port,
            max_restarts=max_restarts,
            enable_lora=enable_lora,
            env=env,
        )

    async def tell(self, server: LocalServer, what: str, **values: object) -> None:
        """Have a fake engine ``exit``, ``hang``, or be ``busy``."""
        await asyncio.to_thread(post, f"{server.url}/fake/{what}", values)

    def pids(self) -> list[int]:
        """Every process that a fake engine ever was."""
        return [int(line) for line in self.count.read_text().split()] if self.count.exists() else []

    def alive(self) -> set[int]:
        """Those that still run."""
        return set(self.pids()) & living().keys()


def post(url: str, body: object) -> None:
    """Send JSON; how it is answered, if at all, is no matter."""
    request = urllib.request.Request(url, json.dumps(body).encode())
    with contextlib.suppress(OSError, HTTPException):
        urllib.request.urlopen(request, timeout=30).close()


class Followed:
    """A server that is followed, and what was told about it."""

    def __init__(self, server: LocalServer) -> None:
        self.said: list[str] = []
        self.changes: list[tuple[str, int]] = []
        self.task = asyncio.create_task(
            server.follow(
                lambda it: self.changes.append((it.url, it.pid)), progress=self.said.append
            )
        )

    async def changed(self, times: int = 1) -> None:
        """Wait until it has another address or process."""
        await eventually(lambda: len(self.changes) >= times or self.task.done())
        assert len(self.changes) >= times, self.task.result()

    async def over(self) -> str:
        """Wait until it is over; why."""
        async with asyncio.timeout(30):
            return await self.task


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    monkeypatch.setenv("VLLM_UNIFIED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(launcher, "PACING", PACING)
    made = Fakes(tmp_path)
    try:
        yield made
        until(lambda: not made.alive())
    finally:
        for left in running_servers():  # a detached one, of a test that failed
            os.kill(left.supervisor_pid, signal.SIGTERM)
