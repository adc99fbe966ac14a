"""Raw sockets: what really crosses the wire, byte by byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def request(payload: Any, *, path: str = "/v1/completions", close: bool = False) -> bytes:
    """A POST of JSON."""
    body = json.dumps(payload).encode()
    connection = "connection: close\r\n" if close else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        f"{connection}content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Wire]:
    """A connection to a server's address, which reads ahead no more than 64 KiB."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=65536)
    try:
        yield reader, writer
    finally:
        writer.close()


async def exchange(url: str, data: bytes) -> tuple[bytes, str]:
    """Send bytes and read until the end: what came, and ``closed`` or ``reset``."""
    async with connect(url) as (reader, writer):
        writer.write(data)
        return await read_all(reader)


async def read_all(reader: asyncio.StreamReader) -> tuple[bytes, str]:
    """Everything that comes, and how it ends."""
    received = []
    try:
        while data := await reader.read(65536):
            received.append(data)
    except ConnectionResetError:
        return b"".join(received), "reset"
    return b"".join(received), "closed"


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of one answer that tells its length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head, await reader.readexactly(length)


def body_of(received: bytes) -> bytes:
    """The body of a whole answer, chunks joined."""
    head, _, body = received.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head:
        return body
    joined = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        joined += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return joined


def events_of(received: bytes) -> list[bytes]:
    """Complete events of a stream, as far as it got."""
    return [event for event in body_of(received).split(b"\n\n") if event.startswith(b"data: ")]
