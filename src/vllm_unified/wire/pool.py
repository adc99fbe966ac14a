"""The connections to one place: kept while they are idle, and closed before the server does."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from vllm_unified.errors import ClientClosedError
from vllm_unified.wire.connection import Connection, Keeper


class Pool:
    """Connections to one place. There may be any number: how many requests are in flight at a
    server is decided elsewhere."""

    def __init__(
        self, dial: Callable[[Keeper], Awaitable[Connection]], *, idle_seconds: float
    ) -> None:
        """
        Args:
            dial: Makes a connection.
            idle_seconds: How long one is kept that is not used.
        """
        self._dial = dial
        self._idle_seconds = idle_seconds
        self._loop = asyncio.get_running_loop()
        self._idle: deque[Connection] = deque()
        """Who was used last is at the end, and is used first."""
        self._all: set[Connection] = set()
        self._alarm: asyncio.TimerHandle | None = None

    def take(self) -> Connection | None:
        """A connection that is idle, if there is one."""
        idle = self._idle
        if idle:
            now, longest = self._loop.time(), self._idle_seconds
            while idle:
                connection = idle.pop()
                if connection.is_usable(now, longest):
                    return connection
                connection.abort()
        return None

    async def connect(self) -> Connection:
        """A new connection.

        Raises:
            ConnectError: there is none.
        """
        connection = await self._dial(self)
        self._all.add(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        """It can be used again."""
        self._idle.append(connection)
        if self._alarm is None:
            self._alarm = self._loop.call_later(self._idle_seconds, self._retire)

    def lost(self, connection: Connection) -> None:
        """It is closed; what is idle is looked at before it is used."""
        self._all.discard(connection)

    def close(self) -> None:
        """Close all of them, those in use as well."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._idle.clear()
        for connection in list(self._all):
            connection.fail(ClientClosedError("this client was closed before the answer came"))

    def _retire(self) -> None:
        """Close those that were idle for their time."""
        self._alarm = None
        idle, now = self._idle, self._loop.time()
        while idle and idle[0].idle_since + self._idle_seconds <= now:
            idle.popleft().abort()
        if idle:
            due = idle[0].idle_since + self._idle_seconds
            self._alarm = self._loop.call_at(due, self._retire)
