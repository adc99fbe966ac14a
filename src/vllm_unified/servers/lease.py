"""A lease: one user's hold on a running server.

It is an open connection to the server's supervisor. The kernel closes it when its holder dies,
however it dies, so no server outlives its last user. The supervisor tells its state over it, in
lines of JSON.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Literal

import msgspec

from vllm_unified.servers.lines import LineSocket

_POLL = 0.02

ServerState = Literal["starting", "ready", "failed", "restarting", "suspended", "exited", "moved"]


class ServerEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a supervisor tells the holders of leases."""

    state: ServerState
    message: str = ""
    """Starting: how far it is. Failed, restarting, suspended, exited: why. Ready: what is not as
    it was, after a restart."""
    fingerprint: str = ""
    """Moved: the successor's; so are address, process, model and log."""
    url: str = ""
    pid: int = 0
    model: str = ""
    log_path: str = ""
    log: str = ""
    """Failed, exited: the end of the log."""
    hint: str | None = None
    code: int | None = None
    """Exited: vLLM's exit code."""

    @property
    def final(self) -> bool:
        """Whether the server that said this is over."""
        return self.state in {"failed", "exited", "moved"}


_decoder = msgspec.json.Decoder(ServerEvent)


class Lease:
    """The holder's end of a lease. A process that forks keeps it; the fork does not have it."""

    def __init__(self, connection: LineSocket) -> None:
        self._connection = connection

    @classmethod
    def connect(cls, path: Path) -> Lease | None:
        """A lease of the supervisor that listens at ``path``; ``None`` where none does."""
        connection = LineSocket.connect(path)
        return cls(connection) if connection else None

    @classmethod
    def adopt(cls, connection: socket.socket) -> Lease:
        """The lease that the other end of ``connection`` grants."""
        return cls(LineSocket(connection))

    @property
    def closed(self) -> bool:
        """Whether it was given back."""
        return self._connection.closed

    def ended(self) -> bool:
        """Whether the supervisor has closed its end and nothing is left to read."""
        return self._connection.ended()

    async def next_event(self) -> ServerEvent | None:
        """The next event; ``None`` when the supervisor has ended, or let the lease go."""
        line = await self._connection.next_line()
        return None if line is None else _decoder.decode(line)

    async def release(self, seconds: float) -> None:
        """Give the lease back; if it was the last one, wait until the server is gone.

        Args:
            seconds: How long to wait at most; the server ends in any case.
        """
        if self.closed:
            return
        try:
            # Half-closed, it is given back; the supervisor closes its half when there are other
            # holders, or when the server is gone.
            self._connection.half_close()
            async with asyncio.timeout(seconds):
                await self._until_ended()
        except (OSError, TimeoutError):
            pass
        finally:
            self.close()

    async def _until_ended(self) -> None:
        connection = self._connection
        while connection.reading and not connection.at_end:  # noqa: ASYNC110 - its reader sees it
            await asyncio.sleep(_POLL)
        while not connection.at_end:
            await self.next_event()

    def close(self) -> None:
        """Give the lease back, and wait for nothing."""
        self._connection.close()
