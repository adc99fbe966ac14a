"""An HTTP/1.1 server, small enough to break on purpose.

One :class:`Connection` per socket, one :class:`Exchange` per request. It behaves as uvicorn with
httptools does for vLLM: lower-case header names, ``date`` and ``server`` first, chunked bodies, an
idle connection closed after the keep-alive time, and a client that goes away cancels its handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import socket
import struct
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Protocol, cast
from urllib.parse import parse_qsl, unquote

import httptools

Header = tuple[str, str]
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class Request:
    """What arrived: method, path, query, headers and the whole body."""

    __slots__ = ("body", "headers", "method", "path", "raw_target", "received", "reused")

    def __init__(self, method: str, target: str, headers: dict[str, str], *, reused: bool) -> None:
        self.method = method
        self.raw_target = target
        self.path = unquote(target.partition("?")[0])
        self.headers = headers
        self.body = b""
        self.reused = reused
        self.received = time.monotonic()

    @property
    def query(self) -> list[tuple[str, str]]:
        """Query parameters, in order, repeated names included."""
        return parse_qsl(self.raw_target.partition("?")[2], keep_blank_values=True)


class Application(Protocol):
    """What answers requests."""

    keep_alive: float
    """Seconds an idle connection lives."""

    def connected(self, connection: Connection) -> None:
        """Told of every new connection."""

    def disconnected(self, connection: Connection) -> None:
        """Told when a connection is gone."""

    def head(self, request: Request, connection: Connection) -> None:
        """Told when a request's headers are complete and its body may still be coming."""

    async def handle(self, request: Request, exchange: Exchange) -> None:
        """Answer one request; cancelled when the client goes away."""


class Exchange:
    """One answer being written.

    Everything that sends waits for the socket to take the bytes, so a slow reader slows the
    handler down and nothing piles up in memory.
    """

    def __init__(self, connection: Connection, request: Request, *, close: bool) -> None:
        self.connection = connection
        self.request = request
        self.status: int | None = None
        """Status sent, or ``None`` before."""
        self.body_bytes = 0
        """Bytes of body sent, framing excluded."""
        self.finished = False
        self.closing = close
        """Whether the connection closes after this answer."""
        self._chunked = False
        self._bodiless = request.method == "HEAD"

    async def respond(self, status: int, body: bytes = b"", headers: Sequence[Header] = ()) -> None:
        """Send a whole answer, with its length."""
        after = [header for header in headers if header[0] in ("content-type", "location")]
        before = [header for header in headers if header not in after]
        length = ("content-length", str(len(body)))
        head = self._head(status, [*before, length, *after])
        self.body_bytes = len(body)
        await self.raw(head if self._bodiless else head + body)
        self._finish()

    async def start(self, status: int, headers: Sequence[Header] = ()) -> None:
        """Send the head of an answer whose body comes in chunks."""
        self._chunked = True
        await self.raw(self._head(status, headers))

    async def event(self, data: bytes, tokens: int = 0) -> None:
        """Send one event of a stream, in one write; it stands for that many tokens."""
        self.body_bytes += len(data)
        await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        """End a chunked body."""
        await self.raw(b"0\r\n\r\n")
        self._finish()

    async def raw(self, data: bytes) -> None:
        """Send bytes that need not be HTTP."""
        self.connection.write(data)
        await self.connection.drain()

    def reset(self) -> None:
        """Cut the connection with a TCP reset, dropping what was not sent yet."""
        self.finished = True
        self.connection.reset()

    def close(self) -> None:
        """Close the connection cleanly, whatever state the answer is in."""
        self.finished = True
        self.connection.close()

    def _head(self, status: int, headers: Sequence[Header]) -> bytes:
        self.status = status
        lines = [_STATUS_LINES[status], _date_and_server()]
        lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in headers]
        if status != HTTPStatus.UNAUTHORIZED:
            # Authentication stands outside the CORS middleware, which adds it to all else.
            lines.append(b"vary: Origin\r\n")
        if self.closing:
            lines.append(b"connection: close\r\n")
        if self._chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        return b"".join(lines) + b"\r\n"

    def _finish(self) -> None:
        self.finished = True
        if self.closing:
            self.connection.close()


_date_cache: tuple[int, bytes] = (0, b"")


def _date_and_server() -> bytes:
    global _date_cache
    now = int(time.time())
    if now != _date_cache[0]:
        stamp = email.utils.formatdate(now, usegmt=True)
        _date_cache = (now, f"date: {stamp}\r\nserver: uvicorn\r\n".encode())
    return _date_cache[1]


class Connection(asyncio.Protocol):
    """One client socket: parses requests and hands them over one after the other."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._target = b""
        self._headers: dict[str, str] = {}
        self._request: Request | None = None
        self._body: list[bytes] = []
        self._task: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._backlog: list[tuple[Request, bool]] = []
        self.served = 0
        """Requests answered on this connection."""
        self.broken = False
        """Set by a fault: the next request on this connection finds it dead."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: asyncio's callback."""
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._app.connected(self)
        self._arm_idle_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """End: asyncio's callback; the handler of an open request is cancelled."""
        self._transport = None
        self._disarm_idle_timer()
        self._writable.set()
        if self._task is not None:
            self._task.cancel()
        self._app.disconnected(self)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client: asyncio's callback."""
        self._disarm_idle_timer()
        if self.broken:
            self.reset()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.close()
        except httptools.HttpParserError:
            self._refuse_garbage()

    def pause_writing(self) -> None:
        """The socket is full: asyncio's callback."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The socket takes bytes again: asyncio's callback."""
        self._writable.set()

    def on_message_begin(self) -> None:
        """A request begins: the parser's callback."""
        self._target = b""
        self._headers = {}
        self._body = []

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target: the parser's callback."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header: the parser's callback."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """All headers are here: the parser's callback."""
        method = self._parser.get_method().decode("latin-1")
        target = self._target.decode("latin-1")
        self._request = Request(method, target, self._headers, reused=self.served > 0)
        if self._headers.get("expect", "").lower() == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._app.head(self._request, self)

    def on_body(self, body: bytes) -> None:
        """A piece of the body: the parser's callback."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole: the parser's callback."""
        request = self._request
        if request is None:
            return
        request.body = b"".join(self._body)
        close = not self._parser.should_keep_alive()
        if self._task is None:
            self._begin(request, close)
        else:
            self._backlog.append((request, close))

    def write(self, data: bytes) -> None:
        """Hand bytes to the socket; silently nothing when the client is gone."""
        if self._transport is not None:
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the socket takes more."""
        if not self._writable.is_set():
            await self._writable.wait()

    def pause_reading(self) -> None:
        """Take no more bytes from the client, until :meth:`resume_reading`."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Take bytes from the client again."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        """Close after what is buffered was sent."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Close with a TCP reset."""
        if self._transport is None:
            return
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _begin(self, request: Request, close: bool) -> None:
        exchange = Exchange(self, request, close=close)
        self._task = self._loop.create_task(self._app.handle(request, exchange))
        self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self.served += 1
        if task.cancelled():
            self.close()
        elif (error := task.exception()) is not None:
            self._loop.call_exception_handler(
                {"message": "the simulator's handler failed", "exception": error, "task": task}
            )
            self.close()
        elif self._backlog:
            self._begin(*self._backlog.pop(0))
        else:
            self._arm_idle_timer()

    def _refuse_garbage(self) -> None:
        body = b"Invalid HTTP request received."
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\n"
        self.write(head + b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body))
        self.close()

    def _arm_idle_timer(self) -> None:
        self._idle = self._loop.call_later(self._app.keep_alive, self.close)

    def _disarm_idle_timer(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
