"""A tiny HTTP proxy: it forwards requests with a whole URL, and tunnels CONNECT."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class Proxy:
    """Counts what goes through it."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        """The first line of each request."""
        self.authorizations: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def url(self) -> str:
        """For ``proxy=``."""
        return f"http://{self.address}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for opened in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for opened in [self._listener, *self._sockets]:
            opened.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            self._start(self._serve, client)

    def _start(self, target: object, *args: socket.socket) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _serve(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            packet = client.recv(65536)
            if not packet:
                return
            head += packet
        lines = head.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        self.requests.append(lines[0])
        self.authorizations += [
            line.partition(": ")[2]
            for line in lines
            if line.lower().startswith("proxy-authorization:")
        ]
        method, target, version = lines[0].split(" ")
        host = target if method == "CONNECT" else urlsplit(target).netloc
        name, _, port = host.rpartition(":")
        server = socket.create_connection((name, int(port)))
        self._sockets.append(server)
        if method == "CONNECT":
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            path = urlsplit(target).path
            server.sendall(f"{method} {path} {version}".encode() + head[len(lines[0]) :])
        self._start(self._pump, server, client)
        self._pump(client, server)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while packet := source.recv(65536):
                sink.sendall(packet)
            sink.shutdown(socket.SHUT_WR)
