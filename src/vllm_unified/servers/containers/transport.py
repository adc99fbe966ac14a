"""A transport whose first request starts the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_unified.errors import ClientClosedError, ConnectError
from vllm_unified.settings import Settings
from vllm_unified.wire.transport import Response, Transport

if TYPE_CHECKING:
    from vllm_unified.servers.containers.server import ContainerServer


class StartingTransport:
    """Sends requests to a container's server, once it runs. However many wait, it is started once.

    Other servers of the same client are reached as ever.
    """

    def __init__(self, server: ContainerServer, *, stop: bool) -> None:
        """``stop``: whether the server is left when the transport is closed."""
        self._server = server
        self._stop = stop
        self._address = server.url
        """As the client knows it: the container may have been given another port."""
        self._inner: Transport | None = None
        self._closed = False

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> Response:
        if self._closed:
            raise ClientClosedError("this client is closed")
        inner = self._transport()
        path = url.removeprefix(self._address)
        if path == url:
            return await inner.open(method, url, headers=headers, body=body)
        await self._server.ready()
        try:
            return await inner.open(method, self._server.url + path, headers=headers, body=body)
        except ConnectError:
            # Nothing was sent. It may have ended just now; then it is waited for.
            await self._server.ready(doubted=True)
        return await inner.open(method, self._server.url + path, headers=headers, body=body)

    async def close(self) -> None:
        self._closed = True
        try:
            if self._inner is not None:
                await self._inner.close()
        finally:
            if self._stop:
                await self._server.stop()

    def _transport(self) -> Transport:
        if self._inner is None:
            # TLS and names take longer to import than everything else together.
            from vllm_unified.wire.http import HttpTransport

            self._inner = HttpTransport(Settings(proxy=""))
        return self._inner
