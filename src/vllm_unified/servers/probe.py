"""Is a vLLM ready? Only a token proves it: ``/health`` answers before, and lies after.

A supervisor has no HTTP library: it is one of many small processes, and asks little.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

_ANSWER_LIMIT = 1 << 20


class Answer(msgspec.Struct, frozen=True):
    """An HTTP answer."""

    status: int
    body: bytes


class Contact(msgspec.Struct, frozen=True, kw_only=True):
    """A vLLM server as its supervisor reaches it."""

    host: str
    port: int
    model: str
    api_key: str | None

    def __repr__(self) -> str:
        return f"Contact({self.model!r} at {self.host}:{self.port})"

    async def generates(self) -> bool:
        """:func:`generates`, of this server."""
        return await generates(self.host, self.port, self.model, self.api_key)

    async def ask(self, method: str, path: str, body: object = None) -> Answer:
        """The server's answer, however long it takes.

        Raises:
            OSError: nobody is there, or the connection breaks.
            ValueError: what answers does not speak HTTP.
        """
        return await _ask(self.host, self.port, method, path, self.api_key, body)

    async def look(self, path: str, seconds: float) -> bytes | None:
        """What is at ``path``; ``None`` where there is no 200 in time."""
        try:
            async with asyncio.timeout(seconds):
                answer = await self.ask("GET", path)
        except (OSError, ValueError, TimeoutError):
            return None
        return answer.body if answer.status == 200 else None


async def generates(host: str, port: int, model: str, api_key: str | None) -> bool:
    """Ask for one token; whether the server is ready.

    A model that generates no text (an embedding model) is ready when the server lists it. Not
    ready are a refused connection and a 5xx.

    Raises:
        PermissionError: the server does not accept the key.
        ValueError: what answers is not a vLLM server.
    """
    body = {"model": model, "prompt": "1", "max_tokens": 1, "temperature": 0}
    try:
        answer = await _ask(host, port, "POST", "/v1/completions", api_key, body)
        if answer.status in {400, 404, 501}:
            answer = await _ask(host, port, "GET", "/v1/models", api_key, None)
    except OSError:
        return False
    if answer.status in {401, 403}:
        raise PermissionError(f"the server answers {answer.status} to its own key")
    return answer.status == 200


async def _ask(
    host: str, port: int, method: str, path: str, api_key: str | None, body: object
) -> Answer:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request_bytes(method, path, host, api_key, body))
        return parse_answer(await _read_all(reader))
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    data = b""
    while len(data) < _ANSWER_LIMIT and (chunk := await reader.read(_ANSWER_LIMIT)):
        data += chunk
    return data


def request_bytes(method: str, path: str, host: str, api_key: str | None, body: object) -> bytes:
    """An HTTP/1.0 request: the server closes the connection after its whole answer."""
    payload = b"" if body is None else msgspec.json.encode(body)
    lines = [
        f"{method} {path} HTTP/1.0",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
    ]
    if api_key:
        lines.append(f"Authorization: Bearer {api_key}")
    return "\r\n".join([*lines, "", ""]).encode() + payload


def parse_answer(data: bytes) -> Answer:
    """The status and body in a whole HTTP answer.

    Raises:
        ConnectionError: it is empty.
        ValueError: it is not HTTP.
    """
    if not data:
        raise ConnectionError("the connection closed without an answer")
    head, _, body = data.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if not head.startswith(b"HTTP/1.") or len(words) < 2 or not words[1].isdigit():
        raise ValueError("what listens on the port does not speak HTTP")
    return Answer(int(words[1]), body)
