"""The simulator itself: sockets, authentication, routing, faults, and a record of requests."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
import ssl
import time
from collections.abc import Coroutine
from email.utils import formatdate
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

import msgspec

from vllm_unified.simulator.api import control
from vllm_unified.simulator.api.routes import LOAD_AWARE, route_of, routes_of
from vllm_unified.simulator.config import SimulatorConfig
from vllm_unified.simulator.errors import ApiError, busy
from vllm_unified.simulator.faults import Facts, Fault, FaultKind, FaultPlan
from vllm_unified.simulator.faulty import HTML_PAGE, Cut, FaultyExchange, stall
from vllm_unified.simulator.fixed import FixedConnection
from vllm_unified.simulator.http import Connection, Exchange, Request
from vllm_unified.simulator.service import JSON_TYPE, Service, send_detail, send_error, send_json

_GUARDED = ("/v1", "/v2", "/inference", "/cohere")
"""Prefixes of the paths that need an API key."""


class Recorded:
    """A request that a simulator got, for a test to look at."""

    def __init__(self, request: Request, fault: Fault | None) -> None:
        self.method = request.method
        self.path = request.path
        self.headers = request.headers
        """Lower-case names."""
        self.body = request.body
        self.fault = fault
        """What it met, or ``None``."""
        self.status: int | None = None
        """Status that was sent, if any was."""
        self.disconnected = False
        """Whether the client went away before the answer was complete."""
        self.done = False

    def __repr__(self) -> str:
        met = f", fault={self.fault.kind!r}" if self.fault else ""
        return f"<{self.method} {self.path}: {self.status}{met}>"

    @property
    def json(self) -> Any:
        """The body as JSON.

        Raises:
            ValueError: if it is none.
        """
        return json.loads(self.body)


class Simulator:
    """A server that behaves like vLLM and fails like one.

    Example::

        async with Simulator(model="sim") as server:
            server.fail_next("reset_after", after_tokens=3)
            ...  # talk to server.url
            assert server.requests[0].status == 200
    """

    def __init__(
        self,
        config: SimulatorConfig | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        **options: Any,
    ) -> None:
        """Describe a server; it starts on ``async with`` or :meth:`start`.

        Args:
            config: what it is; ``None`` for the defaults.
            tls: context with the certificate, to serve https.
            **options: fields of :class:`SimulatorConfig` that differ from ``config``.

        Raises:
            TypeError: for an option that does not exist.
            ValueError: for a configuration that cannot serve.
        """
        base = config or SimulatorConfig()
        self.config = msgspec.structs.replace(base, **options) if options else base
        self.faults = FaultPlan(self.config.seed)
        """Faults in force; see also :meth:`fail_next`."""
        self.requests: list[Recorded] = []
        """What arrived, in order, /simulator/faults excepted."""
        self.keep_alive = self.config.keep_alive
        self.service = Service(self.config)
        self._tls = tls
        self._routes = routes_of(self.config)
        self._connections: set[Connection | FixedConnection] = set()
        self._reserved: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        self._dying = False

    def __repr__(self) -> str:
        state = "running" if self.running else "down"
        return f"<Simulator {self.config.names[0]!r} {state}, {len(self.requests)} requests>"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """Address, without a trailing slash; for a Unix socket ``http://localhost``.

        Raises:
            RuntimeError: before the first start.
        """
        if self.config.uds is not None:
            return "http://localhost"
        if self._reserved is None:
            raise RuntimeError("the simulator was not started")
        scheme = "https" if self._tls else "http"
        host, port = self._reserved.getsockname()[:2]
        return f"{scheme}://{host}:{port}"

    @property
    def running(self) -> bool:
        """Whether connections are accepted."""
        return self._server is not None

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    async def start(self) -> None:
        """Listen. Nothing happens if it does already.

        Raises:
            OSError: the address is taken.
        """
        if self._server is not None:
            return
        loop = asyncio.get_running_loop()
        self._stopped.clear()
        if self.config.uds is not None:
            self._server = await loop.create_unix_server(
                self._connection, self.config.uds, ssl=self._tls
            )
            return
        if self._reserved is None:
            # Bound but not listening: while it is down, connections are refused and nobody else
            # gets the port.
            self._reserved = _bound(self.config.host, self.config.port)
        listener = _bound(*self._reserved.getsockname()[:2])
        self._server = await loop.create_server(
            self._connection, sock=listener, ssl=self._tls, backlog=2048
        )

    async def stop(self) -> None:
        """Close everything and give the port back."""
        self._go_down(reset=False)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        await asyncio.sleep(0)

    def kill(self) -> None:
        """Die as a process does under SIGKILL: every connection is reset, new ones are refused."""
        self._go_down(reset=True)

    def refuse(self) -> None:
        """Refuse new connections and leave the open ones alone, until :meth:`start`."""
        server, self._server = self._server, None
        if server is not None:
            _close(server)

    async def restart(self, downtime: float = 0.0) -> None:
        """Die and come back at the same address, with an empty cache and no adapters.

        Args:
            downtime: seconds until it listens again.
        """
        self._disconnect(reset=True)
        self.service = Service(self.config)
        await asyncio.sleep(downtime)
        await self.start()

    def hang(self) -> None:
        """Let the engine make no progress, while everything says it is well."""
        self.service.engine.hung = True

    def slow_down(self, factor: float = 10.0) -> None:
        """Let everything take ``factor`` times as long as configured, or than a millisecond."""
        self.service.engine.slowdown = factor

    def kill_engine(self) -> None:
        """Let the engine die: 500s, error frames, /health 503, and the server exits soon after."""
        self.service.engine.kill()
        if not self.config.keep_alive_on_engine_death:
            self._dying = True
            self._later(self.config.engine_death_grace, self._exit)

    def heal(self) -> None:
        """Clear all faults, a hang and a slowness; a dead engine stays dead."""
        self.faults.clear()
        engine = self.service.engine
        engine.slowdown = 1.0
        if engine.hung:
            engine.hung = False
            engine.resume()

    def fail_next(self, kind: FaultKind, times: int = 1, **options: Any) -> None:
        """Let a fault meet the next requests under /v1.

        Args:
            kind: what goes wrong; see :class:`Fault`.
            times: how many requests it meets.
            **options: other fields of :class:`Fault`.

        Raises:
            ValueError: an unknown kind or a bad option.
        """
        try:
            self.faults.add(msgspec.convert({"kind": kind, "times": times, **options}, Fault))
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from None

    async def wait_stopped(self) -> None:
        """Wait until it is down, as after the death of the engine."""
        await self._stopped.wait()

    def connected(self, connection: Connection | FixedConnection) -> None:
        """Told by a connection that it exists."""
        self._connections.add(connection)
        if self._server is None:
            connection.reset()  # it was accepted just before the end

    def disconnected(self, connection: Connection | FixedConnection) -> None:
        """Told by a connection that it is gone."""
        self._connections.discard(connection)

    def head(self, request: Request, connection: Connection) -> None:
        """Told that a request's head arrived: the moment to stop reading its body."""
        facts = Facts(path=request.path, headers=request.headers, body_known=False)
        fault = self.faults.choose(facts)
        if fault is not None:
            connection.pause_reading()
            if fault.seconds is not None:
                self._later(fault.seconds, connection.resume_reading)

    async def handle(self, request: Request, exchange: Exchange) -> None:
        """Answer one request, with its fault if it meets one."""
        if self.config.control and request.path.startswith("/simulator/"):
            await _answer_control(self, request, exchange)
            return
        fault = self.faults.choose(_facts(request))
        recorded = Recorded(request, fault)
        self.requests.append(recorded)
        if fault is not None:
            faulty = FaultyExchange(exchange, request, fault)
            faulty.on_die = self.kill_engine
            exchange = faulty
        try:
            if fault is None or not await self._before_answer(fault, exchange):
                await self._answer(request, exchange)
        except Cut:
            pass
        except asyncio.CancelledError:
            recorded.disconnected = not exchange.finished
            raise
        finally:
            recorded.status = exchange.status
            recorded.done = True
        if fault is not None and fault.kind == "stale_connection":
            exchange.connection.broken = True

    async def _answer(self, request: Request, exchange: Exchange) -> None:
        service = self.service
        route = route_of(self._routes, request.path)
        counted = route in LOAD_AWARE
        service.load += counted
        handler = route or "none"
        try:
            if not self._authorized(request):
                await send_json(exchange, {"error": "Unauthorized"}, 401)
                handler = ""
            elif route is None:
                handler = await _answer_unrouted(self._routes, request, exchange)
            elif request.method not in self._routes[route]:
                allow = ", ".join(self._routes[route])
                await send_detail(exchange, HTTPStatus.METHOD_NOT_ALLOWED, [("allow", allow)])
                handler = "none"
            else:
                await self._routes[route][request.method](service, request, exchange)
        except ApiError as error:
            await send_error(exchange, error)
        finally:
            service.load -= counted
            if handler:
                _count(service, handler, request, exchange)

    def _authorized(self, request: Request) -> bool:
        keys = self.config.api_keys
        if not keys or request.method == "OPTIONS" or not request.path.startswith(_GUARDED):
            return True
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        token = sent.encode()
        matches = [hmac.compare_digest(key.encode(), token) for key in keys]
        return scheme.lower() == "bearer" and any(matches)

    async def _before_answer(self, fault: Fault, exchange: Exchange) -> bool:
        """What a fault does before the request is looked at; whether that was the answer."""
        if (canned := _canned(fault)) is not None:
            await exchange.respond(*canned)
            return True
        match fault.kind:
            case "reset" | "refuse":
                exchange.reset()
                if fault.kind == "refuse":
                    self.refuse()
                    self._for_a_time(fault.seconds, self.start())
                return True
            case "restart":
                self._spawn(self.restart(fault.seconds or 0.0))
                exchange.reset()
                return True
            case "stall":
                await stall(fault.seconds)
            case "hang":
                self.hang()
                self._after(fault.seconds, self.service.engine.resume)
            case "slow":
                self.slow_down(fault.factor)
                self._after(fault.seconds, lambda: self.slow_down(1.0))
            case "die" if fault.after_tokens == 0:
                self.kill_engine()
            case _:
                pass
        return False

    def _connection(self) -> Connection | FixedConnection:
        return FixedConnection(self) if self.config.fixed_answer else Connection(self)

    def _go_down(self, *, reset: bool) -> None:
        self._disconnect(reset=reset)
        self._stopped.set()

    def _disconnect(self, *, reset: bool) -> None:
        self.refuse()
        self._dying = False
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        for connection in list(self._connections):
            if reset:
                connection.reset()
            else:
                connection.close()

    def _exit(self) -> None:
        if self._dying:
            self._go_down(reset=False)

    def _later(self, seconds: float, action: Any) -> None:
        now = asyncio.get_running_loop().time()
        self._timers = {timer for timer in self._timers if timer.when() > now}
        self._timers.add(asyncio.get_running_loop().call_later(seconds, action))

    def _after(self, seconds: float | None, action: Any) -> None:
        if seconds is not None:
            self._later(seconds, action)

    def _for_a_time(self, seconds: float | None, then: Coroutine[Any, Any, None]) -> None:
        if seconds is None:
            then.close()
        else:
            self._spawn(_delayed(seconds, then))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _close(server: asyncio.Server) -> None:
    """Accept nothing more.

    asyncio leaves a connection open for ever, and unknown, that it accepted in the moment in which
    its server is closed; so that moment has to be over.
    """
    loop = asyncio.get_running_loop()
    if not isinstance(loop, asyncio.BaseEventLoop):
        server.close()  # uvloop has no such moment
        return
    for listener in server.sockets:
        loop.remove_reader(listener.fileno())
        listener.shutdown(socket.SHUT_RDWR)
    loop.call_soon(server.close)


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


async def _delayed(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        work.close()
        raise
    await work


def _facts(request: Request) -> Facts:
    model = None
    with contextlib.suppress(msgspec.DecodeError, AttributeError):
        model = msgspec.json.decode(request.body).get("model")
    return Facts(path=request.path, headers=request.headers, model=model)


def _canned(fault: Fault) -> tuple[int, bytes, list[tuple[str, str]]] | None:
    """The whole answer of a fault that has one."""
    if fault.kind == "html":
        return fault.status, HTML_PAGE, [("content-type", "text/html")]
    if fault.kind == "error_500":
        error = ApiError("", status=500, type="InternalServerError")
    elif fault.kind == "busy":
        error = busy()
    elif fault.kind == "rate_limit":
        error = ApiError("Rate limit exceeded", status=429, type="Too Many Requests")
    else:
        return None
    headers = [JSON_TYPE]
    if fault.kind == "rate_limit":
        seconds = 1.0 if fault.seconds is None else fault.seconds
        late = formatdate(time.time() + seconds, usegmt=True)
        headers.append(("retry-after", late if fault.retry_after == "date" else f"{seconds:g}"))
    return error.status, json.dumps(error.body(), separators=(",", ":")).encode(), headers


async def _answer_control(simulator: Simulator, request: Request, exchange: Exchange) -> None:
    try:
        await control.handle(simulator, request, exchange)
    except (ApiError, ValueError) as error:
        failure = error if isinstance(error, ApiError) else ApiError(str(error))
        await send_error(exchange, failure)


async def _answer_unrouted(routes: Any, request: Request, exchange: Exchange) -> str:
    """404, or 307 to the path without its last slash; the handler that metrics name."""
    shorter = request.path.rstrip("/")
    if request.path != shorter and route_of(routes, shorter) is not None:
        host = request.headers.get("host", "localhost")
        await exchange.respond(307, b"", [("location", f"http://{host}{shorter}")])
        return request.path
    await send_detail(exchange, HTTPStatus.NOT_FOUND, [])
    return "none"


def _count(service: Service, handler: str, request: Request, exchange: Exchange) -> None:
    seconds = time.monotonic() - request.received
    # A client that left before the head was sent counts as 2xx, as with the real server.
    status = exchange.status or 200
    sizes = len(request.body), exchange.body_bytes
    service.http.record(handler, request.method, status, seconds, *sizes)
