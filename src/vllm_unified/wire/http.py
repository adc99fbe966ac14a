"""The client's own transport: HTTP/1.1 over asyncio. How it sends; see also ``connection``."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

import msgspec

from vllm_unified.errors import (
    ClientClosedError,
    ConfigurationError,
    NameResolutionError,
)
from vllm_unified.settings import Settings
from vllm_unified.version import __version__
from vllm_unified.wire.connection import Connection
from vllm_unified.wire.dialing import Dialer, Place
from vllm_unified.wire.encoding import decompressed
from vllm_unified.wire.pool import Pool
from vllm_unified.wire.proxies import Proxies, proxy_authorization
from vllm_unified.wire.transport import Response

# uvicorn closes a connection after 5 idle seconds (VLLM_HTTP_TIMEOUT_KEEP_ALIVE); one that is
# used again in that moment fails. One second is what a slow packet may take.
KEEPALIVE_SECONDS = 4.0
_MAX_ROUTES = 1000
_DEFAULT_PORTS = {"http": 80, "https": 443}
_OWN_HEADERS = {
    "User-Agent": f"vllm-unified/{__version__}",
    # A proxy that compresses would hold the events of a stream back.
    "Accept-Encoding": "identity",
}
_USUAL_HEADERS = frozenset({"Authorization", "Content-Type", "X-Request-Id"})
_FRAMING_HEADERS = frozenset({"content-length", "transfer-encoding"})
_SENDABLE = re.compile(r"[!-~]*")
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


class _Route(msgspec.Struct, frozen=True):
    """What requests to one URL have in common."""

    pool: Pool
    target: str
    """As it stands in the request line."""
    headers: dict[str, str]
    """Which the caller's take precedence over."""
    lines: str
    """The same, ready to be sent."""


class HttpTransport:
    """The transport over connections of its own.

    It belongs to the event loop of its first use.
    """

    def __init__(self, settings: Settings) -> None:
        """Uses ``connect_timeout``, ``proxy``, and ``tls``.

        Raises:
            ConfigurationError: a certificate file cannot be used.
        """
        self._dialer = Dialer(connect_timeout=settings.connect_timeout, tls=settings.tls)
        self._proxies = Proxies(settings.proxy)
        self._pools: dict[Place, Pool] = {}
        self._routes: dict[str, _Route] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._departing: list[Connection] = []
        """Whose requests are to be sent."""
        self._closed = False

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> Response:
        if self._closed or self._loop is not asyncio.get_running_loop():
            self._enter_loop()
        route = self._routes.get(url)
        if route is None:
            route = self._find_route(url)
        head = _head(method, route, headers, body)
        connection = route.pool.take()
        if connection is None:
            connection = await self._connect(route.pool)
        response = connection.send(method, head, body)
        self._depart_soon(connection)
        try:
            while not response.status:
                await response.more()
        except BaseException:
            response.close()
            raise
        return decompressed(response) if b"content-encoding" in response.fields else response

    async def close(self) -> None:
        self._closed = True
        self._dialer.close()
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        self._routes.clear()
        await asyncio.sleep(0)  # in which asyncio closes the sockets

    def _enter_loop(self) -> None:
        if self._closed:
            raise ClientClosedError("this client is closed")
        if self._loop is not None:
            raise ConfigurationError(
                "this client was first used in another event loop",
                hint="Make one client for each asyncio.run(), or use the blocking VllmUnified.",
            )
        self._loop = asyncio.get_running_loop()

    def _depart_soon(self, connection: Connection) -> None:
        """Send its request with all others of this turn of the loop. A server that waits for work
        is woken by the first, and still awake when the others come; to wake it for each takes a
        quarter of a request's time."""
        if not self._departing:
            connection.loop.call_soon(self._depart)
        self._departing.append(connection)

    def _depart(self) -> None:
        departing, self._departing = self._departing, []
        for connection in departing:
            connection.depart()

    async def _connect(self, pool: Pool) -> Connection:
        connection = await pool.connect()
        if self._closed:
            connection.abort()
            raise ClientClosedError("this client is closed")
        return connection

    def _find_route(self, url: str) -> _Route:
        place, target = self._place(url)
        pool = self._pools.get(place)
        if pool is None:
            pool = self._pools[place] = Pool(
                lambda keeper: self._dialer.dial(place, keeper), idle_seconds=KEEPALIVE_SECONDS
            )
        headers = {"Host": _host(place), **_OWN_HEADERS}
        if place.proxy and not place.is_tunnelled:
            target = f"http://{headers['Host']}{target}"
            authorization = proxy_authorization(place.proxy)
            if authorization:
                headers["Proxy-Authorization"] = authorization
        if len(self._routes) >= _MAX_ROUTES:
            self._routes.clear()
        route = self._routes[url] = _Route(pool, target, headers, _lines(headers))
        return route

    def _place(self, url: str) -> tuple[Place, str]:
        """Where a URL leads, and what to ask for there."""
        if url.startswith("unix://"):
            # unix:///run/vllm.sock:/v1/models
            socket_path, _, path = url.removeprefix("unix://").rpartition(":")
            return Place(host="localhost", port=80, socket_path=socket_path), _target(path)
        try:
            parts = urlsplit(url)
            port = parts.port or _DEFAULT_PORTS[parts.scheme]
        except (ValueError, KeyError):
            raise ConfigurationError("the address is not a valid URL") from None
        place = Place(
            host=_ascii(parts.hostname or ""),
            port=port,
            is_secure=parts.scheme == "https",
            proxy=self._proxies.of(parts.scheme, parts.netloc),
        )
        query = f"?{parts.query}" if parts.query else ""
        return place, _target((parts.path or "/") + query)


def _ascii(host: str) -> str:
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError as error:
        raise NameResolutionError(f"the host's name is no valid name: {host}") from error


def _host(place: Place) -> str:
    if place.port == (443 if place.is_secure else 80):
        return place.authority.rpartition(":")[0]
    return place.authority


def _target(path: str) -> str:
    return path if _SENDABLE.fullmatch(path) else quote(path, safe=_PUNCTUATION)


def _lines(headers: Mapping[str, str]) -> str:
    """What stands between the request line and the blank line.

    Raises:
        ConfigurationError: a header has a line break in it.
    """
    lines = ""
    for name, value in headers.items():
        lines += f"{name}: {value}\r\n"
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
        raise ConfigurationError("a header has a line break in it, and cannot be sent")
    return lines


def _head(method: str, route: _Route, headers: Mapping[str, str], body: bytes | None) -> bytes:
    own = route.lines if _USUAL_HEADERS.issuperset(headers) else _own_lines(route, headers)
    length = "" if body is None else f"Content-Length: {len(body)}\r\n"
    head = f"{method} {route.target} HTTP/1.1\r\n{own}{_lines(headers)}{length}\r\n"
    try:
        return head.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"a header cannot be sent: {error.reason}") from None


def _own_lines(route: _Route, headers: Mapping[str, str]) -> str:
    """Our headers without those that the caller gives."""
    given = {name.lower() for name in headers}
    if given & _FRAMING_HEADERS:
        raise ConfigurationError(
            "headers: Content-Length and Transfer-Encoding are the client's to say"
        )
    own = {name: value for name, value in route.headers.items() if name.lower() not in given}
    return _lines(own)
