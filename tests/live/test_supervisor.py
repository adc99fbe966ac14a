"""A real vLLM that is killed, starts again with its adapter, and is given up when it cannot.

One server for all of it, detached, and attached to: every start costs half a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.adapters import write_adapter
from tests.support.vllm import OWN_SERVERS
from vllm_unified.errors import ServerError
from vllm_unified.servers import LocalServer, ServerSpec, running_servers
from vllm_unified.servers.bundled import ensure_bundled_model
from vllm_unified.servers.engines import find_engine
from vllm_unified.servers.guard import living, session_members

pytestmark = [
    pytest.mark.live,
    OWN_SERVERS,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="servers run on Linux only"),
]

KEY = "sk-supervisor"
BACK_SECONDS = 300.0
"""A start takes 35 s on two idle cores; this is for a machine that is busy."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The bundled model, in a folder that a test may break."""
    engine = find_engine()
    assert engine is not None, "run `vllm-unified engine install` first"
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ensure_bundled_model(engine).iterdir():
        (folder / file.name).symlink_to(file)
    return folder


async def test_a_killed_vllm_is_back_with_its_adapter_until_it_cannot_be(
    model: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "poet", model)
    spec = ServerSpec(
        model=str(model),
        served_model_name="supervised",
        max_model_len=512,
        enable_lora=True,
        api_key=KEY,
        max_restarts=4,
    )
    started = await LocalServer.start(spec, detached=True)
    server = await LocalServer.attach(started.fingerprint)
    await started.stop()
    try:
        assert (server.api_key, server.spec.model) == (KEY, str(model))
        body = {"lora_name": "poet", "lora_path": str(adapter)}
        await asyncio.to_thread(post, server, "/v1/load_lora_adapter", body)
        assert await server.note_adapters() == {"poet": str(adapter)}
        await check_that_it_comes_back(server, server.pid, "exit code -9")
        await check_that_it_comes_back(server, part(server, b"EngineCore"), "exit code 0")
        await check_that_it_comes_back(server, part(server, b"Worker"), "exit code 0")
        (model / "config.json").unlink()
        os.kill(server.pid, signal.SIGKILL)
        async with asyncio.timeout(BACK_SECONDS):
            reason = await server.follow()
        print(reason)
        assert reason.startswith("vLLM ended 5 times in a row; the last time it did not start: ")
        assert str(model) in reason
        assert session_members(server.pid) == []
        assert server.fingerprint not in [each.fingerprint for each in running_servers()]
    finally:
        with contextlib.suppress(ServerError):
            await server.end()
        await server.stop()


async def check_that_it_comes_back(server: LocalServer, victim: int, words: str) -> None:
    """Kill one of its processes: it is ready again, at its address, with its adapter."""
    url, before = server.url, session_members(server.pid)
    assert len(before) >= 3
    said: list[str] = []
    began = time.monotonic()
    back = asyncio.Event()
    following = asyncio.create_task(server.follow(lambda it: back.set(), progress=said.append))
    os.kill(victim, signal.SIGKILL)
    async with asyncio.timeout(BACK_SECONDS):
        await back.wait()
    following.cancel()
    print(f"back {time.monotonic() - began:.1f} s after kill -9: {said[0]}")
    assert words in said[0]
    assert server.url == url
    assert living().keys().isdisjoint(before)
    asked = {"model": "poet", "prompt": "The", "max_tokens": 4}
    answer = await asyncio.to_thread(post, server, "/v1/completions", asked)
    assert msgspec.json.decode(answer)["model"] == "poet"
    status = await server.status()
    assert (status.state, status.health) == ("ready", "ok")
    assert words in status.last_exit
    assert status.memory > 500 << 20


def post(server: LocalServer, path: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(
        server.url + path,
        msgspec.json.encode(body),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: bytes = answer.read()
    return found


def part(server: LocalServer, name: bytes) -> int:
    """The process of a server that has this name."""
    [found] = [pid for pid in session_members(server.pid) if name in title(pid)]
    return found


def title(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()
