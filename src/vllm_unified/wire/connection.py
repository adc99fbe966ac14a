"""One connection, and the answers that arrive on it, one at a time.

The only module that parses HTTP, and that knows httptools. Errors are told where they are noticed:
as an exception, to whoever waits for the answer.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections.abc import Iterator, Mapping
from typing import Protocol, cast

import httptools

from vllm_unified.errors import (
    ConnectionLostError,
    ProtocolError,
    ResponseTooLargeError,
    TLSError,
    VllmError,
)

MAX_HEAD_BYTES = 2**17
"""Of an answer's status line and headers."""
_MAX_HELD_BYTES = 2**18
"""Of a body that nobody reads; then the connection is not read either."""
_JOINED_BYTES = 2**16
"""A larger body is not copied behind its head."""
_PEEK_SECONDS = 0.1
"""What was idle for less is not asked whether it still lives: the event loop would know."""
_TLS_ALERT = b"\x15\x03"


class Headers(Mapping[str, str]):
    """Headers of an answer; names in any case. Of several with one name it has the last."""

    __slots__ = ("_fields",)

    def __init__(self, fields: dict[bytes, bytes]) -> None:
        """``fields`` have names in lower case."""
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        return self._fields[name.lower().encode()].decode("latin-1")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower().encode() in self._fields

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in self._fields)

    def __len__(self) -> int:
        return len(self._fields)


_NO_FIELDS: dict[bytes, bytes] = {}


class HttpResponse:
    """An answer as it arrives. One task at a time may wait for it."""

    __slots__ = (
        "_connection",
        "_error",
        "_held",
        "_limit",
        "_packets",
        "_waiter",
        "fields",
        "status",
    )

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        """0 until the head has come."""
        self.fields = _NO_FIELDS
        """The headers as they came, but for the names, which are in lower case."""
        self._connection: Connection | None = connection
        """``None`` when nothing more will come from there."""
        self._packets: list[bytes] = []
        self._held = 0
        """Bytes in the packets."""
        self._limit: int | None = None
        """Bytes that the body may have, where all of it is waited for."""
        self._error: VllmError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        return Headers(self.fields)

    def more(self) -> asyncio.Future[None]:
        """To be awaited until more has come: the head, some of the body, or the end.

        Raises:
            VllmError: nothing more will come.
        """
        if self._error is not None:
            raise self._error
        if self._waiter is not None and not self._waiter.done():
            raise ConnectionLostError("two tasks read one answer")
        assert self._connection is not None
        waiter = self._waiter = self._connection.loop.create_future()
        return waiter

    async def packet(self) -> bytes:
        while not self._packets:
            if self._connection is None and self._error is None:
                return b""
            await self.more()
        return self._take()

    async def read(self, limit: int) -> bytes:
        if self._connection is not None:
            self._limit = limit
            self._connection.resume_reading()
            while self._connection is not None and self._held <= limit:
                await self.more()
        if self._held > limit:
            self.close()
            raise ResponseTooLargeError(f"the answer is larger than {limit} bytes")
        if self._error is not None:
            raise self._error
        return self._take()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.abort()
            self.fail(ConnectionLostError("the answer was left before its end"))

    def _take(self) -> bytes:
        packets, self._held = self._packets, 0
        data = packets[0] if len(packets) == 1 else b"".join(packets)
        packets.clear()
        if self._connection is not None:
            self._connection.resume_reading()
        return data

    # What the connection tells.

    def wake(self) -> None:
        """Who waits is to look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def add(self, packets: list[bytes]) -> None:
        """Some of the body has come."""
        self._packets += packets
        for packet in packets:
            self._held += len(packet)

    @property
    def is_wanted(self) -> bool:
        """Whether what has come is of use before the rest."""
        return self._limit is None or self._held > self._limit

    @property
    def is_too_much(self) -> bool:
        """Whether more has come than is to be held unread."""
        return self._limit is None and self._held > _MAX_HELD_BYTES

    def end(self, packets: list[bytes] | None = None) -> None:
        """All of it has come, with these packets."""
        self._connection = None
        if packets:
            self.add(packets)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: VllmError, cause: BaseException | None = None) -> None:
        """Nothing more will come, and that is not all."""
        error.__cause__ = cause
        self._error = error
        self.end()


class Keeper(Protocol):
    """Who a connection is of."""

    def give_back(self, connection: Connection) -> None:
        """Its answer has come to the end, and it can be used again."""

    def lost(self, connection: Connection) -> None:
        """It is closed."""


class Connection(asyncio.Protocol):
    """A connection to a server: sends a request, and hands its answer on as it arrives."""

    __slots__ = (
        "_fields",
        "_head_bytes",
        "_is_bodiless",
        "_is_congested",
        "_is_interim",
        "_is_paused",
        "_is_reusable",
        "_is_whole",
        "_keeper",
        "_packets",
        "_parser",
        "_response",
        "_size",
        "_transport",
        "_unsent",
        "idle_since",
        "loop",
        "on_body",
        "on_header",
    )

    def __init__(self, keeper: Keeper) -> None:
        self.idle_since = 0.0
        """By the loop's clock, in seconds."""
        self._keeper = keeper
        self.loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unsent: tuple[bytes, ...] = ()
        self._response: HttpResponse | None = None
        # The parser calls these methods of built-in types, which takes no time in Python.
        self._fields: dict[bytes, bytes] = {}
        self.on_header = self._fields.__setitem__
        self._packets: list[bytes] = []
        self.on_body = self._packets.append
        self._is_congested = False
        self._is_paused = False
        self._parser = httptools.HttpResponseParser(self)

    def send(self, method: str, head: bytes, body: bytes | None) -> HttpResponse:
        """Take a request, head and all, to be sent by :meth:`depart`; what will be its answer."""
        response = HttpResponse(self)
        if self._transport is None:  # it was closed as soon as it was made
            response.fail(*_loss(None, response))
            return response
        self._response = response
        self._fields.clear()
        self._head_bytes = 0
        self._is_bodiless = method == "HEAD"
        self._is_interim = self._is_whole = False
        self._size = 0
        self._is_reusable = True
        if body is None:
            self._unsent = (head,)
        elif len(body) <= _JOINED_BYTES:
            self._unsent = (head + body,)
        else:
            self._unsent = (head, body)
        return response

    def depart(self) -> None:
        """Send what was taken, if it is still wanted."""
        unsent, self._unsent = self._unsent, ()
        response, transport = self._response, self._transport
        if response is None or transport is None or transport.is_closing():
            return
        try:
            for data in unsent:
                transport.write(data)
        except (OSError, RuntimeError) as error:  # uvloop's, of a transport that is just closed
            self.fail(*_loss(error, response))

    def is_usable(self, now: float, longest: float) -> bool:
        """Whether a request can be sent; it cannot if it was idle for ``longest`` seconds."""
        transport, idle = self._transport, now - self.idle_since
        if transport is None or transport.is_closing() or idle > longest:
            return False
        return idle < _PEEK_SECONDS or self._is_silent(transport)

    def _is_silent(self, transport: asyncio.Transport) -> bool:
        """Whether no end of the connection waits to be noticed, by a loop that was busy."""
        sock = transport.get_extra_info("socket")
        if sock is None or not hasattr(select, "poll"):
            return True
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        return not poll.poll(0)

    def leave(self) -> asyncio.Transport:
        """Give the transport away: what follows is no HTTP."""
        assert self._transport is not None
        transport, self._transport = self._transport, None
        self._response = None
        return transport

    def abort(self) -> None:
        """Close at once; what was not sent yet is not sent."""
        self._response = None
        if self._transport is not None:
            self._transport.abort()

    def fail(self, error: VllmError, cause: BaseException | None = None) -> None:
        """Close at once, and tell who waits for an answer."""
        response = self._response
        self.abort()
        if response is not None:
            response.fail(error, cause)

    def resume_reading(self) -> None:
        """What was held has been read."""
        if self._is_paused and self._transport is not None and not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()

    # What asyncio tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It begins."""
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        response = self._response
        if response is None:
            self.abort()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._is_reusable = False
            if not self._is_whole:
                self._pass_on(response)
                self._fail_to_parse(data, error)
                return
        if self._is_whole:
            self._finish(response)
        elif self._packets:
            self._pass_on(response)
        elif response.status:
            response.wake()
        else:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.fail(ProtocolError(f"the answer's head is larger than {MAX_HEAD_BYTES} bytes"))

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        response, self._response = self._response, None
        if response is not None:
            if exc is None and response.status and not _is_framed(response.fields):
                response.end()
            else:
                response.fail(*_loss(exc, response))
        self._transport = None
        del self._parser  # which refers back
        self._keeper.lost(self)

    def pause_writing(self) -> None:
        """More is to be sent than the system takes."""
        self._is_congested = True

    def resume_writing(self) -> None:
        """The system takes more."""
        self._is_congested = False

    # What the parser tells.

    def on_message_begin(self) -> None:
        """An answer begins, or what should not be there after one."""
        if self._is_whole:
            self._is_reusable = False

    def on_headers_complete(self) -> None:
        """A head is there, perhaps an interim one: 1xx."""
        response = self._response
        if response is None or self._is_whole:
            return
        parser = self._parser
        status = parser.get_status_code()
        if status < 200:
            self._is_interim = True
            return
        if not parser.should_keep_alive():
            self._is_reusable = False
        response.status = status
        fields = self._fields
        response.fields = {name.lower(): value for name, value in fields.items()}
        if self._is_bodiless:
            self._is_reusable = False
            self._is_whole = True

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if self._is_interim:
            self._is_interim = False
            self._fields.clear()
        elif self._response is not None and not self._is_whole:
            self._is_whole = True
            self._size = len(self._packets)

    def _pass_on(self, response: HttpResponse) -> None:
        if not self._packets:
            return
        response.add(self._packets)
        self._packets.clear()
        if response.is_wanted:
            response.wake()
        if response.is_too_much:
            self._pause_reading()

    def _pause_reading(self) -> None:
        if not self._is_paused and self._transport is not None and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()

    def _finish(self, response: HttpResponse) -> None:
        self._response = None
        packets = self._packets
        del packets[self._size :]  # what came after the end
        response.end(packets)
        packets.clear()
        transport = self._transport
        assert transport is not None
        if self._is_reusable and not self._is_congested and not transport.is_closing():
            self.idle_since = self.loop.time()
            self._keeper.give_back(self)
        else:
            transport.abort()

    def _fail_to_parse(self, data: bytes, error: Exception) -> None:
        assert self._response is not None
        if isinstance(error, httptools.HttpParserUpgrade):
            self.fail(ProtocolError("the server switches to another protocol"), error)
        elif self._response.status:
            self.fail(ProtocolError(f"the answer's body is not HTTP: {error}"), error)
        elif data.startswith(_TLS_ALERT):
            self.fail(TLSError("the server speaks TLS: its address begins with https://"), error)
        else:
            self.fail(ProtocolError(f"the answer is not HTTP: {error}"), error)


def _is_framed(fields: dict[bytes, bytes]) -> bool:
    """Whether the headers say where the body ends."""
    return b"content-length" in fields or b"chunked" in fields.get(b"transfer-encoding", b"")


def _loss(exc: Exception | None, response: HttpResponse) -> tuple[VllmError, Exception]:
    """The error of an answer that is not whole, and its cause."""
    match exc:
        case None if response.status:
            words = "the connection closed before the answer was whole"
            return ConnectionLostError(words), EOFError()
        case None:
            words = "the server closed the connection without an answer"
            return ConnectionLostError(words), EOFError()
        case ssl.SSLError():
            return TLSError(f"the server ended the TLS connection: {exc}"), exc
        case OSError():
            return ConnectionLostError(f"the connection broke: {exc.strerror or exc}"), exc
        case _:
            return ConnectionLostError(f"the connection broke: {exc}"), exc
