"""One end of a Unix socket that carries lines, for whichever event loop uses it next."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import weakref
from pathlib import Path
from typing import Self

_CHUNK = 65536
_open_sockets: weakref.WeakSet[LineSocket] = weakref.WeakSet()


class LineSocket:
    """A connection that belongs to no event loop. A fork of this process does not have it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.set_inheritable(False)
        self._socket = connection
        self._buffer = b""
        self.reading = False
        """Whether somebody waits for a line."""
        self.at_end = False
        """Whether the other side has said all that it will."""
        _open_sockets.add(self)

    @classmethod
    def connect(cls, path: Path) -> Self | None:
        """A connection to who listens at ``path``; ``None`` where nobody does."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionError):
            connection.close()
            return None
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    @property
    def closed(self) -> bool:
        """Whether it was closed here."""
        return self._socket.fileno() == -1

    def ended(self) -> bool:
        """Whether the other side has closed, and nothing is left to read."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def send(self, line: bytes) -> None:
        """Send a line.

        Raises:
            OSError: the connection is broken.
        """
        await asyncio.get_running_loop().sock_sendall(self._socket, line + b"\n")

    async def next_line(self) -> bytes | None:
        """The next line, without its end; ``None`` when there are no more."""
        while b"\n" not in self._buffer:
            chunk = await self._receive()
            if not chunk:
                self.at_end = True
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    async def _receive(self) -> bytes:
        if self.reading:
            raise RuntimeError("somebody else reads this connection")
        self.reading = True
        try:
            return await asyncio.get_running_loop().sock_recv(self._socket, _CHUNK)
        except OSError:
            return b""
        finally:
            self.reading = False

    def half_close(self) -> None:
        """Say that nothing more will be sent.

        Raises:
            OSError: the connection is broken.
        """
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close it; again, it does nothing."""
        self._socket.close()


def _close_in_child() -> None:
    for connection in list(_open_sockets):
        with contextlib.suppress(OSError):
            connection.close()


if hasattr(os, "register_at_fork"):
    # A forked child holds copies of its parent's connections, and would keep them open.
    os.register_at_fork(after_in_child=_close_in_child)
