"""A server whose answers are scripted byte by byte.

It runs in threads of its own, so that it serves the asynchronous and the blocking client alike,
over TCP, TLS or a Unix socket. A reply is a sequence of steps::

    server.reply(b"HTTP/1.1 200 OK\\r\\n", event, b"...", RESET)

``bytes`` are sent; a :class:`threading.Event` is waited for; ``RESET`` and ``CLOSE`` end the
connection, rudely or politely; ``STALL`` is silent until the client hangs up. A reply that does
not end the connection leaves it open for the next request.
"""

from __future__ import annotations

import contextlib
import enum
import json
import select
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

_POLL_SECONDS = 0.005
# As uvicorn says it, to TLS for example.
_NOT_HTTP = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\nInvalid HTTP request received."


class End(enum.Enum):
    """How a reply ends, where the connection does not stay open."""

    RESET = "reset"
    CLOSE = "close"
    STALL = "stall"


RESET, CLOSE, STALL = End.RESET, End.CLOSE, End.STALL

Step = bytes | threading.Event | End


@dataclass(frozen=True)
class Request:
    """A request, as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    connection: int
    """Which connection it came on, counted from 1."""
    repeated_headers: list[str] = field(default_factory=list)
    """Names, in lower case, that came more than once."""

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


Reply = Sequence[Step]
Responder = Callable[[Request], Reply]


class _HungUp(Exception):
    """The client closed the connection."""


class ScriptedServer:
    """Replies first from the queue that :meth:`reply` fills, then as :meth:`always` says."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, unix_path: str | None = None) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.open_connections = 0
        """Connections that neither side has closed."""
        self._tls = tls
        self._unix_path = unix_path
        self._queue: deque[Reply | Responder] = deque()
        self._always: Reply | Responder = (CLOSE,)
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closing = threading.Event()
        if unix_path is not None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(unix_path)
        else:
            self._listener = socket.socket()
            self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(512)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """The address for a client."""
        if self._unix_path is not None:
            return f"unix://{self._unix_path}"
        scheme, host = ("https", "localhost") if self._tls else ("http", "127.0.0.1")
        return f"{scheme}://{host}:{self.port}"

    def reply(self, *steps: Step) -> Self:
        """Script the reply to the next request that has none yet."""
        self._queue.append(steps)
        return self

    def always(self, *steps: Step) -> Self:
        """Script the reply to every request that has no other."""
        self._always = steps
        return self

    def respond(self, responder: Responder) -> Self:
        """Make the reply to every request that has no other."""
        self._always = responder
        return self

    def close(self) -> None:
        """Close everything, and wait for it."""
        self._closing.set()
        # close() alone does not wake a thread in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self.open_connections += 1
                self._sockets.add(connection)
                thread = threading.Thread(
                    target=self._serve, args=(connection, self.connections), daemon=True
                )
                self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        secured = connection
        with contextlib.suppress(OSError, _HungUp):
            if self._tls is not None:
                with self._lock:
                    self._sockets.discard(connection)
                    secured = self._tls.wrap_socket(
                        connection, server_side=True, do_handshake_on_connect=False
                    )
                    self._sockets.add(secured)
                _shake_hands(secured)
            self._converse(secured, number)
        with self._lock:
            self._sockets.discard(secured)
            self.open_connections -= 1
        secured.close()

    def _converse(self, connection: socket.socket, number: int) -> None:
        with connection.makefile("rb") as reader:
            while (request := _read_request(reader, number)) is not None:
                if not request.method:
                    connection.sendall(_NOT_HTTP)
                    return
                with self._lock:
                    self.requests.append(request)
                    script = self._queue.popleft() if self._queue else self._always
                steps = script(request) if callable(script) else script
                for step in steps:
                    if not self._take(step, connection):
                        return

    def _take(self, step: Step, connection: socket.socket) -> bool:
        """Do one step; false where it ends the connection."""
        if isinstance(step, bytes):
            connection.sendall(step)
        elif isinstance(step, threading.Event):
            self._watch(connection, step)
        elif step is STALL:
            self._watch(connection, self._closing)
        elif step is RESET:
            # Lingering for no time at all makes close() send RST in place of FIN.
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return not isinstance(step, End)

    def _watch(self, connection: socket.socket, event: threading.Event) -> None:
        """Wait for the event; raises if the client hangs up first."""
        while not event.wait(_POLL_SECONDS) and not self._closing.is_set():
            if select.select([connection], [], [], 0)[0] and not connection.recv(65536):
                raise _HungUp


def _shake_hands(connection: ssl.SSLSocket) -> None:
    try:
        connection.do_handshake()
    except ssl.SSLError:
        # Closing with unread bytes would reset the connection, and the alert be lost.
        connection.settimeout(1)
        socket.socket.shutdown(connection, socket.SHUT_WR)
        while socket.socket.recv(connection, 65536):
            pass
        raise


def _read_request(reader: Any, connection: int) -> Request | None:
    start = reader.peek(1)[:1]
    if not start:
        return None
    if not start.isalpha():
        return Request("", "", {}, start, connection)
    method, target, _ = reader.readline().decode("latin-1").split(" ", 2)
    headers: dict[str, str] = {}
    repeated = []
    while (line := reader.readline().decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        if name.lower() in headers:
            repeated.append(name.lower())
        headers[name.lower()] = value.strip()
    body = reader.read(int(headers.get("content-length", 0)))
    return Request(method, target, headers, body, connection, repeated)
