"""The fixed-answer mode: the same bytes for every request, as fast as Python can send them.

For benchmarks of clients and proxies, which want a server that is never the bottleneck. Requests
are framed (head, Content-Length, body) but not parsed: a body with ``"stream":true`` gets the
stream, every other POST and every GET the whole answer. Each chunk of a stream is a ``send`` of
its own, never joined with the next.
"""

from __future__ import annotations

import asyncio
import os
import socket
from functools import cache
from typing import Protocol, cast

import msgspec

_HEAD = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\n"
_BURST = 25
"""Chunks that one connection may send in one turn of the event loop."""


def whole_answer(text: str) -> bytes:
    """A whole answer; it has the fields of both dialects."""
    quoted = msgspec.json.encode(text)
    body = (
        b'{"id":"cmpl-fixed","object":"text_completion","created":0,"model":"sim","choices":'
        b'[{"index":0,"text":%b,"message":{"role":"assistant","content":%b},"logprobs":null,'
        b'"finish_reason":"stop","stop_reason":null}],"usage":{"prompt_tokens":1,'
        b'"total_tokens":2,"completion_tokens":1}}'
    ) % (quoted, quoted)
    head = b"content-length: %d\r\ncontent-type: application/json\r\n\r\n" % len(body)
    return _HEAD + head + body


def stream_answer(chunks: int) -> tuple[bytes, ...]:
    """A stream with so many chunks of text; each is to be sent by itself."""
    head = (
        _HEAD
        + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    return (
        head + _chunk(_DELTA % b"null"),
        *[_chunk(_DELTA % b"null")] * (chunks - 2),
        _chunk(_DELTA % b'"stop"'),
        _chunk(b"[DONE]") + b"0\r\n\r\n",
    )


def _chunk(payload: bytes) -> bytes:
    data = b"data: %b\n\n" % payload
    return b"%x\r\n%b\r\n" % (len(data), data)


_DELTA = (
    b'{"id":"cmpl-fixed","object":"text_completion","created":0,"model":"sim","choices":[{"index":0,'
    b'"text":" tick","delta":{"content":" tick"},"logprobs":null,"finish_reason":%b}]}'
)
_CHOICE = (
    b'{"index":%d,"text":" Hello","logprobs":null,"finish_reason":"stop","stop_reason":null,'
    b'"token_ids":[1],"prompt_token_ids":[1]}'
)
_SEVERAL = (
    b'{"id":"cmpl-fixed","object":"text_completion","created":0,"model":"sim","choices":[%b],'
    b'"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}}'
)
_LIST = (b'"prompt":["', b'"prompt":[[')


class _Prompts(msgspec.Struct):
    prompt: list[msgspec.Raw]


_PROMPTS = msgspec.json.Decoder(_Prompts)


@cache
def several(prompts: int) -> bytes:
    """The whole answer to so many prompts, with the token ids of each."""
    choices = b",".join(_CHOICE % index for index in range(prompts))
    body = _SEVERAL % (choices, prompts, 2 * prompts, prompts)
    head = b"content-length: %d\r\ncontent-type: application/json\r\n\r\n" % len(body)
    return _HEAD + head + body


CHUNKS = 100
"""Chunks of text in the stream."""
WHOLE = whole_answer(" Hello")
STREAM = stream_answer(CHUNKS)


class Listener(Protocol):
    """Told of connections: the simulator."""

    def connected(self, connection: FixedConnection) -> None:
        """A connection began."""

    def disconnected(self, connection: FixedConnection) -> None:
        """A connection ended."""


class FixedConnection(asyncio.Protocol):
    """One client socket of the fixed-answer mode.

    It writes to the file descriptor itself, past the transport, whose buffer would join chunks and
    costs more than the system call; what the socket does not take goes through the transport.
    """

    def __init__(
        self, listener: Listener, *, whole: bytes = WHOLE, stream: tuple[bytes, ...] = STREAM
    ) -> None:
        self._listener = listener
        self._whole = whole
        self._chunks = stream
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._descriptor = -1
        self._buffer = b""
        self._pending: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: asyncio's callback."""
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=0)
        sock = transport.get_extra_info("socket")
        self._descriptor = sock.fileno()
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._listener.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End: asyncio's callback."""
        self._transport = None
        self._pending = None
        self._listener.disconnected(self)

    def resume_writing(self) -> None:
        """The socket takes bytes again: asyncio's callback."""
        if self._pending is not None:
            self._stream(self._pending)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client: asyncio's callback."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        end = data.find(b"\r\n\r\n")
        if end < 0 or len(data) < end + 4 + _content_length(data, end):
            self._buffer = data
        elif data.find(b'"stream":true', end) > 0 or data.find(b'"stream": true', end) > 0:
            self._stream(0)
        elif data.find(_LIST[0], end) > 0 or data.find(_LIST[1], end) > 0:
            self._send(several(len(_PROMPTS.decode(data[end + 4 :]).prompt)))
        else:
            self._send(self._whole)

    def close(self) -> None:
        """Close after what is buffered was sent."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _stream(self, position: int) -> None:
        """Send some chunks, each with a call of its own, then let other connections have a turn."""
        self._pending = None
        if self._transport is None or self._transport.is_closing():
            return
        chunks = self._chunks
        end = min(position + _BURST, len(chunks))
        write, descriptor = os.write, self._descriptor
        try:
            while position < end:
                data = chunks[position]
                position += 1
                if (sent := write(descriptor, data)) < len(data):
                    self._wait(data[sent:], position)
                    return
        except BlockingIOError:
            self._wait(chunks[position - 1], position)
        except OSError:
            self._transport.abort()
        else:
            if position < len(chunks):
                self._loop.call_soon(self._stream, position)

    def _wait(self, rest: bytes, position: int) -> None:
        """The socket is full: leave the rest to the transport and go on once it is through."""
        self._pending = position
        if self._transport is not None:
            self._transport.write(rest)

    def _send(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        try:
            sent = os.write(self._descriptor, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._transport.abort()
            return
        if sent < len(data):
            self._transport.write(data[sent:])


def _content_length(data: bytes, end: int) -> int:
    start = data.find(b"ontent-", 0, end)
    while start >= 0:
        if data[start + 7 : start + 14].lower() == b"length:":
            return int(data[start + 14 : data.find(b"\r\n", start)])
        start = data.find(b"ontent-", start + 7, end)
    return 0
