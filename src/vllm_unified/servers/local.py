"""A vLLM on this machine, for as long as somebody uses it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from vllm_unified.errors import EngineError, NoSuchServerError, ServerError, ServerStartError
from vllm_unified.servers import commands, logs
from vllm_unified.servers.bundled import ensure_bundled_model
from vllm_unified.servers.commands import Conversation, Description, ServerStatus
from vllm_unified.servers.engines import Engine, Progress, find_engine
from vllm_unified.servers.finding import find_server
from vllm_unified.servers.installer import install_engine
from vllm_unified.servers.launcher import Joined, join_or_launch
from vllm_unified.servers.lease import Lease, ServerEvent
from vllm_unified.servers.records import socket_path
from vllm_unified.servers.spec import BUNDLED, ServerSpec, resolved
from vllm_unified.servers.threads import in_thread

_STOP_SECONDS = 20.0
# The supervisor has the same deadline, and says more when it passes.
_SUPERVISOR_LEAD = 10.0
_JOIN_TRIES = 5

T = TypeVar("T")


class LocalServer:
    """A running vLLM, held by a lease: it runs while this process, or another user of it, lives.

    Made with ``await LocalServer.start(...)`` or ``await LocalServer.attach(...)``, as a context
    manager or with ``stop()`` at the end. A vLLM that dies or hangs is started again by the
    server's supervisor, as often as ``spec.max_restarts`` says; ``follow()`` tells of it.
    """

    spec: ServerSpec
    """Resolved: the model is a folder or a repository's id. It has the key."""
    fingerprint: str
    """16 hex digits that name the server among those of this machine."""
    url: str
    """Such as ``http://127.0.0.1:40123``."""
    model: str
    """The model's name in requests."""
    pid: int
    """vLLM's process id (its HTTP server)."""
    engine: Engine
    log_path: Path
    api_key: str | None
    shared: bool
    """Whether the server ran already, and was joined."""

    def __init__(self, lease: Lease, described: Description, *, shared: bool) -> None:
        self._lease = lease
        self._suspension: Conversation | None = None
        self._following = False
        self._stopped = False
        self.shared = shared
        self._become(described)

    def _become(self, described: Description) -> None:
        self.spec = described.spec
        self.fingerprint = described.fingerprint
        self.url = described.url
        self.model = described.model
        self.pid = described.pid
        self.engine = described.engine
        self.log_path = Path(described.log_path)
        self.api_key = described.spec.api_key

    @classmethod
    async def start(
        cls,
        spec: ServerSpec | None = None,
        *,
        progress: Progress | None = None,
        install: bool = True,
        start_timeout: float = 600.0,
        detached: bool = False,
    ) -> Self:
        """Start the server that ``spec`` describes, or join it where it runs already.

        Args:
            spec: What to run; ``None``: the bundled model.
            progress: Called with short messages for people, in the event loop's thread.
            install: Whether an engine is installed where none is found.
            start_timeout: Seconds that vLLM may take to be ready. Installing the engine and
                preparing the bundled model have no limit.
            detached: Whether the server is kept without any lease, once it is ready, until it is
                stopped.

        Raises:
            EngineError: there is no engine, or it cannot be installed; not on Linux.
            ServerStartError: vLLM did not become ready; in the engine's own words.

        When it is cancelled, or fails, nothing is left running.
        """
        _require_linux()
        wanted = spec or ServerSpec()
        say = progress or (lambda message: None)
        loop = asyncio.get_running_loop()

        def say_from_thread(message: str) -> None:
            loop.call_soon_threadsafe(say, message)

        def prepare(cancel: threading.Event) -> tuple[Engine, ServerSpec]:
            return _prepare(wanted, install, say_from_thread, cancel)

        engine, final = await in_thread(prepare)
        for _ in range(_JOIN_TRIES):
            joined = await _join(final, engine, start_timeout)
            ready = await _ready(joined, say, final, start_timeout)
            if ready:
                server = cls(
                    joined.lease, _described(joined, ready, final, engine), shared=joined.shared
                )
                if detached:
                    await server._detach()
                return server
        raise ServerStartError("a server like this one ends whenever it is joined: try again")

    @classmethod
    async def attach(cls, where: str | None = None) -> Self:
        """Hold a server that runs on this machine, whoever started it.

        Args:
            where: Its address, its fingerprint or at least 4 digits of it, its model's name, or
                its process id; ``None``: the only one.

        Raises:
            NoSuchServerError: none is meant, or more than one; the hint lists what runs.
            ServerError: it ends just now, or its supervisor is silent.

        It need not be ready: ``status()`` tells.
        """
        _require_linux()
        found = find_server(where)
        lease = Lease.connect(socket_path(found.fingerprint))
        if lease is None:
            raise NoSuchServerError(f"the server at {found.url} ends just now")
        try:
            described = await commands.describe(found.fingerprint)
        except BaseException:
            lease.close()
            raise
        return cls(lease, described, shared=True)

    async def follow(
        self,
        changed: Callable[[LocalServer], object] | None = None,
        *,
        progress: Progress | None = None,
    ) -> str:
        """Keep this object true until the server is over; why it is.

        Args:
            changed: Called when the server has another address or process: after a restart, or
                when all who use it were handed over to a successor. The attributes are the new
                ones then. The successor is held already, and the old server still is.
            progress: Gets messages for people: restarts, and how far they are.

        One task at a time may follow.
        """
        say = progress or (lambda message: None)
        known = (self.url, self.pid)
        self._following = True
        try:
            while True:
                lease = self._lease
                event = await lease.next_event()
                if event is None or event.state in {"failed", "exited"}:
                    return event.message if event else "the server's supervisor ended"
                if event.message:
                    say(event.message)
                if event.state == "moved" and not await self._move_to(event):
                    return f"it moved to {event.url}, which is gone"
                try:
                    if event.state in {"ready", "moved"} and (event.url, event.pid) != known:
                        known = self.url, self.pid = event.url, event.pid
                        if changed:
                            changed(self)
                finally:
                    if lease is not self._lease:
                        lease.close()
        finally:
            self._following = False

    async def _move_to(self, event: ServerEvent) -> bool:
        """Hold the successor in place of the server that said this; whether it is there."""
        lease = Lease.connect(socket_path(event.fingerprint))
        if lease is None:
            return False
        try:
            described = await commands.describe(event.fingerprint)
        except ServerError:
            lease.close()
            return False
        except BaseException:
            lease.close()
            raise
        if self._stopped:
            lease.close()
            return False
        self._lease = lease
        self._become(described)
        return True

    async def status(self) -> ServerStatus:
        """How the server does now.

        Raises:
            ServerError: it is gone, or its supervisor is silent.
        """
        return await commands.report(self.fingerprint)

    def logs(self, lines: int = 100) -> str:
        """The last lines of what vLLM wrote, 10,000 at most."""
        return logs.tail(self.log_path, lines)

    async def restart(self, *, progress: Progress | None = None) -> None:
        """End vLLM and start it again, with the same spec; return when it is ready.

        Requests that it works on are lost. LoRA adapters that were loaded are loaded again.

        Raises:
            ServerStartError: it does not start any more.
            ServerError: it is gone, or suspended, or was ended meanwhile.
        """
        self._update(await commands.ask(self.fingerprint, commands.Restart(), progress=progress))

    async def suspend(self, *, drain_timeout: float = 60.0) -> None:
        """End vLLM, and keep all who hold the server waiting until ``resume()``.

        If this process ends before that, or ``stop()`` comes first, the server is resumed.

        Args:
            drain_timeout: Seconds that requests have to end by themselves.

        Raises:
            ServerError: the server is gone, or suspended already.
        """
        conversation = Conversation(self.fingerprint)
        try:
            await conversation.ask(commands.Suspend(drain_timeout=drain_timeout))
        except BaseException:
            conversation.close()
            raise
        self._suspension = conversation

    async def resume(self, *, progress: Progress | None = None) -> None:
        """Start vLLM again after ``suspend()``; return when it is ready.

        Raises:
            ServerStartError: it does not start any more.
            ServerError: the server is gone.
        """
        self._update(await commands.ask(self.fingerprint, commands.Resume(), progress=progress))
        self._end_suspension()

    async def hand_over(self, successor: LocalServer, *, drain_timeout: float = 60.0) -> None:
        """Send all who hold this server to ``successor``, and end it when it has nothing to do.

        Holders that follow it take a lease of the successor; the others are left with a server
        that ends. If this server is detached, the successor is from now on. Returns when this
        server is gone. There is no way back: cancelled, it is handed over nevertheless.

        Args:
            successor: A server that is ready, and held.
            drain_timeout: Seconds that requests have to end by themselves. A suspended server
                has none, and ends at once.

        Raises:
            ServerError: one of the two is gone, or the successor is not ready. Nothing changed.
        """
        command = commands.HandOver(successor=successor.fingerprint, drain_timeout=drain_timeout)

        def told(message: str) -> None:
            # A lease that nobody follows would be waited for in vain.
            if not self._following:
                self._lease.close()

        await commands.ask(self.fingerprint, command, progress=told, until_gone=True)
        self._end_suspension()

    async def note_adapters(self) -> dict[str, str]:
        """Have the supervisor look now which LoRA adapters are loaded: name to path.

        It looks by itself every 10 seconds; what it knows of is loaded again after a restart.

        Raises:
            ServerError: the server is gone.
        """
        reply = await commands.ask(self.fingerprint, commands.NoteAdapters())
        return reply.status.adapters if reply.status else {}

    async def end(self) -> None:
        """End the server for all who hold it; return when it is gone.

        Raises:
            ServerError: its supervisor is gone already.
        """
        by = commands.End(by=f"process {os.getpid()}")
        await commands.ask(self.fingerprint, by, until_gone=True)
        await self.stop()

    async def stop(self) -> None:
        """Give up the lease. If it was the last one, this returns when the server is gone."""
        self._stopped = True
        self._end_suspension()
        await self._lease.release(_STOP_SECONDS)

    async def _detach(self) -> None:
        try:
            await commands.ask(self.fingerprint, commands.Detach())
        except BaseException:
            self._lease.close()
            raise

    def _update(self, reply: commands.Reply) -> None:
        if reply.server:
            self.url, self.pid = reply.server.url, reply.server.pid

    def _end_suspension(self) -> None:
        if self._suspension:
            self._suspension.close()
            self._suspension = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    def __del__(self) -> None:
        lease = getattr(self, "_lease", None)
        if lease is not None and not lease.closed:
            warning = f"{self!r} was never stopped"
            self._end_suspension()
            lease.close()
            warnings.warn(warning, ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "stopped" if self._lease.closed else f"pid={self.pid}"
        return f"<LocalServer {self.model} at {self.url} {state}>"


def _require_linux() -> None:
    if not sys.platform.startswith("linux"):
        raise EngineError(
            f"local servers run on Linux only, and this is {sys.platform}",
            hint="Start vLLM elsewhere (in a container or on another machine) and give its URL.",
        )


def _prepare(
    spec: ServerSpec, install: bool, say: Callable[[str], None], cancel: threading.Event
) -> tuple[Engine, ServerSpec]:
    """The engine and the model, made where they are missing. Blocks, for minutes at worst."""
    engine = find_engine()
    if engine is None:
        if not install:
            raise EngineError(
                "there is no vLLM on this machine",
                hint="Allow its installation with install=True, or call install_engine().",
            )
        engine = install_engine(progress=say, cancel=cancel)
    bundled = None
    if spec.model == BUNDLED:
        bundled = ensure_bundled_model(engine, say, cancel=cancel)
    return engine, resolved(spec, bundled)


async def _join(spec: ServerSpec, engine: Engine, start_timeout: float) -> Joined:
    def join(cancel: threading.Event) -> Joined:
        return join_or_launch(spec, engine, start_timeout=start_timeout, cancel=cancel)

    return await in_thread(join, discard=lambda late: late.lease.close())


async def _ready(
    joined: Joined, say: Progress, spec: ServerSpec, start_timeout: float
) -> ServerEvent | None:
    """The event that says so; ``None`` where a server was joined just when it ended.

    The lease is given back unless the server is ready.
    """
    event = None
    try:
        async with asyncio.timeout(start_timeout + _SUPERVISOR_LEAD):
            event = await _verdict(joined.lease, say)
    except TimeoutError as error:
        raise ServerStartError(f"vLLM was not ready within {start_timeout:g} s") from error
    finally:
        if event is None or event.state != "ready":
            joined.lease.close()
    if event is not None and event.state == "ready":
        return event
    if joined.shared and (event is None or event.state in {"exited", "moved"}):
        return None
    if event is None:
        hint = f"Its log: {joined.log_path}"
        raise ServerStartError("the supervisor ended before vLLM was ready", hint=hint)
    message = f"vLLM did not start: {event.message}"
    raise ServerStartError(message, log=event.log, hint=_hint(event, spec))


async def _verdict(lease: Lease, say: Progress) -> ServerEvent | None:
    while event := await lease.next_event():
        if event.state == "ready" or event.final:
            return event
        say(event.message)
    return None


def _described(joined: Joined, ready: ServerEvent, spec: ServerSpec, engine: Engine) -> Description:
    return Description(
        fingerprint=joined.fingerprint,
        spec=spec,
        engine=engine,
        state="ready",
        url=ready.url,
        pid=ready.pid,
        model=ready.model,
        log_path=ready.log_path,
    )


def _hint(event: ServerEvent, spec: ServerSpec) -> str:
    hints = [event.hint] if event.hint else []
    if spec.model.startswith(("/", ".", "~")) and not Path(spec.model).expanduser().exists():
        hints.append(f"There is no folder {spec.model}.")
    return "\n".join([*hints, f"The whole log: {event.log_path}"])
