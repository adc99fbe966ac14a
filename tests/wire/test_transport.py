"""Connections: kept, secured, led through proxies, bounded, and given up when they are broken."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import answers
from tests.support.certificates import Certificates, make_certificates
from tests.support.proxy import Proxy
from tests.support.scripted import CLOSE, RESET, STALL, ScriptedServer
from tests.support.waiting import eventually
from vllm_unified import (
    AsyncVllmUnified,
    ClientClosedError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    NameResolutionError,
    ProtocolError,
    ResponseTooLargeError,
    TLSConfig,
    TLSError,
)
from vllm_unified.wire import http
from vllm_unified.wire.transport import Response

pytestmark = pytest.mark.usefixtures("no_pauses")

HELLO = answers.completion("Hello")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tls_server(certificates: Certificates) -> Iterator[ScriptedServer]:
    with ScriptedServer(tls=certificates.server_context()) as server:
        yield server.always(HELLO)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy


def client(url: str, **settings: Any) -> AsyncVllmUnified:
    return AsyncVllmUnified(api_url=url, **{"timeout": 5, "max_retries": 0, **settings})


class TestPool:
    async def test_a_connection_is_used_again(self, server: ScriptedServer) -> None:
        server.always(HELLO)

        async with client(server.url) as vllm:
            for _ in range(5):
                await vllm.generate("a")

        assert [request.connection for request in server.requests] == [1] * 5

    async def test_every_request_at_once_has_its_own(self, server: ScriptedServer) -> None:
        together = threading.Event()
        server.always(together, HELLO)

        async with client(server.url) as vllm:
            calls = [asyncio.create_task(vllm.generate("a")) for _ in range(60)]
            await eventually(lambda: len(server.requests) == 60)
            together.set()
            await asyncio.gather(*calls)

        assert server.connections == 60

    async def test_an_idle_connection_is_retired_before_the_server_closes_it(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert http.KEEPALIVE_SECONDS < 5, "uvicorn's, and so vLLM's"
        monkeypatch.setattr(http, "KEEPALIVE_SECONDS", 0.05)
        server.always(HELLO)

        async with client(server.url) as vllm:
            await vllm.generate("a")
            await eventually(lambda: server.open_connections == 0)
            await vllm.generate("a")

        assert [request.connection for request in server.requests] == [1, 2]

    async def test_a_connection_that_dies_when_it_is_used_again_costs_a_retry_only(
        self, server: ScriptedServer
    ) -> None:
        server.reply(HELLO).reply(RESET).always(HELLO)

        async with client(server.url, max_retries=1) as vllm:
            await vllm.generate("a")
            result = await vllm.generate("a")

        assert [attempt.error is None for attempt in result.metadata.attempts] == [False, True]

    async def test_after_an_answer_that_was_not_read_the_connection_is_not_used_again(
        self, server: ScriptedServer
    ) -> None:
        server.reply(answers.response("x" * 5000)[:-100], STALL).always(HELLO)

        async with client(server.url, max_response_bytes=4000) as vllm:
            with pytest.raises(ResponseTooLargeError):
                await vllm.generate("a")
            await vllm.generate("a")

        assert len({request.connection for request in server.requests}) == 2

    async def test_closing_the_client_closes_its_connections(self, server: ScriptedServer) -> None:
        server.always(HELLO)
        vllm = client(server.url)
        await vllm.generate("a")

        await vllm.close()
        await vllm.close()

        await eventually(lambda: server.open_connections == 0)
        with pytest.raises(ClientClosedError):
            await vllm.generate("a")

    def test_a_client_belongs_to_its_first_event_loop(self, server: ScriptedServer) -> None:
        server.always(HELLO)
        vllm = client(server.url)

        async def call_and_close() -> None:
            with pytest.raises(ConfigurationError, match="another event loop"):
                await vllm.generate("a")

        with asyncio.Runner() as first:
            first.run(vllm.generate("a"))
            with asyncio.Runner() as second:
                second.run(call_and_close())
            first.run(vllm.close())


class TestWhatIsSent:
    async def test_the_headers_of_a_request(self, server: ScriptedServer) -> None:
        server.always(HELLO)

        async with client(server.url, api_key="k", headers={"X-Team": "ü"}) as vllm:
            result = await vllm.generate("a", headers={"X-Call": "1"})

        headers = server.requests[0].headers
        assert headers["authorization"] == "Bearer k"
        assert headers["content-type"] == "application/json"
        assert headers["accept-encoding"] == "identity"
        assert headers["user-agent"].startswith("vllm-unified/")
        assert headers["x-request-id"] == result.metadata.request_id
        assert headers["x-team"].encode("latin-1").decode() == "ü"
        assert headers["x-call"] == "1"
        assert "cookie" not in headers

    async def test_all_of_our_headers_may_be_the_callers(self, server: ScriptedServer) -> None:
        server.always(answers.completion("a"))
        own = {"host": "example", "User-Agent": "mine", "Accept-Encoding": "gzip"}
        async with client(server.url, headers=own) as vllm:
            await vllm.generate("a")
        headers = server.requests[0].headers
        assert {name.lower(): headers[name.lower()] for name in own} == {
            name.lower(): value for name, value in own.items()
        }
        assert headers["content-type"] == "application/json"

    async def test_the_callers_headers_win_however_they_are_spelled(
        self, server: ScriptedServer
    ) -> None:
        server.always(HELLO)

        async with client(server.url, api_key="k", headers={"authorization": "Basic x"}) as vllm:
            await vllm.generate("a", headers={"x-request-id": "mine"})

        request = server.requests[0]
        assert request.headers["authorization"] == "Basic x"
        assert request.headers["x-request-id"] == "mine"
        assert request.repeated_headers == []

    async def test_an_empty_key_is_no_key(self, server: ScriptedServer) -> None:
        server.always(HELLO)

        async with client(server.url, api_key="") as vllm:
            await vllm.generate("a")

        assert "authorization" not in server.requests[0].headers

    async def test_cookies_are_not_kept(self, server: ScriptedServer) -> None:
        server.always(answers.response(answers.completion_body("a"), headers={"set-cookie": "a=1"}))

        # By name: a jar would not keep the cookies of an address.
        async with client(server.url.replace("127.0.0.1", "localhost")) as vllm:
            await vllm.generate("a")
            await vllm.generate("a")

        assert "cookie" not in server.requests[1].headers

    async def test_a_prompt_of_megabytes(self, server: ScriptedServer) -> None:
        server.always(HELLO)
        prompt = "x" * 3 * 2**20

        async with client(server.url) as vllm:
            await vllm.generate(prompt)

        assert server.requests[0].json["prompt"] == prompt

    async def test_the_path_before_v1_is_kept(self, server: ScriptedServer) -> None:
        server.always(HELLO)

        async with client(f"{server.url}/team/a%20b/v1/") as vllm:
            await vllm.generate("a")

        assert server.requests[0].target == "/team/a%20b/v1/completions"


class TestTLS:
    async def test_a_private_authority(
        self, tls_server: ScriptedServer, certificates: Certificates
    ) -> None:
        async with client(tls_server.url, tls=TLSConfig(ca_file=str(certificates.ca))) as vllm:
            assert (await vllm.generate("a")).text == "Hello"

    @pytest.mark.parametrize("authority", [None, "other_ca"], ids=["the system's", "another"])
    async def test_an_authority_that_is_not_trusted(
        self, tls_server: ScriptedServer, certificates: Certificates, authority: str | None
    ) -> None:
        tls = TLSConfig(ca_file=str(getattr(certificates, authority))) if authority else None

        async with client(tls_server.url, tls=tls, max_retries=2) as vllm:
            with pytest.raises(TLSError, match="certificate verify failed") as caught:
                await vllm.generate("a")

        assert tls_server.requests == []
        assert len(caught.value.attempts) == 1, "another attempt cannot help"
        assert isinstance(caught.value.__cause__, Exception)

    async def test_a_certificate_for_another_host(
        self, tls_server: ScriptedServer, certificates: Certificates
    ) -> None:
        url = tls_server.url.replace("localhost", "127.0.0.1")

        async with client(url, tls=TLSConfig(ca_file=str(certificates.ca))) as vllm:
            with pytest.raises(TLSError, match=r"127\.0\.0\.1"):
                await vllm.generate("a")

    async def test_without_verification(self, tls_server: ScriptedServer) -> None:
        async with client(tls_server.url, tls=TLSConfig(verify=False)) as vllm:
            assert (await vllm.generate("a")).text == "Hello"

    @pytest.mark.parametrize("with_certificate", [True, False])
    async def test_a_server_that_asks_for_a_client_certificate(
        self, certificates: Certificates, with_certificate: bool
    ) -> None:
        own: dict[str, Any] = {
            "cert_file": str(certificates.client),
            "key_file": str(certificates.client_key),
        }
        tls = TLSConfig(ca_file=str(certificates.ca), **(own if with_certificate else {}))
        context = certificates.server_context(ask_for_client=True)

        with ScriptedServer(tls=context) as server:
            server.always(HELLO)
            async with client(server.url, tls=tls) as vllm:
                if with_certificate:
                    assert (await vllm.generate("a")).text == "Hello"
                else:
                    with pytest.raises(TLSError):
                        await vllm.generate("a")

    async def test_https_to_a_port_that_speaks_http(self, server: ScriptedServer) -> None:
        async with client(server.url.replace("http://", "https://")) as vllm:
            with pytest.raises(TLSError, match="Check http:// against https://"):
                await vllm.generate("a")

    async def test_http_to_a_port_that_speaks_https(self, tls_server: ScriptedServer) -> None:
        async with client(tls_server.url.replace("https://", "http://")) as vllm:
            with pytest.raises((TLSError, ConnectionLostError, ProtocolError)):
                await vllm.generate("a")

    async def test_a_tls_alert_in_place_of_an_answer_is_recognised(
        self, server: ScriptedServer
    ) -> None:
        server.always(b"\x15\x03\x01\x00\x02\x02\x50", CLOSE)

        async with client(server.url) as vllm:
            with pytest.raises(TLSError, match="https://"):
                await vllm.generate("a")

    @pytest.mark.parametrize("field", ["ca_file", "cert_file"])
    def test_a_file_that_is_no_certificate_is_named(self, tmp_path: Path, field: str) -> None:
        file = tmp_path / "broken.pem"
        file.write_text("not a certificate")

        tls: dict[str, Any] = {field: str(file)}
        with pytest.raises(ConfigurationError, match=r"broken\.pem"):
            client("https://localhost", tls=TLSConfig(**tls))

    def test_a_file_that_is_missing_is_named(self) -> None:
        with pytest.raises(ConfigurationError, match=r"/nowhere\.pem"):
            client("https://localhost", tls=TLSConfig(ca_file="/nowhere.pem"))


class TestProxies:
    async def test_http_is_forwarded(self, server: ScriptedServer, proxy: Proxy) -> None:
        server.always(HELLO)

        async with client(server.url, proxy=proxy.url) as vllm:
            assert (await vllm.generate("a")).text == "Hello"

        assert proxy.requests == [f"POST {server.url}/v1/completions HTTP/1.1"]

    async def test_https_is_tunnelled(
        self, tls_server: ScriptedServer, certificates: Certificates, proxy: Proxy
    ) -> None:
        tls = TLSConfig(ca_file=str(certificates.ca))

        async with client(tls_server.url, proxy=proxy.url, tls=tls, api_key="key-1") as vllm:
            assert (await vllm.generate("a")).text == "Hello"

        assert proxy.requests == [f"CONNECT localhost:{tls_server.port} HTTP/1.1"]

    async def test_credentials_of_the_proxy(self, server: ScriptedServer, proxy: Proxy) -> None:
        server.always(HELLO)

        async with client(server.url, proxy=f"http://me:pass@{proxy.address}") as vllm:
            await vllm.generate("a")

        assert proxy.authorizations == ["Basic bWU6cGFzcw=="]

    @pytest.mark.parametrize("scheme", ["http://", ""])
    async def test_the_environments_proxy(
        self,
        server: ScriptedServer,
        proxy: Proxy,
        monkeypatch: pytest.MonkeyPatch,
        scheme: str,
    ) -> None:
        monkeypatch.setenv("http_proxy", scheme + proxy.address)
        server.always(HELLO)

        async with client(server.url) as vllm:
            await vllm.generate("a")

        assert len(proxy.requests) == 1

    @pytest.mark.parametrize(
        "exceptions", ["127.0.0.1", "example.org,127.0.0.1:{port}", "example.org, 127.0.0.1", "*"]
    )
    async def test_no_proxy(
        self,
        server: ScriptedServer,
        proxy: Proxy,
        monkeypatch: pytest.MonkeyPatch,
        exceptions: str,
    ) -> None:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", exceptions.format(port=server.port))
        server.always(HELLO)

        async with client(server.url) as vllm:
            await vllm.generate("a")

        assert proxy.requests == []

    async def test_an_empty_proxy_is_none_whatever_the_environment_says(
        self, server: ScriptedServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", proxy.url)
        server.always(HELLO)

        async with client(server.url, proxy="") as vllm:
            await vllm.generate("a")

        assert proxy.requests == []

    async def test_a_proxy_of_another_kind_in_the_environment_is_said(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("all_proxy", "socks5://me:geheim@127.0.0.1:1")

        async with client(server.url) as vllm:
            with pytest.raises(ConfigurationError, match="http_proxy in the environment") as caught:
                await vllm.generate("a")

        assert "geheim" not in str(caught.value)

    async def test_a_proxy_that_cannot_be_reached(self, server: ScriptedServer) -> None:
        async with client(server.url, proxy="http://me:geheim@127.0.0.1:1") as vllm:
            with pytest.raises(ConnectError, match="the proxy cannot be reached") as caught:
                await vllm.generate("a")

        assert "geheim" not in f"{caught.value}{caught.value.__cause__!r}"

    async def test_a_proxy_that_refuses(self, certificates: Certificates) -> None:
        refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n"
        with ScriptedServer() as refusing:
            refusing.always(refusal)
            gate = refusing.url.replace("http://", "http://me:geheim@")
            async with client("https://localhost:1", proxy=gate, api_key="geheim") as vllm:
                with pytest.raises(ConnectError, match="the proxy refuses: HTTP 407") as caught:
                    await vllm.generate("a")

        assert "geheim" not in f"{caught.value}{caught.value.__cause__!r}"
        assert "bWU6Z" not in repr(caught.value.__cause__)


class TestUnixSockets:
    @pytest.mark.parametrize("name", ["vllm.sock", "a:b c.sock"])
    async def test_a_server_behind_a_socket(self, tmp_path: Path, name: str) -> None:
        with ScriptedServer(unix_path=str(tmp_path / name)) as server:
            server.always(HELLO)
            async with client(server.url) as vllm:
                result = await vllm.generate("a")

        assert server.requests[0].target == "/v1/completions"
        assert result.metadata.endpoint == server.url

    async def test_a_proxy_is_not_asked(
        self, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", proxy.url)
        with ScriptedServer(unix_path=str(tmp_path / "s")) as server:
            server.always(HELLO)
            async with client(server.url) as vllm:
                await vllm.generate("a")

        assert proxy.requests == []

    async def test_no_socket(self, tmp_path: Path) -> None:
        async with client(f"unix://{tmp_path}/none") as vllm:
            with pytest.raises(ConnectError, match="No such file"):
                await vllm.generate("a")


class TestBounds:
    @pytest.mark.parametrize("chunked", [True, False])
    async def test_an_answer_that_is_too_large(self, server: ScriptedServer, chunked: bool) -> None:
        body = b"x" * 5000
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        start = head + answers.chunked(body) if chunked else answers.response(body)[:-100]
        server.always(start, STALL)

        async with client(server.url, max_response_bytes=4000) as vllm:
            with pytest.raises(ResponseTooLargeError, match="4000 bytes"):
                await vllm.generate("a")
            await eventually(lambda: server.open_connections == 0)

    async def test_a_redirect_is_not_followed(self, server: ScriptedServer) -> None:
        server.always(
            answers.response(
                status="307 Temporary Redirect", headers={"location": f"{server.url}/elsewhere"}
            )
        )

        async with client(server.url, api_key="k") as vllm:
            with pytest.raises(ProtocolError, match="elsewhere"):
                await vllm.generate("a")

        assert len(server.requests) == 1

    async def test_a_host_that_does_not_answer(self) -> None:
        with socket.socket() as full, socket.socket() as waiting:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            waiting.connect(full.getsockname())  # the only place in the line
            url = f"http://127.0.0.1:{full.getsockname()[1]}"

            async with client(url, connect_timeout=0.1) as vllm:
                with pytest.raises(ConnectTimeoutError, match=r"within 0\.1 s"):
                    await vllm.generate("a")

    # None of them is a name that a name server would be asked for.
    @pytest.mark.parametrize("host", ["nope." * 60, "bücher." * 50, "a..b", "x" * 70])
    async def test_a_name_that_is_none(self, host: str) -> None:
        async with client(f"http://{host}") as vllm:
            with pytest.raises(NameResolutionError) as caught:
                await vllm.generate("a")

        assert isinstance(caught.value, ConnectionError)


class _OneAnswer:
    """A transport of the user's own."""

    def __init__(self) -> None:
        self.closed = False
        self.urls: list[str] = []

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> Response:
        self.urls.append(url)
        return _Answer()

    async def close(self) -> None:
        self.closed = True


class _Answer:
    status = 200
    headers: Mapping[str, str] = {}

    async def packet(self) -> bytes:
        return b""

    async def read(self, limit: int) -> bytes:
        return HELLO.partition(b"\r\n\r\n")[2]

    def close(self) -> None:
        pass


async def test_another_transport_can_be_used() -> None:
    own = _OneAnswer()

    async with AsyncVllmUnified({"transport": own}, api_url="http://a") as vllm:
        assert (await vllm.generate("a")).text == "Hello"

    assert own.urls == ["http://a/v1/completions"]
    assert own.closed


@pytest.mark.parametrize("resources", [{"transports": None}, {"x": 1}])
def test_an_unknown_resource_is_named(resources: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=repr(next(iter(resources)))):
        AsyncVllmUnified(resources)
