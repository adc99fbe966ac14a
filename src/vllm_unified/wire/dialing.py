"""How a connection is made: names, TCP or a Unix socket, a proxy's tunnel, TLS."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from urllib.parse import urlsplit

import aiohappyeyeballs
import msgspec

from vllm_unified.errors import (
    ConfigurationError,
    ConnectError,
    ConnectTimeoutError,
    TLSError,
    VllmError,
)
from vllm_unified.settings import TLSConfig
from vllm_unified.wire.connection import Connection, Keeper
from vllm_unified.wire.names import Names
from vllm_unified.wire.proxies import proxy_authorization

_NAMES_SECONDS = 10.0
# RFC 8305, section 5, recommends 250 ms.
_HAPPY_EYEBALLS_SECONDS = 0.25


class Place(msgspec.Struct, frozen=True):
    """Where connections lead. Those to one place are alike."""

    host: str
    """In ASCII; an IPv6 address without brackets."""
    port: int
    is_secure: bool = False
    """Whether the server speaks TLS."""
    proxy: str = ""
    """URL of the proxy on the way, credentials included; ``""`` for none."""
    socket_path: str = ""
    """Of a Unix socket, in place of host and port."""

    @property
    def authority(self) -> str:
        """``host:port``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_tunnelled(self) -> bool:
        """Whether the proxy only passes bytes on; other requests name the whole URL to it."""
        return bool(self.proxy) and self.is_secure


class Dialer:
    """Makes connections."""

    def __init__(self, *, connect_timeout: float, tls: TLSConfig | None) -> None:
        """``connect_timeout`` is in seconds, and covers everything.

        Raises:
            ConfigurationError: a certificate file cannot be used.
        """
        self._timeout = connect_timeout
        self._names = Names(seconds=_NAMES_SECONDS)
        # Without a configuration the system's certificates are read, which takes 20 ms.
        self._context = None if tls is None else _tls_context(tls)

    async def dial(self, place: Place, keeper: Keeper) -> Connection:
        """A new connection.

        Raises:
            ConnectError: of the class that says why not.
        """
        try:
            async with asyncio.timeout(self._timeout):
                return await self._dial(place, keeper)
        except VllmError:
            raise
        except TimeoutError:
            raise ConnectTimeoutError(f"no connection within {self._timeout:g} s") from None

    def close(self) -> None:
        """Look no name up any more."""
        self._names.close()

    async def _dial(self, place: Place, keeper: Keeper) -> Connection:
        if place.socket_path:
            with _unreachable():
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_unix_connection(
                    lambda: Connection(keeper), place.socket_path
                )
                return connection
        if not place.proxy:
            with _unreachable():
                sock = await self._reach(place.host, place.port)
            return await self._speak(sock, place.host if place.is_secure else "", keeper)
        return await self._dial_proxy(place, keeper)

    async def _dial_proxy(self, place: Place, keeper: Keeper) -> Connection:
        parts = urlsplit(place.proxy)
        host, is_secure = parts.hostname or "", parts.scheme == "https"
        with _unreachable("the proxy cannot be reached"):
            sock = await self._reach(host, parts.port or (443 if is_secure else 80))
        connection = await self._speak(sock, host if is_secure else "", keeper)
        if not place.is_tunnelled:
            return connection
        try:
            return await self._tunnel(connection, place, keeper)
        except BaseException:
            connection.abort()
            raise

    async def _tunnel(self, outer: Connection, place: Place, keeper: Keeper) -> Connection:
        """TLS to the server, through a connection to the proxy."""
        target, authorization = place.authority, proxy_authorization(place.proxy)
        head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
        if authorization:
            head += f"Proxy-Authorization: {authorization}\r\n"
        answer = outer.send("CONNECT", f"{head}\r\n".encode(), None)
        outer.depart()
        try:
            while not answer.status:
                await answer.more()
        except VllmError as error:
            raise ConnectError(f"the proxy fails: {error.message}") from error.__cause__
        if not 200 <= answer.status < 300:
            raise ConnectError(f"the proxy refuses: HTTP {answer.status} {_phrase(answer.status)}")
        inner = Connection(keeper)
        with _unreachable():
            transport = await asyncio.get_running_loop().start_tls(
                outer.leave(), inner, self._tls(), server_hostname=place.host.rstrip(".")
            )
        assert transport is not None
        inner.connection_made(transport)
        return inner

    async def _reach(self, host: str, port: int) -> socket.socket:
        addresses = await self._names.addresses(host, port)
        sock = await aiohappyeyeballs.start_connection(
            addresses,
            happy_eyeballs_delay=_HAPPY_EYEBALLS_SECONDS,
        )
        # An answer may take minutes, in which routers forget a connection.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock

    async def _speak(self, sock: socket.socket, tls_host: str, keeper: Keeper) -> Connection:
        with _unreachable():
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(keeper),
                sock=sock,
                ssl=self._tls() if tls_host else None,
                server_hostname=tls_host.rstrip(".") if tls_host else None,
            )
        return connection

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = _tls_context(TLSConfig())
        return self._context


@contextmanager
def _unreachable(words: str = "no connection") -> Iterator[None]:
    """Make errors of ours of those of the system."""
    try:
        yield
    except VllmError:
        raise
    except ssl.SSLError as error:
        raise TLSError(f"the TLS handshake failed: {error}") from error
    # RuntimeError is uvloop's, in rare cases.
    except (OSError, RuntimeError) as error:
        code = getattr(error, "errno", None)
        reason = os.strerror(code) if code else str(error) or "it was closed at once"
        hint = 'Check proxy=, HTTP_PROXY and NO_PROXY; proxy="" goes without one.'
        is_proxy = words != "no connection"
        raise ConnectError(f"{words}: {reason}", hint=hint if is_proxy else None) from error


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _tls_context(config: TLSConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.cert_file is not None:
            context.load_cert_chain(config.cert_file, config.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"tls: a certificate file cannot be used: {error}",
            hint=f"ca_file={config.ca_file!r}, cert_file={config.cert_file!r}, "
            f"key_file={config.key_file!r}; all are PEM files.",
        ) from error
    context.set_alpn_protocols(["http/1.1"])
    if not config.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
