"""Readiness, against servers that are ready, busy, of another kind, or no servers."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from vllm_unified.servers.probe import generates, parse_answer, request_bytes
from vllm_unified.servers.starter import free_port, server_url

if TYPE_CHECKING:
    from collections.abc import Mapping


async def probed(answers: Mapping[str, bytes], key: str | None = None) -> bool:
    """Probe a server with an answer per path."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answers[head.split(b" ")[1].decode()])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await generates("127.0.0.1", port, "m", key)


def status(code: int) -> bytes:
    return f"HTTP/1.1 {code} Whatever\r\nContent-Length: 2\r\n\r\n{{}}".encode()


@pytest.mark.parametrize(
    ("completions", "models", "ready"),
    [(200, 500, True), (503, 200, False), (500, 200, False), (404, 200, True), (400, 503, False)],
)
async def test_a_token_is_the_proof(completions: int, models: int, ready: bool) -> None:
    answers = {"/v1/completions": status(completions), "/v1/models": status(models)}
    assert await probed(answers) is ready


async def test_nobody_is_there() -> None:
    assert not await generates("127.0.0.1", free_port("127.0.0.1"), "m", None)


async def test_a_connection_that_closes_is_not_ready() -> None:
    assert not await probed({"/v1/completions": b""})


async def test_a_refused_key_is_an_error() -> None:
    with pytest.raises(PermissionError, match="401"):
        await probed({"/v1/completions": status(401)}, "wrong")


async def test_another_protocol_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not speak HTTP"):
        await probed({"/v1/completions": b"SSH-2.0-OpenSSH\r\n"})


def test_the_request_is_whole() -> None:
    head, _, body = request_bytes("POST", "/x", "h", "k", {"a": 1}).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /x HTTP/1.0\r\nHost: h\r\n")
    assert head.endswith(b"Content-Length: 7\r\nAuthorization: Bearer k")
    assert json.loads(body) == {"a": 1}


def test_an_answer_has_a_body() -> None:
    answer = parse_answer(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n{}")
    assert (answer.status, answer.body) == (200, b"{}")


def test_addresses_can_be_reached_from_here() -> None:
    assert server_url("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert server_url("::", 1) == "http://[::1]:1"
    assert server_url("localhost", 1) == "http://localhost:1"
