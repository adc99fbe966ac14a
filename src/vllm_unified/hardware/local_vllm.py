"""A vLLM of this machine's own, started when it is first needed, and stopped when it is not."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from vllm_unified.client import AsyncVllmUnified
from vllm_unified.errors import ClientClosedError, ConfigurationError, ServerError, VllmError
from vllm_unified.fleet.stream import GenerationStream
from vllm_unified.hardware.backend import Capabilities
from vllm_unified.hardware.clients import ClientBackend
from vllm_unified.hardware.detect import Hardware, detect
from vllm_unified.hardware.planning import plan
from vllm_unified.hardware.request import InferenceRequest
from vllm_unified.results import StreamChunk

if TYPE_CHECKING:
    from vllm_unified.servers import LocalServer, ServerSpec

_BUNDLED = "bundled"
# After a start that failed; each further one doubles it.
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 600.0


class LocalVllm:
    """A backend that runs a vLLM on this machine (Linux).

    ::

        async with LocalVllm("bundled", idle_timeout=300) as local:
            hal.register_backend("llm", local)

    The first request starts the server, with an engine for the GPU or the CPU, in the size that
    :func:`plan` finds; it waits for that, as do those that come meanwhile. A server that has had
    nothing to do for ``idle_timeout`` seconds is stopped; the next request starts it again. One
    that dies is started again by its supervisor, and if that gives up, by the next request. It is
    shared with other programs that want the same one. Belongs to one event loop.
    """

    name = "local-vllm"

    def __init__(
        self,
        model: str = _BUNDLED,
        *,
        spec: ServerSpec | None = None,
        hardware: Hardware | None = None,
        idle_timeout: float | None = 600.0,
        timeout: float | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            model: A folder, a repository's id, or ``"bundled"``.
            spec: All that can be said of the server, in place of ``model``; then nothing is
                planned.
            hardware: The machine to plan for; ``None``: look at it when the first request comes.
            idle_timeout: Seconds without a request after which it is stopped; ``None``: never.
            timeout: Seconds for a whole request; 600 by default.
            progress: Gets short messages for people while the server starts.
        """
        if idle_timeout is not None and not idle_timeout > 0:
            raise ConfigurationError(f"idle_timeout must be greater than 0, not {idle_timeout!r}")
        self._model = model if spec is None else spec.model
        self._given = spec
        self._hardware = hardware
        self._idle_timeout = idle_timeout
        self._timeout = timeout
        self._progress = progress or (lambda message: None)
        self._spec: ServerSpec | None = None
        self._client: AsyncVllmUnified | None = None
        self._starting: asyncio.Task[AsyncVllmUnified] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._in_use = 0
        self._closed = False
        self._pause = _FIRST_PAUSE
        self._well_at = 0.0
        self.starts = 0
        """How often a server was started, or joined."""

    @property
    def server(self) -> LocalServer | None:
        """The server, while there is one."""
        return None if self._client is None else self._client.server

    @property
    def appetite(self) -> int:
        """How many requests at once keep it busy."""
        return 32 if self._client is None else ClientBackend(self._client, None).appetite

    async def spec(self) -> ServerSpec:
        """What it runs, or would run.

        Raises:
            ConfigurationError: the model does not fit on this machine, or is not known.
        """
        if self._given is not None:
            return self._given
        if self._spec is None:
            self._spec = await asyncio.to_thread(self._planned)
        return self._spec

    def _planned(self) -> ServerSpec:
        from vllm_unified.servers import ServerSpec

        try:
            found = plan(self._model, _machine(self._hardware))
        except ConfigurationError:
            # A repository that is not here yet: vLLM itself will fetch it, and say what is wrong.
            return ServerSpec(model=self._model)
        if not found.fits:
            raise ConfigurationError(f"{self._model}: {found.reason}", hint=str(found))
        return found.spec()

    async def infer(self, request: InferenceRequest) -> Any:
        """The answer; the server is started first, if it does not run."""
        use = _Use(self)
        backend = await use.begin()
        try:
            result = await backend.infer(request)
        except BaseException as error:
            await use.end(error)
            raise
        await use.end()
        return result

    def stream(self, request: InferenceRequest) -> _LocalStream:
        """The answer piece by piece."""
        return _LocalStream(_Use(self), request)

    async def health(self) -> bool:
        """Whether it generates. One that does not run is well, as the next request starts it; but
        for a while not after a start that failed."""
        if self._client is None:
            return not self._closed and time.monotonic() >= self._well_at
        well = await ClientBackend(self._client, None).health()
        if not well:
            await self._forget_if_gone(self._client)
            return self._client is None
        return True

    async def capabilities(self) -> Capabilities:
        """What the server serves, or would serve; it is not started for that."""
        if self._client is not None:
            return await ClientBackend(self._client, None).capabilities()
        if not sys.platform.startswith("linux"):
            return Capabilities(unavailable="vLLM runs on Linux only")
        try:
            spec = await self.spec()
        except ConfigurationError as error:
            return Capabilities(unavailable=error.message)
        device = await asyncio.to_thread(_device, self._hardware)
        names = dict.fromkeys((spec.name, *spec.aliases), spec.max_model_len)
        return Capabilities(models=names, device=device)

    async def _running(self) -> AsyncVllmUnified:
        """The client of a server that runs; one start for all who wait."""
        if self._closed:
            raise ClientClosedError("this local vLLM is closed")
        if self._stopping is not None:
            await asyncio.wait({self._stopping})
        if self._client is not None:
            return self._client
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(_note)
        starting = self._starting
        try:
            # One who leaves does not end the start for the others.
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            if starting.cancelled():  # by close(): nobody else cancels it
                raise ClientClosedError("this local vLLM was closed while it started") from None
            raise

    async def _start(self) -> AsyncVllmUnified:
        try:
            client = await AsyncVllmUnified.local(
                spec=await self.spec(), timeout=self._timeout, progress=self._progress
            )
        except VllmError:
            self._well_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            raise
        self._pause = _FIRST_PAUSE
        if self._closed:
            await client.close()
            raise ClientClosedError("this local vLLM was closed while it started")
        self.starts += 1
        self._client = client
        self._touched()
        return client

    def _begin(self) -> None:
        self._in_use += 1
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _end(self) -> None:
        self._in_use -= 1
        self._touched()

    def _touched(self) -> None:
        if self._in_use == 0 and self._client is not None and self._idle_timeout is not None:
            if self._alarm is not None:
                self._alarm.cancel()
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(self._idle_timeout, self._idle)

    def _idle(self) -> None:
        self._alarm = None
        client = self._client
        if self._in_use == 0 and client is not None:
            self._client = None
            self._stopping = asyncio.create_task(client.close())

    async def _forget_if_gone(self, client: AsyncVllmUnified) -> None:
        """Have the next request start another server, if the supervisor of this one is gone."""
        server = client.server
        if server is None or client is not self._client:
            return
        try:
            await server.status()
        except ServerError:
            if self._client is client:
                self._client = None
            await client.close()

    async def stop(self) -> None:
        """Stop the server now; the next request starts it again. It goes on for other programs."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        if self._stopping is not None:
            await asyncio.wait({self._stopping})

    async def close(self) -> None:
        """Stop the server, and start it no more. May be called twice."""
        self._closed = True
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait({self._starting})
        await self.stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        where = "not running" if self.server is None else f"at {self.server.url}"
        return f"<LocalVllm of {self._model}, {where}>"


class _Use:
    """One request: while it lasts, the server is not stopped."""

    def __init__(self, owner: LocalVllm) -> None:
        self._owner = owner
        self._client: AsyncVllmUnified | None = None
        self._held = False

    async def begin(self) -> ClientBackend:
        """Have a server."""
        self._owner._begin()
        self._held = True
        try:
            self._client = await self._owner._running()
        except BaseException:
            await self.end()
            raise
        return ClientBackend(self._client, None)

    async def end(self, error: BaseException | None = None) -> None:
        """Need it no more. May be called twice."""
        held, self._held = self._held, False
        if not held:
            return
        try:
            if isinstance(error, VllmError) and error.is_transient_error and self._client:
                await self._owner._forget_if_gone(self._client)
        finally:
            self._owner._end()


class _LocalStream:
    """A stream of the server, which runs for as long as it lasts."""

    def __init__(self, use: _Use, request: InferenceRequest) -> None:
        self._use = use
        self._request = request
        self._stream: GenerationStream[Any] | None = None

    @property
    def result(self) -> Any:
        return None if self._stream is None else self._stream.result

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamChunk:
        try:
            if self._stream is None:
                self._stream = (await self._use.begin()).stream(self._request)
            return await anext(self._stream)
        except BaseException as error:
            await self._use.end(error)
            raise

    async def close(self) -> None:
        try:
            if self._stream is not None:
                await self._stream.close()
        finally:
            await self._use.end()


def _note(start: asyncio.Task[AsyncVllmUnified]) -> None:
    """Whoever waits for it gets its error; perhaps nobody does any more."""
    if not start.cancelled():
        start.exception()


def _machine(given: Hardware | None) -> Hardware:
    """What the engine that will run can use of the machine."""
    if given is not None:
        return given
    from vllm_unified.servers import find_engine

    found = detect()
    engine = find_engine()
    gpus = () if engine is not None and engine.kind == "cpu" else found.nvidia_gpus
    return msgspec.structs.replace(found, gpus=gpus)


def _device(given: Hardware | None) -> str:
    return next((gpu.platform for gpu in _machine(given).gpus), "cpu")
