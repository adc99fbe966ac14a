"""The transport at the wire: what a server may send, and what becomes of its connection."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support import answers
from tests.support.answers import chunked
from tests.support.scripted import CLOSE, STALL, ScriptedServer, Step
from tests.support.waiting import eventually, until
from vllm_unified import (
    ClientClosedError,
    ConfigurationError,
    ConnectionLostError,
    ProtocolError,
    ResponseTooLargeError,
)
from vllm_unified.settings import Settings
from vllm_unified.wire import connection, dialing, names
from vllm_unified.wire.http import HttpTransport
from vllm_unified.wire.transport import Response

LIMIT = 10_000_000
OK = answers.response("fine")
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture
async def transport() -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(Settings(proxy=""))
    yield transport
    await transport.close()


async def ask(
    transport: HttpTransport,
    server: ScriptedServer,
    path: str = "/a",
    *,
    method: str = "POST",
    body: bytes | None = b"{}",
    headers: Mapping[str, str] | None = None,
) -> Response:
    return await transport.open(method, server.url + path, headers=headers or {}, body=body)


async def body_of(transport: HttpTransport, server: ScriptedServer) -> bytes:
    return await (await ask(transport, server)).read(LIMIT)


@asynccontextmanager
async def used_again(transport: HttpTransport, server: ScriptedServer) -> AsyncIterator[None]:
    """What happens inside leaves the connection in a state in which it is used again."""
    yield
    server.always(OK)
    await body_of(transport, server)
    assert {request.connection for request in server.requests} == {1}


class TestAnswers:
    async def test_a_body_with_its_length(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        server.always(answers.response("hello", headers={"X-One": "1"}))

        async with used_again(transport, server):
            response = await ask(transport, server)
            assert response.status == 200
            assert response.headers["x-ONE"] == "1"
            assert response.headers.get("nothing") is None
            assert {name: response.headers[name] for name in response.headers} == {
                "content-type": "application/json",
                "content-length": "5",
                "x-one": "1",
            }
            assert len(response.headers) == 3
            assert await response.packet() == b"hello"
            assert await response.packet() == b""

    async def test_a_body_in_chunks_with_trailers(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        trailers = b"0\r\nx-sum: 1\r\n\r\n"
        server.always(CHUNKED + chunked(b"hel") + chunked(b"lo") + trailers)

        async with used_again(transport, server):
            response = await ask(transport, server)
            assert await response.read(LIMIT) == b"hello"
            assert "x-sum" not in response.headers

    @pytest.mark.parametrize("version", [b"1.0", b"1.1"])
    async def test_a_body_that_ends_with_the_connection(
        self, transport: HttpTransport, server: ScriptedServer, version: bytes
    ) -> None:
        server.reply(b"HTTP/" + version + b" 200 OK\r\n\r\nhello", CLOSE).always(OK)

        assert await body_of(transport, server) == b"hello"
        assert await body_of(transport, server) == b"fine"
        assert server.connections == 2

    @pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
    async def test_no_body(
        self, transport: HttpTransport, server: ScriptedServer, status: str
    ) -> None:
        server.always(f"HTTP/1.1 {status}\r\n\r\n".encode())

        async with used_again(transport, server):
            response = await ask(transport, server)
            assert await response.read(LIMIT) == b""

    async def test_the_length_of_what_a_get_would_give(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        server.always(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n")

        response = await ask(transport, server, method="HEAD", body=None)

        assert response.headers["content-length"] == "500"
        assert await response.packet() == b""

    async def test_interim_answers_are_passed_over(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        interim = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
        server.always(b"HTTP/1.1 100 Continue\r\n\r\n" + interim * 2 + OK)

        async with used_again(transport, server):
            response = await ask(transport, server)
            assert response.status == 200
            assert "link" not in response.headers

    async def test_an_answer_byte_by_byte(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        answer = CHUNKED + chunked(b"hello") + answers.END
        steps: list[Step] = []
        for number in range(len(answer)):
            steps.append(answer[number : number + 1])
        server.always(*steps)

        async with used_again(transport, server):
            assert await body_of(transport, server) == b"hello"

    async def test_a_switch_of_protocols_is_none_of_ours(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        head = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"
        server.always(head, STALL)

        with pytest.raises(ProtocolError, match="another protocol"):
            await ask(transport, server)
        await eventually(lambda: server.open_connections == 0)

    async def test_a_head_that_does_not_end(
        self,
        transport: HttpTransport,
        server: ScriptedServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(connection, "MAX_HEAD_BYTES", 5000)
        server.always(b"HTTP/1.1 200 OK\r\n", *[b"x-more: " + b"x" * 100 + b"\r\n"] * 100, STALL)

        with pytest.raises(ProtocolError, match="head is larger than 5000 bytes"):
            await ask(transport, server)
        await eventually(lambda: server.open_connections == 0)

    async def test_an_answer_before_the_request_is_sent_whole(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        """The rest of the request must not become the beginning of another."""
        refused = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def refuse() -> None:
                accepted, _ = listener.accept()
                with accepted:
                    accepted.recv(1000)
                    accepted.sendall(answers.response("", status="413 Too Large"))
                    refused.wait(10)

            thread = threading.Thread(target=refuse, daemon=True)
            thread.start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/a"
            response = await transport.open("POST", url, headers={}, body=b"x" * 50_000_000)
            await response.read(LIMIT)
            pool = next(iter(transport._pools.values()))
            refused.set()
            thread.join()

        assert response.status == 413
        assert pool.take() is None


class TestConnections:
    @pytest.mark.parametrize(
        "after",
        [
            pytest.param(b"garbage", id="garbage"),
            pytest.param(OK, id="another answer"),
            pytest.param(b"HTTP/1.1 2", id="a part of one"),
        ],
    )
    async def test_what_comes_after_the_answer_is_not_the_next_ones(
        self, transport: HttpTransport, server: ScriptedServer, after: bytes
    ) -> None:
        server.reply(OK + after, STALL).always(answers.response("other"))

        assert await body_of(transport, server) == b"fine"
        assert await body_of(transport, server) == b"other"
        assert server.connections == 2

    async def test_what_comes_unasked_later(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        later = threading.Event()
        server.reply(OK, later, OK, STALL).always(answers.response("other"))

        assert await body_of(transport, server) == b"fine"
        later.set()
        await eventually(lambda: server.open_connections == 0)
        assert await body_of(transport, server) == b"other"

    async def test_the_server_says_that_it_will_close(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        server.always(answers.response("fine", headers={"connection": "close"}), STALL)

        await body_of(transport, server)
        await body_of(transport, server)

        assert [request.connection for request in server.requests] == [1, 2]

    async def test_one_that_was_closed_while_the_loop_was_busy_is_not_used(
        self,
        transport: HttpTransport,
        server: ScriptedServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Nothing was sent on it, so that this is no failure of a request."""
        monkeypatch.setattr(connection, "_PEEK_SECONDS", 0.0)
        closing = threading.Event()
        server.reply(OK, closing, CLOSE).always(OK)
        await body_of(transport, server)

        closing.set()
        until(lambda: server.open_connections == 0)  # the loop does not run
        await body_of(transport, server)

        assert [request.connection for request in server.requests] == [1, 2]

    async def test_leaving_an_answer_cuts_its_connection(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        server.always(CHUNKED + chunked(b"hel"), STALL)
        response = await ask(transport, server)

        response.close()
        response.close()

        await eventually(lambda: server.open_connections == 0)
        with pytest.raises(ConnectionLostError, match="left"):
            await response.read(LIMIT)

    @pytest.mark.parametrize("sent", [b"", CHUNKED, CHUNKED + chunked(b"hel")])
    async def test_cancelling_cuts_the_connection(
        self, transport: HttpTransport, server: ScriptedServer, sent: bytes
    ) -> None:
        server.always(sent, STALL)

        async def exchange() -> None:
            response = await ask(transport, server)
            try:
                await response.read(LIMIT)
            finally:
                response.close()

        task = asyncio.create_task(exchange())
        await eventually(lambda: len(server.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await eventually(lambda: server.open_connections == 0)

    async def test_closing_the_transport_ends_what_is_on_its_way(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        server.reply(CHUNKED + chunked(b"hel"), STALL).always(STALL)
        response = await ask(transport, server)
        reading = asyncio.create_task(response.read(LIMIT))
        waiting = asyncio.create_task(ask(transport, server))
        await eventually(lambda: len(server.requests) == 2)

        await transport.close()

        for task in (reading, waiting):
            with pytest.raises(ClientClosedError):
                await task
        with pytest.raises(ClientClosedError):
            await ask(transport, server)

    async def test_two_tasks_cannot_read_one_answer(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        server.always(CHUNKED, STALL)
        response = await ask(transport, server)
        first = asyncio.create_task(response.packet())
        await asyncio.sleep(0)

        with pytest.raises(ConnectionLostError, match="two tasks"):
            await response.packet()

        first.cancel()


class TestBackPressure:
    async def test_a_body_that_nobody_reads_holds_the_server_back(
        self, transport: HttpTransport
    ) -> None:
        size, sent = 50_000_000, 0
        done = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def stream() -> None:
                nonlocal sent
                accepted, _ = listener.accept()
                with accepted:
                    accepted.recv(1000)
                    accepted.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
                    accepted.setblocking(False)
                    while sent < size:
                        try:
                            sent += accepted.send(b"x" * min(100_000, size - sent))
                        except BlockingIOError:
                            done.wait(0.01)

            thread = threading.Thread(target=stream, daemon=True)
            thread.start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/a"
            response = await transport.open("GET", url, headers={}, body=None)
            before = -1
            while sent > before:  # until it is stuck
                before = sent
                await asyncio.sleep(0.2)
            stuck_at, received = sent, 0
            while packet := await response.packet():
                received += len(packet)
            done.set()
            thread.join()

        assert stuck_at < size
        assert received == size

    async def test_a_body_that_is_waited_for_is_bounded_by_its_limit_only(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        body = b"x" * 3_000_000
        server.always(answers.response(body))

        assert len(await body_of(transport, server)) == len(body)
        response = await ask(transport, server)
        with pytest.raises(ResponseTooLargeError):
            await response.read(len(body) - 1)


class TestCompression:
    @pytest.mark.parametrize(
        ("name", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
    )
    async def test_what_is_compressed_unasked_is_decompressed(
        self, transport: HttpTransport, server: ScriptedServer, name: str, compress: Any
    ) -> None:
        body = bytes(range(256)) * 2000
        server.always(answers.response(compress(body), headers={"Content-Encoding": name}))

        async with used_again(transport, server):
            assert await body_of(transport, server) == body
            response = await ask(transport, server)
            pieces = []
            while piece := await response.packet():
                pieces.append(piece)
            assert b"".join(pieces) == body

    async def test_a_small_packet_may_hold_much(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        bomb = gzip.compress(b"\0" * 50_000_000)
        server.always(answers.response(bomb, headers={"content-encoding": "gzip"}))
        response = await ask(transport, server)

        assert len(await response.packet()) <= 2**16
        with pytest.raises(ResponseTooLargeError):
            await response.read(1_000_000)

    async def test_a_compressed_body_that_is_cut(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        body = gzip.compress(b"hello" * 100)[:-10]
        server.always(answers.response(body, headers={"content-encoding": "gzip"}))

        with pytest.raises(ProtocolError, match="compressed"):
            await body_of(transport, server)

    async def test_a_compression_that_is_not_known(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        server.always(answers.response("x", headers={"content-encoding": "br"}))

        with pytest.raises(ProtocolError, match="'br'"):
            await ask(transport, server)


class TestRequests:
    @pytest.mark.parametrize(
        "headers",
        [
            {"X-A": "1\r\nX-B: 2"},
            {"X-A": "1\nX-B: 2"},
            {"X-A": "1\r2"},
            {"X-A\r\nX-B": "2"},
            {"X-A": "\ud800"},
            {"Content-Length": "7"},
            {"transfer-encoding": "chunked"},
        ],
    )
    async def test_a_header_that_would_change_the_request(
        self, transport: HttpTransport, server: ScriptedServer, headers: dict[str, str]
    ) -> None:
        with pytest.raises(ConfigurationError, match="header"):
            await ask(transport, server, headers=headers)
        assert server.connections == 0

    async def test_the_callers_headers_take_precedence(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        server.always(OK)

        await ask(transport, server, headers={"host": "example.org", "user-agent": "me"})

        request = server.requests[0]
        assert request.headers["host"] == "example.org"
        assert request.headers["user-agent"] == "me"
        assert request.repeated_headers == []

    async def test_a_target_is_quoted_where_it_must_be(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        server.always(OK)

        await ask(transport, server, "/ü b%20c?d=e f")

        assert server.requests[0].target == "/%C3%BC%20b%20c?d=e%20f"

    async def test_a_get_has_no_length_and_an_empty_body_has(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        server.always(OK)

        await (await ask(transport, server, method="GET", body=None)).read(LIMIT)
        await (await ask(transport, server, body=b"")).read(LIMIT)

        lengths = [request.headers.get("content-length") for request in server.requests]
        assert lengths == [None, "0"]

    async def test_only_so_many_routes_are_remembered(
        self,
        transport: HttpTransport,
        server: ScriptedServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("vllm_unified.wire.http._MAX_ROUTES", 10)
        server.always(OK)

        for number in range(35):
            await (await ask(transport, server, f"/{number}")).read(LIMIT)

        assert len(transport._routes) <= 10
        assert server.connections == 1


class TestDepartures:
    async def test_requests_of_one_turn_leave_when_all_of_them_are_made(
        self, transport: HttpTransport, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.always(OK)
        await asyncio.gather(*(body_of(transport, server) for _ in range(3)))
        steps = []
        for name in ("send", "depart"):
            done = getattr(connection.Connection, name)

            def noting(*args: Any, name: str = name, done: Any = done) -> Any:
                steps.append(name)
                return done(*args)

            monkeypatch.setattr(connection.Connection, name, noting)

        await asyncio.gather(*(body_of(transport, server) for _ in range(3)))

        assert steps == ["send"] * 3 + ["depart"] * 3

    async def test_one_that_is_left_before_it_leaves_is_never_sent(
        self, transport: HttpTransport, server: ScriptedServer
    ) -> None:
        server.always(OK)
        await body_of(transport, server)

        left = asyncio.create_task(body_of(transport, server))
        await asyncio.sleep(0)  # it has been made, and departs after this
        await transport.close()

        with pytest.raises(ClientClosedError):
            await left
        await asyncio.sleep(0.05)
        assert len(server.requests) == 1

    async def test_one_that_cannot_be_written_keeps_no_other_from_it(
        self, transport: HttpTransport, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.always(OK)
        await asyncio.gather(*(body_of(transport, server) for _ in range(2)))
        send = connection.Connection.send
        broken: list[Any] = []

        class Closed:
            def __init__(self, inner: Any) -> None:
                self.abort = inner.abort

            def is_closing(self) -> bool:
                return False

            def write(self, data: bytes) -> None:
                raise RuntimeError("the handler is closed")

        def breaking(self: Any, *request: Any) -> Any:
            if not broken:
                broken.append(self)
                self._transport = Closed(self._transport)
            return send(self, *request)

        monkeypatch.setattr(connection.Connection, "send", breaking)

        first, second = await asyncio.gather(
            *(body_of(transport, server) for _ in range(2)), return_exceptions=True
        )

        assert isinstance(first, ConnectionLostError)
        assert second == b"fine"

    async def test_one_whose_connection_ends_before_it_leaves_is_told(
        self, transport: HttpTransport, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.always(OK)
        await body_of(transport, server)
        depart = connection.Connection.depart

        def too_late(self: connection.Connection) -> None:
            assert self._transport is not None
            self._transport.abort()
            depart(self)

        monkeypatch.setattr(connection.Connection, "depart", too_late)

        with pytest.raises(ConnectionLostError):
            await body_of(transport, server)
        assert len(server.requests) == 1


class TestNames:
    async def test_a_name_is_asked_for_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        loop = asyncio.get_running_loop()

        async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
            asked.append(host)
            await asyncio.sleep(0)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        known = names.Names(seconds=60)

        first = asyncio.create_task(known.addresses("gpu.example", 80))
        others = [asyncio.create_task(known.addresses("gpu.example", 80)) for _ in range(5)]
        await asyncio.sleep(0)
        first.cancel()  # which the others do not notice
        found = await asyncio.gather(*others)
        again = await known.addresses("gpu.example", 80)

        assert asked == ["gpu.example"]
        assert {address[-1] for addresses in [*found, again] for address in addresses} == {
            ("127.0.0.1", 80)
        }

    async def test_an_address_is_not_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(asyncio.BaseEventLoop, "getaddrinfo")
        known = names.Names(seconds=60)

        assert (await known.addresses("127.0.0.1", 80))[0][-1] == ("127.0.0.1", 80)
        assert (await known.addresses("::1", 80))[0][-1][:2] == ("::1", 80)

    async def test_the_next_address_is_tried(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def addresses(self: names.Names, host: str, port: int) -> list[Any]:
            nobody = ("127.0.0.1", 1)
            there = ("127.0.0.1", server.port)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", at) for at in (nobody, there)]

        monkeypatch.setattr(names.Names, "addresses", addresses)
        server.always(OK)
        dialer = dialing.Dialer(connect_timeout=10, tls=None)

        connected = await dialer.dial(dialing.Place("gpu.example", 80), _Nobody())

        answer = connected.send("GET", b"GET / HTTP/1.1\r\n\r\n", None)
        connected.depart()
        assert await answer.read(LIMIT) == b"fine"
        connected.abort()

    def test_ipv6_addresses_stand_in_brackets(self) -> None:
        assert dialing.Place("::1", 80).authority == "[::1]:80"


class _Nobody:
    def give_back(self, connection: connection.Connection) -> None:
        pass

    def lost(self, connection: connection.Connection) -> None:
        pass
