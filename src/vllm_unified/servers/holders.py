"""The holders of a server's leases, as its supervisor sees them."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import msgspec

from vllm_unified.servers.lease import ServerEvent

_CLOSE_SECONDS = 1.0
# What a holder that never reads may leave unread before it misses how far a start is.
_UNREAD_LIMIT = 1 << 16


class Holders:
    """All leases of one server. When the last one was given back, ``unused`` is set, for good.

    Not so while the server is ``detached``, or all have been sent to another one.
    """

    def __init__(self) -> None:
        self.unused = asyncio.Event()
        self.detached = False
        self._sent_away = False
        self._last = ServerEvent(state="starting", message="starting vLLM")
        self._watchers: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._held: set[asyncio.StreamWriter] = set()
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return len(self._held)

    async def adopt(self, descriptor: int) -> None:
        """Take over a connection that was inherited, as a lease."""
        connection = socket.socket(fileno=descriptor)
        connection.set_inheritable(False)
        reader, writer = await asyncio.open_connection(sock=connection)
        self.accept(reader, writer)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A new lease; it hears the present state at once."""
        if self.unused.is_set():
            writer.close()  # too late: whoever it is starts a server anew
            return
        self._held.add(writer)
        self._empty.clear()
        self._watchers[writer] = asyncio.create_task(self._watch(reader, writer))
        _send(writer, self._last)

    def tell(self, event: ServerEvent) -> None:
        """Tell all holders, and those who come later, the new state."""
        if self._sent_away and event.state != "exited":
            return
        self._last = event
        for writer in self._watchers:
            _send(writer, event)

    def send_away(self, event: ServerEvent) -> None:
        """Tell all that the server moved; that they go does not end it."""
        self.tell(event)
        self._sent_away = True

    async def gone(self, seconds: float) -> bool:
        """Wait until nobody holds a lease; whether that came in time."""
        try:
            async with asyncio.timeout(seconds):
                while self._held:
                    await self._empty.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End all leases, after what was told them has been sent."""
        for writer, watcher in self._watchers.items():
            watcher.cancel()
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await writer.wait_closed()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)

    async def _watch(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Wait until a lease is given back. The last one's connection stays open to the end."""
        with contextlib.suppress(OSError):
            while await reader.read(1024):
                pass
        self._held.discard(writer)
        if not self._held:
            self._empty.set()
            if not (self.detached or self._sent_away):
                self.unused.set()
                return
        del self._watchers[writer]
        writer.close()


def _send(writer: asyncio.StreamWriter, event: ServerEvent) -> None:
    unread = writer.transport.get_write_buffer_size()
    if not writer.is_closing() and (event.final or unread < _UNREAD_LIMIT):
        writer.write(msgspec.json.encode(event) + b"\n")
