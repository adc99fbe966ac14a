"""Leaving a stream half-way, in every way: the server stops generating within a second."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from tests.live.conftest import MAX_IN_FLIGHT
from tests.live.observing import connections_to, seconds_until_requests
from tests.support.waiting import eventually
from vllm_unified import AsyncVllmUnified, ClientClosedError, GenerationStream, VllmUnified

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]

PROMPT = "Once upon a time"
LONG: dict[str, Any] = {"max_tokens": 1900, "ignore_eos": True}
LIMIT_SECONDS = 1.0


@pytest.fixture
async def vllm(url: str) -> AsyncIterator[AsyncVllmUnified]:
    async with AsyncVllmUnified(api_url=url, timeout=60, max_retries=0) as client:
        yield client


@pytest.fixture
def blocking(url: str) -> Iterator[VllmUnified]:
    with VllmUnified(api_url=url, timeout=60, max_retries=0) as client:
        yield client


async def check_left(url: str, client: AsyncVllmUnified, how: str) -> None:
    """The server's engine, the client's slots and the connections are free, in time."""
    took = await seconds_until_requests(url, 0, within=LIMIT_SECONDS)
    print(f"{how}: no requests after {took * 1000:.0f} ms")
    (endpoint,) = client.list_endpoints()
    assert (endpoint.in_flight, endpoint.waiting) == (0, 0)
    await eventually(lambda: connections_to(url) == 0, LIMIT_SECONDS - took)


async def read(stream: GenerationStream[Any], count: int) -> None:
    async for _ in stream:
        count -= 1
        if not count:
            return


async def begin(stream: GenerationStream[Any], url: str, *, requests: int = 1) -> None:
    """Read until the engine is seen at work."""
    await read(stream, 3)
    await seconds_until_requests(url, requests, within=5)


async def test_break_inside_the_block(vllm: AsyncVllmUnified, url: str) -> None:
    async with vllm.stream(PROMPT, **LONG) as stream:
        async for _ in stream:
            await seconds_until_requests(url, 1, within=5)
            break
    assert stream.ending == "cancelled"
    await check_left(url, vllm, "break inside 'async with'")


async def test_an_exception_inside_the_block(vllm: AsyncVllmUnified, url: str) -> None:
    with suppress(ZeroDivisionError):
        async with vllm.stream(PROMPT, **LONG) as stream:
            await begin(stream, url)
            raise ZeroDivisionError
    await check_left(url, vllm, "exception inside 'async with'")


async def test_break_without_a_block_warns(vllm: AsyncVllmUnified, url: str) -> None:
    async def leave() -> None:
        async for _ in vllm.stream(PROMPT, **LONG):
            await seconds_until_requests(url, 1, within=5)
            break

    with pytest.warns(ResourceWarning, match="use 'async with'"):
        await leave()
    await check_left(url, vllm, "break without a block")


async def test_a_stream_in_a_cycle_is_closed_by_the_collector(
    vllm: AsyncVllmUnified, url: str
) -> None:
    cycle: dict[str, Any] = {"stream": vllm.stream(PROMPT, **LONG)}
    cycle["itself"] = cycle
    await begin(cycle["stream"], url)
    del cycle
    with pytest.warns(ResourceWarning, match="use 'async with'"):
        await asyncio.to_thread(gc.collect)  # the collector runs in any thread
    await check_left(url, vllm, "garbage collection")


async def test_the_warning_as_an_error_keeps_nothing_open(vllm: AsyncVllmUnified, url: str) -> None:
    """Under ``python -W error`` the warning is raised, inside of the collector."""
    with ignored_exceptions() as ignored:
        stream = vllm.stream(PROMPT, **LONG)
        await begin(stream, url)
        del stream
    assert isinstance(ignored[0], ResourceWarning)
    ignored.clear()
    await check_left(url, vllm, "garbage collection with -W error")


@contextmanager
def ignored_exceptions() -> Iterator[list[BaseException | None]]:
    """What is raised where nobody can catch it."""
    found: list[BaseException | None] = []
    usual = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: found.append(unraisable.exc_value)
    try:
        yield found
    finally:
        sys.unraisablehook = usual


async def test_close(vllm: AsyncVllmUnified, url: str) -> None:
    stream = vllm.stream(PROMPT, **LONG)
    await begin(stream, url)
    await stream.close()
    assert stream.ending == "cancelled"
    await check_left(url, vllm, "close()")


async def test_a_cancelled_task(vllm: AsyncVllmUnified, url: str) -> None:
    stream = vllm.stream(PROMPT, **LONG)
    task = asyncio.create_task(stream.collect())
    await seconds_until_requests(url, 1, within=5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stream.ending == "cancelled"
    await check_left(url, vllm, "task.cancel()")


async def test_a_cancelled_task_without_a_block(vllm: AsyncVllmUnified, url: str) -> None:
    stream = vllm.stream(PROMPT, **LONG)
    task = asyncio.create_task(read(stream, 10_000))
    await seconds_until_requests(url, 1, within=5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await check_left(url, vllm, "task.cancel() without a block")


async def test_a_timeout_of_the_caller(vllm: AsyncVllmUnified, url: str) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await vllm.stream(PROMPT, **LONG).collect()
    await check_left(url, vllm, "asyncio.timeout()")


async def test_the_total_timeout(vllm: AsyncVllmUnified, url: str) -> None:
    with pytest.raises(TimeoutError, match=r"did not end within 0\.5 s"):
        await vllm.stream(PROMPT, total_timeout=0.5, **LONG).collect()
    await check_left(url, vllm, "total_timeout")


async def test_a_request_without_stream_is_cancelled(vllm: AsyncVllmUnified, url: str) -> None:
    task = asyncio.create_task(vllm.generate(PROMPT, **LONG))
    await seconds_until_requests(url, 1, within=5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await check_left(url, vllm, "a request without stream, task.cancel()")


async def test_a_request_without_stream_runs_out_of_time(vllm: AsyncVllmUnified, url: str) -> None:
    with pytest.raises(TimeoutError, match=r"no answer within 0\.5 s"):
        await vllm.generate(PROMPT, timeout=0.5, **LONG)
    await check_left(url, vllm, "a request without stream, timeout")


async def test_a_batch_is_cancelled(vllm: AsyncVllmUnified, url: str) -> None:
    task = asyncio.create_task(vllm.batch([PROMPT] * 8, **LONG))
    await seconds_until_requests(url, 8, within=5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await check_left(url, vllm, "a batch of 8, task.cancel()")


async def test_many_streams_at_once(vllm: AsyncVllmUnified, url: str) -> None:
    count = MAX_IN_FLIGHT // 2
    streams = [vllm.stream(PROMPT, **LONG) for _ in range(count)]
    tasks = [asyncio.create_task(stream.collect()) for stream in streams]
    await seconds_until_requests(url, count, within=10)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    await check_left(url, vllm, f"{count} streams, task.cancel()")


async def test_the_client_is_closed(url: str) -> None:
    async with AsyncVllmUnified(api_url=url, timeout=60) as vllm:
        stream = vllm.stream(PROMPT, **LONG)
        await begin(stream, url)
    took = await seconds_until_requests(url, 0, within=LIMIT_SECONDS)
    print(f"client closed: no requests after {took * 1000:.0f} ms")
    await stream.close()


# The blocking client.


async def test_blocking_break_inside_the_block(blocking: VllmUnified, url: str) -> None:
    def leave() -> None:
        with blocking.stream(PROMPT, **LONG) as stream:
            for _ in stream:
                break

    await asyncio.to_thread(leave)
    await check_left(url, blocking._client, "blocking, break inside 'with'")


async def test_blocking_break_without_a_block_warns(blocking: VllmUnified, url: str) -> None:
    def leave() -> None:
        for _ in blocking.stream(PROMPT, **LONG):
            break

    with pytest.warns(ResourceWarning, match="use 'async with'"):
        await asyncio.to_thread(leave)
    await check_left(url, blocking._client, "blocking, break without a block")


async def test_blocking_client_is_closed_by_another_thread(blocking: VllmUnified, url: str) -> None:
    reading = asyncio.create_task(asyncio.to_thread(blocking.stream(PROMPT, **LONG).collect))
    await seconds_until_requests(url, 1, within=5)
    await asyncio.to_thread(blocking.close)
    took = await seconds_until_requests(url, 0, within=LIMIT_SECONDS)
    print(f"blocking client closed: no requests after {took * 1000:.0f} ms")
    with pytest.raises(ClientClosedError):
        await reading


BLOCKING = """
import sys
from vllm_unified import VllmUnified

with VllmUnified(timeout=60) as vllm:
    try:
        for chunk in vllm.stream("Once upon a time", max_tokens=1900, ignore_eos=True):
            print("token", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    sys.stdin.read()
    print(vllm.generate("Hi", max_tokens=1).finish_reason, flush=True)
"""

BLOCKING_WHOLE = """
import sys
from vllm_unified import VllmUnified

with VllmUnified(timeout=60) as vllm:
    try:
        print("token", flush=True)
        vllm.generate("Once upon a time", max_tokens=1900, ignore_eos=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    sys.stdin.read()
    print(vllm.generate("Hi", max_tokens=1).finish_reason, flush=True)
"""

ASYNC = """
import asyncio, sys
from vllm_unified import AsyncVllmUnified

async def main():
    async with AsyncVllmUnified(timeout=60) as vllm:
        async for chunk in vllm.stream("Once upon a time", max_tokens=1900, ignore_eos=True):
            print("token", flush=True)

async def again():
    async with AsyncVllmUnified(timeout=60) as vllm:
        print((await vllm.generate("Hi", max_tokens=1)).finish_reason, flush=True)

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted", flush=True)
sys.stdin.read()
asyncio.run(again())
"""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(BLOCKING, id="blocking"),
        pytest.param(BLOCKING_WHOLE, id="blocking-without-stream"),
        pytest.param(ASYNC, id="async"),
    ],
)
async def test_ctrl_c(
    program: str, url: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The program lives on, so that it is not its death that ends the request."""
    monkeypatch.setenv("VLLM_API_URL", url)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", program),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"token\n"
        await seconds_until_requests(url, 1, within=10)
        process.send_signal(signal.SIGINT)
        took = await seconds_until_requests(url, 0, within=LIMIT_SECONDS)
        print(f"Ctrl-C, {request.node.callspec.id}: no requests after {took * 1000:.0f} ms")
        printed, complaints = await process.communicate(b"")
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    assert printed.decode().replace("token\n", "").split() == ["interrupted", "length"]
    assert complaints == b""
    assert process.returncode == 0
