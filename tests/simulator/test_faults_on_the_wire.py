"""Every fault, seen from a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import pytest

from tests.simulator.raw import (
    body_of,
    connect,
    events_of,
    exchange,
    read_all,
    read_answer,
    request,
)
from vllm_unified.simulator import Simulator, Timing

STREAM: dict[str, Any] = {"prompt": "Hi", "max_tokens": 8, "ignore_eos": True, "stream": True}
WHOLE: dict[str, Any] = {"prompt": "Hi", "max_tokens": 8, "ignore_eos": True}


@pytest.fixture
async def server() -> AsyncIterator[Simulator]:
    async with Simulator() as simulator:
        yield simulator


async def ask(server: Simulator, payload: dict[str, Any]) -> tuple[bytes, str]:
    return await exchange(server.url, request(payload, close=True))


async def healthy(server: Simulator) -> bool:
    received, _ = await ask(server, WHOLE)
    return received.startswith(b"HTTP/1.1 200 OK") and b'"finish_reason":"length"' in received


async def test_reset_before_the_answer(server: Simulator) -> None:
    server.fail_next("reset")
    assert await ask(server, WHOLE) == (b"", "reset")
    assert await healthy(server)


async def test_reset_after_some_tokens(server: Simulator) -> None:
    server.fail_next("reset_after", after_tokens=3)
    received, end = await ask(server, STREAM)
    assert end == "reset"
    assert len(events_of(received)) == 3


async def test_reset_in_the_middle_of_a_whole_answer(server: Simulator) -> None:
    server.fail_next("reset_after")
    received, end = await ask(server, WHOLE)
    assert end == "reset"
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert not received.endswith(b"}")


async def test_a_clean_close_without_an_end(server: Simulator) -> None:
    server.fail_next("close_after", after_tokens=2)
    received, end = await ask(server, STREAM)
    assert end == "closed"
    assert len(events_of(received)) == 2
    assert b"[DONE]" not in received
    assert not received.endswith(b"0\r\n\r\n")


async def test_a_stall_within_a_stream_ends(server: Simulator) -> None:
    server.fail_next("stall_after", after_tokens=2, seconds=0.2)
    async with connect(server.url) as (reader, writer):
        writer.write(request(STREAM, close=True))
        start = time.monotonic()
        for _ in range(2):
            await reader.readuntil(b"}\n\n")
        rest, _ = await read_all(reader)
        assert time.monotonic() - start >= 0.2
    assert b"[DONE]" in rest


async def test_a_stall_without_an_end_lasts_until_the_client_leaves(server: Simulator) -> None:
    server.fail_next("stall_after", after_tokens=1)
    async with connect(server.url) as (reader, writer):
        writer.write(request(STREAM))
        await reader.readuntil(b"}\n\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readuntil(b"}\n\n"), 0.1)
    await until(lambda: server.requests[0].done)
    assert server.requests[0].disconnected
    assert server.service.engine.unfinished == 0


async def test_a_stall_before_the_headers(server: Simulator) -> None:
    server.fail_next("stall")
    async with connect(server.url) as (reader, writer):
        writer.write(request(WHOLE))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)


async def test_an_error_frame_and_done(server: Simulator) -> None:
    server.fail_next("error_frame", after_tokens=2)
    received, end = await ask(server, STREAM)
    *tokens, error, done = events_of(received)
    assert (len(tokens), end, done) == (2, "closed", b"data: [DONE]")
    assert json.loads(error.removeprefix(b"data: "))["error"] == {
        "message": "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }


async def test_an_empty_500(server: Simulator) -> None:
    server.fail_next("error_500")
    received, _ = await ask(server, WHOLE)
    assert received.startswith(b"HTTP/1.1 500 ")
    expected = {"message": "", "type": "InternalServerError", "param": None, "code": 500}
    assert json.loads(body_of(received)) == {"error": expected}


async def test_busy(server: Simulator) -> None:
    server.fail_next("busy")
    received, _ = await ask(server, WHOLE)
    assert received.startswith(b"HTTP/1.1 503 ")
    assert b"The engine is currently busy and cannot accept new requests." in received


async def test_a_rate_limit_in_seconds_and_as_a_date(server: Simulator) -> None:
    server.fail_next("rate_limit", seconds=7)
    received, _ = await ask(server, WHOLE)
    assert received.startswith(b"HTTP/1.1 429 ")
    assert b"\r\nretry-after: 7\r\n" in received
    server.fail_next("rate_limit", seconds=60, retry_after="date")
    received, _ = await ask(server, WHOLE)
    value = received.partition(b"retry-after: ")[2].partition(b"\r\n")[0].decode()
    assert 50 < parsedate_to_datetime(value).timestamp() - time.time() < 70


@pytest.mark.parametrize("offset", [64, -64])
async def test_a_wrong_content_length(server: Simulator, offset: int) -> None:
    server.fail_next("wrong_length", offset=offset)
    received, _ = await ask(server, WHOLE)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    assert length == len(body) + offset


async def test_malformed_json(server: Simulator) -> None:
    server.fail_next("malformed_json")
    received, _ = await ask(server, WHOLE)
    with pytest.raises(json.JSONDecodeError):
        json.loads(body_of(received))
    server.fail_next("malformed_json")
    received, _ = await ask(server, STREAM)
    with pytest.raises(json.JSONDecodeError):
        json.loads(events_of(received)[0].removeprefix(b"data: "))


async def test_an_html_page(server: Simulator) -> None:
    server.fail_next("html", status=504)
    received, _ = await ask(server, WHOLE)
    assert received.startswith(b"HTTP/1.1 504 Gateway Timeout\r\n")
    assert b"content-type: text/html" in received
    assert b"<center>nginx" in received


EMOJI = {**STREAM, "structured_outputs": {"choice": ["😀 你好"]}, "max_tokens": 40}


async def test_characters_split_between_packets(server: Simulator) -> None:
    server.fail_next("split_utf8")
    text = await text_in_packets(server, EMOJI)
    assert text == "😀 你好"


async def test_one_byte_per_packet(server: Simulator) -> None:
    server.fail_next("byte_per_packet")
    text = await text_in_packets(server, EMOJI)
    assert text == "😀 你好"


async def text_in_packets(server: Simulator, payload: dict[str, Any]) -> str:
    """The text of a stream, of which at least one read must end inside a character."""
    received, inside = b"", 0
    async with connect(server.url) as (reader, writer):
        writer.write(request(payload, close=True))
        while data := await reader.read(65536):
            received += data
            try:
                received.decode()
            except UnicodeDecodeError:
                inside += 1
    assert inside > 0
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events_of(received)[:-1]]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


async def test_a_line_of_four_megabytes(server: Simulator) -> None:
    server.fail_next("long_line")
    received, _ = await ask(server, STREAM)
    first, *_ = events_of(received)
    assert len(first) > 4 * 1024 * 1024
    chunk = json.loads(first.removeprefix(b"data: "))
    assert chunk["choices"][0]["token_ids"] is None
    assert len(events_of(received)) == 9


async def test_a_connection_that_is_dead_when_used_again(server: Simulator) -> None:
    server.fail_next("stale_connection")
    async with connect(server.url) as (reader, writer):
        writer.write(request(WHOLE))
        head, _ = await read_answer(reader)
        assert head.startswith(b"HTTP/1.1 200 OK")
        writer.write(request(WHOLE))
        assert await read_all(reader) == (b"", "reset")
    assert await healthy(server)


async def test_a_server_that_reads_slowly(server: Simulator) -> None:
    server.fail_next("slow_reader", seconds=0.3)
    long = {**WHOLE, "prompt": "Hi", "user": "x" * 16_000_000}
    async with connect(server.url) as (reader, writer):
        head, _, body = request(long, close=True).partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(body)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.1)
        received, _ = await read_all(reader)
    assert received.startswith(b"HTTP/1.1 200 OK")


async def test_a_slow_reader_slows_the_server_down(server: Simulator) -> None:
    server.fail_next("long_line", size=20_000_000)
    async with connect(server.url) as (reader, writer):
        writer.write(request(STREAM, close=True))
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.1)
        assert not server.requests[0].done, "the handler waits for the socket"
        received, _ = await read_all(reader)
    assert b"[DONE]" in received


async def test_refused_connections(server: Simulator) -> None:
    server.fail_next("refuse")
    assert await ask(server, WHOLE) == (b"", "reset")
    with pytest.raises(ConnectionRefusedError):
        await ask(server, WHOLE)
    await server.start()
    assert await healthy(server)


async def test_connections_refused_for_a_time(server: Simulator) -> None:
    server.fail_next("refuse", seconds=0.1)
    await ask(server, WHOLE)
    with pytest.raises(ConnectionRefusedError):
        await ask(server, WHOLE)
    await until(lambda: server.running)
    assert await healthy(server)


async def test_an_engine_that_hangs_is_healthy(server: Simulator) -> None:
    server.fail_next("hang")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ask(server, WHOLE), 0.1)
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/health") as reply:
        assert reply.status == 200
    server.heal()
    assert await healthy(server)


async def test_an_engine_that_dies_fails_streams_and_exits() -> None:
    async with Simulator(engine_death_grace=0.1) as server:
        server.fail_next("die", after_tokens=2)
        received, _ = await ask(server, STREAM)
        *tokens, error, done = events_of(received)
        assert (len(tokens), done) == (2, b"data: [DONE]")
        assert b'"code": 500' in error
        async with aiohttp.ClientSession() as session, session.get(f"{server.url}/health") as reply:
            assert (reply.status, await reply.read()) == (503, b"")
        received, _ = await ask(server, WHOLE)
        assert received.startswith(b"HTTP/1.1 500 ")
        async with asyncio.timeout(30):
            await server.wait_stopped()
        with pytest.raises(ConnectionRefusedError):
            await ask(server, WHOLE)


async def test_a_killed_server_resets_and_refuses(server: Simulator) -> None:
    server.hang()
    async with connect(server.url) as (reader, writer):
        writer.write(request(STREAM))
        await reader.readuntil(b"\r\n\r\n")
        server.kill()
        assert await read_all(reader) == (b"", "reset")
    with pytest.raises(ConnectionRefusedError):
        await ask(server, WHOLE)
    assert not server.running


@pytest.mark.parametrize("turns", range(4))
async def test_a_connection_that_comes_with_the_end_is_not_left_open(turns: int) -> None:
    """After so many turns of the loop it waits, is accepted, or is about to be served."""
    loop = asyncio.get_running_loop()
    async with Simulator() as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_connection(address)) for _ in range(20)]
            for _ in range(turns):
                await asyncio.sleep(0)
            server.kill()
            for each in sockets:
                each.setblocking(False)
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.wait_for(loop.sock_recv(each, 1), 10) == b""


async def test_a_restarted_server_has_the_same_address_and_forgot_everything() -> None:
    async with Simulator(enable_lora=True) as server:
        url = server.url
        load = {"lora_name": "a", "lora_path": "models/a"}
        await exchange(url, request(load, path="/v1/load_lora_adapter", close=True))
        assert list(server.service.models.adapters) == ["a"]
        stopped = asyncio.create_task(server.wait_stopped())
        server.fail_next("restart")
        assert (await ask(server, WHOLE))[1] == "reset"
        await until(lambda: server.running)
        assert server.url == url
        assert await healthy(server)
        assert not server.service.models.adapters
        assert not stopped.done(), "a process that is restarted has not exited"
        stopped.cancel()


async def test_ten_times_slower() -> None:
    timing = Timing(time_to_first_token=0.01, inter_token_latency=0.005)
    async with Simulator(timing=timing) as server:
        fast = min([await seconds(server) for _ in range(3)])
        server.fail_next("slow", factor=10)
        slow = await seconds(server)
        assert slow > 4 * fast
        server.heal()
        assert min([await seconds(server) for _ in range(3)]) < slow / 3


async def seconds(server: Simulator) -> float:
    start = time.monotonic()
    assert await healthy(server)
    return time.monotonic() - start


async def until(condition: Any) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(30):
        # What is waited for is the server's own state, which no event announces.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
