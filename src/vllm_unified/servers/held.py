"""The local servers that a client holds; its requests go where they go."""

from __future__ import annotations

import asyncio

from vllm_unified.fleet.directory import Directory
from vllm_unified.servers.local import LocalServer


class HeldServers:
    """Leases of one client, each followed: when a server restarts at another address, or is
    handed over to a successor, the client's requests go there.

    Belongs to one event loop.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._servers: dict[LocalServer, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    def add(self, server: LocalServer) -> None:
        """Hold and follow it until :meth:`close`; another lease of a server that is held already is
        given back."""
        if any(server.fingerprint == each.fingerprint for each in self._servers):
            self._leave(server)
        else:
            self._servers[server] = asyncio.create_task(self._follow(server))

    def at(self, url: str) -> LocalServer | None:
        """The one at this address, if it is held."""
        return next((server for server in self._servers if server.url == url), None)

    def hold(self, url: str) -> None:
        """Let requests to this address wait until :meth:`move`."""
        self._directory.hold(url)

    def move(self, url: str, new_url: str) -> None:
        """Send what is meant for ``url`` to ``new_url``, which may be the same."""
        self._directory.move(url, new_url)

    async def close(self) -> None:
        """Give all leases back; returns when the servers of which they were the last are gone."""
        followers = list(self._servers.values())
        try:
            await asyncio.gather(*(server.stop() for server in self._servers), *self._leaving)
        finally:
            for task in followers:
                task.cancel()
            await asyncio.gather(*followers, return_exceptions=True)

    async def _follow(self, server: LocalServer) -> None:
        url = server.url

        def changed(server: LocalServer) -> None:
            nonlocal url
            self._directory.move(url, server.url)
            url = server.url
            for each in list(self._servers):
                if each is not server and each.fingerprint == server.fingerprint:
                    self._leave(each)

        await server.follow(changed)

    def _leave(self, server: LocalServer) -> None:
        task = asyncio.create_task(server.stop())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        follower = self._servers.pop(server, None)
        if follower is not None:
            self._leaving.add(follower)
            follower.add_done_callback(self._leaving.discard)
