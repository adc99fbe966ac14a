"""LocalServer with the real vLLM. The engine is installed once, into the user's own cache."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.support.vllm import OWN_SERVERS
from vllm_unified.errors import ServerStartError
from vllm_unified.servers import LocalServer, ServerSpec, running_servers
from vllm_unified.servers.guard import session_members

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.live,
    OWN_SERVERS,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="servers run on Linux only"),
]

HOLDER = """
import asyncio, sys
import msgspec
from vllm_unified.servers import LocalServer, ServerSpec

async def main():
    spec = msgspec.json.decode(sys.argv[1], type=ServerSpec)
    async with await LocalServer.start(spec) as server:
        print(server.pid, flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""

# A name that no other test gives, so that these servers are shared with nobody.
SPEC = ServerSpec(served_model_name="servers-test", api_key="sk-live", max_model_len=1024)


def post(server: LocalServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        server.url + path,
        json.dumps({"model": server.model, **body}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


async def seconds_until(condition: Callable[[], bool], limit: float) -> float:
    began = time.monotonic()
    async with asyncio.timeout(limit):
        while not condition():  # noqa: ASYNC110 - it comes true in another process
            await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_the_bundled_model_answers_and_two_at_once_share_it() -> None:
    one, two = await asyncio.gather(LocalServer.start(SPEC), LocalServer.start(SPEC))
    async with one, two:
        assert one.pid == two.pid
        assert sorted([one.shared, two.shared]) == [False, True]
        question = {"role": "user", "content": "What is the capital of France?"}
        body = {"messages": [question], "max_tokens": 30, "temperature": 0}
        answer = await asyncio.to_thread(post, one, "/v1/chat/completions", body)
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert len(session_members(one.pid)) >= 3
        assert "sk-live" not in one.log_path.read_text()
    assert session_members(one.pid) == []


async def test_a_killed_program_leaves_no_vllm() -> None:
    with subprocess.Popen(  # noqa: ASYNC220 - it starts at once
        [sys.executable, "-c", HOLDER, msgspec.json.encode(SPEC).decode()],
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        pid = int(await asyncio.to_thread(holder.stdout.readline))
        assert len(session_members(pid)) >= 3
        holder.kill()
        took = await seconds_until(lambda: not session_members(pid), 10)
    print(f"no vLLM {took:.2f} s after kill -9 of its user")


async def test_a_killed_supervisor_leaves_no_vllm() -> None:
    async with await LocalServer.start(SPEC) as server:
        [record] = [found for found in running_servers() if found.pid == server.pid]
        os.kill(record.supervisor_pid, signal.SIGKILL)
        took = await seconds_until(lambda: not session_members(server.pid), 10)
    print(f"no vLLM {took:.2f} s after kill -9 of its supervisor")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "/nope/model"}, "There is no folder /nope/model"),
        ({"extra_args": ("--no-such-flag",)}, "unrecognized arguments: --no-such-flag"),
        ({"kv_cache_gib": 900.0}, "less than requested memory for kv"),
    ],
)
async def test_a_failing_start_is_told_in_the_engines_words(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ServerStartError, match=words) as caught:
        await LocalServer.start(msgspec.structs.replace(SPEC, **change))
    assert "See root cause" not in caught.value.message


async def test_a_cancelled_start_leaves_no_vllm() -> None:
    said: list[str] = []
    start = asyncio.create_task(LocalServer.start(SPEC, progress=said.append))
    await seconds_until(lambda: "starting the engine" in said, 120)
    [record] = [found for found in running_servers() if found.model == SPEC.name]
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await seconds_until(lambda: not session_members(record.pid), 10)
