"""Host names and their addresses."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from vllm_unified.errors import NameResolutionError

AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]
"""As ``socket.getaddrinfo`` gives it."""


class Names:
    """Looks names up, once for all who ask at the same time, and remembers the answers a little."""

    def __init__(self, *, seconds: float) -> None:
        """``seconds`` is how long an answer is good for."""
        self._seconds = seconds
        self._lookups: dict[tuple[str, int], asyncio.Task[list[AddressInfo]]] = {}

    async def addresses(self, host: str, port: int) -> list[AddressInfo]:
        """All addresses of a host, in the order in which they should be tried.

        Raises:
            NameResolutionError: it has none.
        """
        try:
            return socket.getaddrinfo(  # type: ignore[return-value]
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
        except (OSError, UnicodeError):
            pass  # a name, and not an address
        try:
            # Whoever is cancelled does not take the answer away from the others.
            return await asyncio.shield(self._lookup(host, port))
        except (OSError, UnicodeError) as error:
            raise NameResolutionError(f"the host's name cannot be resolved: {host}") from error

    def close(self) -> None:
        """Ask for nothing more."""
        for lookup in self._lookups.values():
            lookup.cancel()

    def _lookup(self, host: str, port: int) -> asyncio.Task[list[AddressInfo]]:
        lookup = self._lookups.get((host, port))
        if lookup is None:
            loop = asyncio.get_running_loop()
            lookup = loop.create_task(self._ask(host, port))
            self._lookups[host, port] = lookup
            lookup.add_done_callback(lambda _: self._remember(host, port))
        return lookup

    async def _ask(self, host: str, port: int) -> list[AddressInfo]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not found:
            raise OSError("no address")
        return found  # type: ignore[return-value]

    def _remember(self, host: str, port: int) -> None:
        lookup = self._lookups[host, port]
        if lookup.cancelled() or lookup.exception() is not None:
            del self._lookups[host, port]
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(self._seconds, self._lookups.pop, (host, port), None)
