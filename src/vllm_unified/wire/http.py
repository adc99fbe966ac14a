"""Connections, by aiohttp. The only module that opens any, and the only one that knows aiohttp."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import ssl
import urllib.request
import weakref
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from vllm_unified.errors import (
    ClientClosedError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    NameResolutionError,
    ProtocolError,
    ResponseTooLargeError,
    TLSError,
    VllmError,
)
from vllm_unified.settings import Settings, TLSConfig, proxy_address
from vllm_unified.version import __version__
from vllm_unified.wire.transport import Response

# uvicorn closes a connection after 5 idle seconds (VLLM_HTTP_TIMEOUT_KEEP_ALIVE); one that is
# used again in that moment fails. One second is what a slow packet may take.
KEEPALIVE_SECONDS = 4.0
_READ_BUFFER = 2**18
_LARGE_BODY = 2**20
# How aiohttp quotes the head of a TLS record of the kind "alert".
_TLS_ALERT = r"b'\x15\x03"
_SERVER_NAMES_SECONDS = 10


class AiohttpTransport:
    """The transport on aiohttp.

    It makes its session on first use, and belongs to that event loop from then on.
    """

    def __init__(self, settings: Settings) -> None:
        """Uses ``connect_timeout``, ``proxy``, and ``tls``.

        Raises:
            ConfigurationError: a certificate file cannot be used.
        """
        self._connect_timeout = settings.connect_timeout
        self._tls = _ssl_context(settings.tls)
        self._proxies = _Proxies(settings.proxy)
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._responses: weakref.WeakSet[_AiohttpResponse] = weakref.WeakSet()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> Response:
        socket_path, target = _split_socket(url)
        session = self._session(socket_path)
        proxy = None if socket_path else self._proxies.of(url)
        with _mapped_errors(self._connect_timeout):
            response = await session.request(
                method,
                target,
                data=_payload(body),
                headers=headers,
                allow_redirects=False,
                proxy=proxy,
            )
        opened = _AiohttpResponse(response)
        self._responses.add(opened)
        return opened

    async def close(self) -> None:
        self._closed = True
        for response in list(self._responses):
            response.close()
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    def _session(self, socket_path: str) -> aiohttp.ClientSession:
        session = self._sessions.get(socket_path)
        if session is not None and self._loop is asyncio.get_running_loop():
            return session
        if self._closed:
            raise ClientClosedError("this client is closed")
        if self._loop not in (None, asyncio.get_running_loop()):
            raise ConfigurationError(
                "this client was first used in another event loop",
                hint="Make one client for each asyncio.run(), or use the blocking VllmUnified.",
            )
        self._loop = asyncio.get_running_loop()
        session = self._sessions[socket_path] = self._make_session(socket_path)
        return session

    def _make_session(self, socket_path: str) -> aiohttp.ClientSession:
        connector: aiohttp.BaseConnector
        if socket_path:
            connector = aiohttp.UnixConnector(
                path=socket_path, limit=0, keepalive_timeout=KEEPALIVE_SECONDS
            )
        else:
            connector = aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=KEEPALIVE_SECONDS,
                ttl_dns_cache=_SERVER_NAMES_SECONDS,
                ssl=self._tls,
            )
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),
            read_bufsize=_READ_BUFFER,
            # A proxy that compresses would hold the events of a stream back.
            headers={
                "Accept-Encoding": "identity",
                "User-Agent": f"vllm-unified/{__version__}",
            },
        )
        # aiohttp would send a GET a second time by itself; retries have one owner.
        session._retry_connection = False
        return session


class _AiohttpResponse:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def packet(self) -> bytes:
        with _mapped_errors():
            return await self._response.content.readany()

    async def read(self, limit: int) -> bytes:
        parts, size = [], 0
        while packet := await self.packet():
            size += len(packet)
            if size > limit:
                self.close()
                raise ResponseTooLargeError(f"the answer is larger than {limit} bytes")
            parts.append(packet)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        self._response.close()


class _Proxies:
    """Which proxy a server is reached by; the environment is read once for each server."""

    def __init__(self, proxy: str | None) -> None:
        self._fixed = proxy
        self._environment = urllib.request.getproxies() if proxy is None else {}
        self._known: dict[str, str | None] = {}

    def of(self, url: str) -> str | None:
        if self._fixed is not None:
            return self._fixed or None
        if not self._environment:
            return None
        parts = urlsplit(url)
        server = f"{parts.scheme}://{parts.netloc}"
        if server not in self._known:
            self._known[server] = self._look_up(parts.scheme, parts.netloc)
        return self._known[server]

    def _look_up(self, scheme: str, server: str) -> str | None:
        if urllib.request.proxy_bypass(server):
            return None
        proxy = self._environment.get(scheme, self._environment.get("all"))
        return proxy and proxy_address(proxy, key=f"{scheme}_proxy in the environment")


def _split_socket(url: str) -> tuple[str, URL]:
    """``unix:///run/vllm.sock:/v1/models`` is the path of a socket, and a URL to ask for there."""
    if url.startswith("unix://"):
        socket_path, _, path = url.removeprefix("unix://").rpartition(":")
        return socket_path, URL.build(scheme="http", host="localhost", path=path)
    return "", URL(url, encoded=True)


def _payload(body: bytes | None) -> bytes | io.BytesIO | None:
    """aiohttp warns of larger bodies that are bytes, and writes a file in pieces."""
    return body if body is None or len(body) <= _LARGE_BODY else io.BytesIO(body)


def _ssl_context(config: TLSConfig | None) -> ssl.SSLContext | bool:
    if config is None:
        return True
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
    if not config.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@contextlib.contextmanager
def _mapped_errors(connect_timeout: float | None = None) -> Iterator[None]:
    """The one edge at which foreign exceptions become ours."""
    try:
        yield
    except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as error:
        raise _own_error(error, connect_timeout) from error


def _own_error(error: Exception, connect_timeout: float | None) -> VllmError:
    text = _one_line(str(error)) or type(error).__name__
    match error:
        case aiohttp.ClientConnectorDNSError():
            return NameResolutionError(f"the host's name cannot be resolved: {error.host}")
        case UnicodeError():
            return NameResolutionError("the host's name cannot be resolved: it is no valid name")
        case aiohttp.ClientSSLError():
            reason = getattr(error, "certificate_error", None) or error.os_error
            return TLSError(f"the TLS handshake failed: {reason}")
        case aiohttp.ClientProxyConnectionError():
            return ConnectError(
                f"the proxy cannot be reached: {error.os_error}",
                hint='Check proxy=, HTTP_PROXY and NO_PROXY; proxy="" goes without one.',
            )
        case aiohttp.ClientHttpProxyError():
            said = f"HTTP {error.status} {_one_line(error.message)}"
            _forget_request(error)
            return ConnectError(f"the proxy refuses: {said}")
        case aiohttp.ConnectionTimeoutError():
            return ConnectTimeoutError(f"no connection within {connect_timeout:g} s")
        case aiohttp.ClientConnectorError():
            reason = os.strerror(error.errno) if error.errno else str(error.os_error)
            return ConnectError(f"no connection: {reason or 'it was closed at once'}")
        case aiohttp.ClientPayloadError() if isinstance(error.__cause__, ContentEncodingError):
            return ProtocolError("the answer is compressed, and not as it says")
        case aiohttp.ClientPayloadError():
            return ConnectionLostError("the connection closed before the answer was whole")
        case aiohttp.ServerDisconnectedError():
            return ConnectionLostError("the server closed the connection without an answer")
        case aiohttp.ClientResponseError():
            said = _one_line(error.message)
            _forget_request(error)
            if _TLS_ALERT in said:
                return TLSError("the server speaks TLS: its address begins with https://")
            return ProtocolError(f"the answer is not HTTP: {said}")
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError():
            return ConfigurationError("the address is not a valid URL")
        case OSError() if isinstance(error.__cause__ or error, ssl.SSLError):
            return TLSError(f"the server ended the TLS connection: {text}")
        case OSError():
            return ConnectionLostError(f"the connection broke: {error.strerror or text}")
        case aiohttp.ClientError() | RuntimeError():
            return ConnectionLostError(f"the exchange failed: {text}")
        case _:
            return ProtocolError(f"the exchange cannot be understood: {text}")


def _forget_request(error: aiohttp.ClientResponseError) -> None:
    """It stands in ``__cause__``, and would show keys: its repr has the request's headers and the
    proxy's URL, and its words quote the answer, which may be an echo."""
    nothing = CIMultiDictProxy[str](CIMultiDict())
    error.request_info = aiohttp.RequestInfo(URL(), error.request_info.method, nothing, URL())
    error.args = ()
    error.message = ""
    error.__cause__ = error.__context__ = None


def _one_line(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= 200 else joined[:200] + "..."
