"""A vLLM in a container, for as long as this program uses it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from random import random
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from vllm_unified.errors import ConfigurationError, ServerError
from vllm_unified.servers.containers.checks import check_container
from vllm_unified.servers.containers.engine import ContainerEngine, ContainerState, in_thread
from vllm_unified.servers.containers.keeper import Keeper, News, given_up
from vllm_unified.servers.containers.model import with_known_model, with_model
from vllm_unified.servers.containers.run import ContainerRun
from vllm_unified.servers.containers.spec import (
    ContainerSpec,
    container_name,
    engine_host,
    reachable_host,
)
from vllm_unified.servers.containers.status import (
    ContainerCapabilities,
    ContainerHealth,
    ContainerStatus,
)
from vllm_unified.servers.engines import Progress
from vllm_unified.servers.restarts import Pacing, Restarts
from vllm_unified.servers.starter import free_port, server_url

if TYPE_CHECKING:
    from vllm_unified.blocking import VllmUnified
    from vllm_unified.client import AsyncVllmUnified

_STOP_SECONDS = 10.0


class ContainerServer:
    """A vLLM in a container of Docker or Podman. Nothing is started before it is asked for.

    ::

        spec = ContainerSpec(server=ServerSpec(model="Qwen/Qwen3-8B"))
        async with ContainerServer(spec) as server:
            async with server.client() as vllm:
                print((await vllm.generate("Hello")).text)

    A container that ends, whoever ended it, is started again, as often in a row as
    ``spec.server.max_restarts`` says. This program does that, so it lasts as long as the program.
    A container of the same spec that a killed program left is taken over. It belongs to the event
    loop of its first use.
    """

    def __init__(
        self,
        spec: ContainerSpec | None = None,
        *,
        keep: bool = False,
        pull: bool = False,
        progress: Progress | None = None,
        start_timeout: float = 600.0,
        pacing: Pacing | None = None,
    ) -> None:
        """Nothing is sent to the container engine yet.

        Args:
            spec: What to run; ``None``: the bundled model in vLLM's own image, on all GPUs.
            keep: Whether the container is meant to run on when this program ends.
            pull: Whether a missing image is downloaded.
            progress: Gets short messages for people, in the event loop's thread.
            start_timeout: Seconds from the container's start to its first token. Downloading an
                image has no limit; a model is downloaded within this time.
            pacing: The pauses before restarts, and how long silence is borne.
        """
        self.spec = spec or ContainerSpec()
        self._keep = keep
        self._pull = pull
        self._listeners = [progress] if progress else []
        self._start_timeout = start_timeout
        self._pacing = pacing or Pacing()
        self._port = self.spec.port or _free_port(self.spec)
        self._run: ContainerRun | None = None
        self._keeper: Keeper | None = None
        self._restarts = self._no_restarts()
        self._beginning: asyncio.Task[None] | None = None
        self._waiting = 0
        self._followers: set[asyncio.Queue[News]] = set()

    @classmethod
    async def start(cls, spec: ContainerSpec | None = None, **options: Any) -> Self:
        """Make one, and start it; arguments as in the constructor."""
        server = cls(spec, **options)
        await server.start_container()
        return server

    @property
    def url(self) -> str:
        """Such as ``http://127.0.0.1:40123``; it may change when the container starts, if the port
        was taken meanwhile."""
        port = self._run.port if self._run else self._port
        engine = engine_host(self.spec.docker_url or os.environ.get("DOCKER_HOST"))
        return server_url(reachable_host(self.spec.server.host, engine), port)

    @property
    def model(self) -> str:
        """The model's name in requests."""
        return self.spec.server.name

    @property
    def api_key(self) -> str | None:
        """The key that requests must carry."""
        return self.spec.server.api_key

    @property
    def adopted(self) -> bool:
        """Whether the container was there already, and was found."""
        return self._run is not None and self._run.adopted

    async def start_container(self, *, progress: Progress | None = None) -> None:
        """Start the container, or take over the one that has the same spec; wait until it
        generates. Who calls while it starts waits with the others.

        Args:
            progress: Gets messages for people until then.

        Raises:
            ConfigurationError: Docker's SDK is missing, or the address would reach nothing.
            EngineError: the bundled model is missing, and cannot be made here.
            ContainerEngineError: there is no container engine, or it may not be used.
            ImageNotFoundError: it does not have the image.
            ContainerConflictError: the port is taken, or the name.
            ServerStartError: vLLM did not become ready; in its own words.
            ContainerError: the container engine refuses otherwise.

        When it fails, or all who wait are cancelled, the container is removed.
        """
        if self._keeper is not None and self._keeper.over is not None:
            await self._drop(remove=self._owned)
        with self._telling(progress):
            await self._until_begun(abandon=True)
            await self._until_up()

    async def ready(self, *, doubted: bool = False) -> None:
        """Wait until the server is ready, and start it where it does not run. Cancelling this
        cancels no start.

        Args:
            doubted: Whether it could not be reached a moment ago.

        Raises:
            VllmError: as :meth:`start_container`; or it ended too often, and was given up.
        """
        await self._until_begun(abandon=False)
        if doubted and self._keeper is not None:
            await self._keeper.check()
        await self._until_up()

    async def stop_container(self, timeout: float = _STOP_SECONDS) -> None:
        """End the container, whoever started it, and remove it. It can be started again.

        Args:
            timeout: Seconds that vLLM has to end by itself.
        """
        await self._end(remove=True, seconds=timeout)

    async def restart_container(self, *, progress: Progress | None = None) -> None:
        """End vLLM, and start it again in the same container; return when it is ready. Requests
        that come meanwhile wait for it. Cancelling this does not end the restart.

        Raises:
            ServerError: it does not run.
            ServerStartError: it does not start any more.
        """
        if self._run is None or self._keeper is None:
            raise ServerError("the container does not run", hint="start_container() starts it.")
        if self._beginning is None or self._beginning.done():
            self._launch(self._begin_again(self._run, self._keeper))
        with self._telling(progress):
            await self._until_begun(abandon=False)

    async def get_container_status(self) -> ContainerStatus:
        """How container and server do; health is proven by a token, within half a minute.

        Raises:
            ContainerEngineError: the engine is gone.
        """
        run, keeper = self._run, self._keeper
        state = await run.state() if run else None
        health = await self._health(state)
        return ContainerStatus(
            state=state.status if state else "absent",
            health=health,
            id=state.id if state else None,
            name=container_name(run.spec if run else with_known_model(self.spec)),
            image=self.spec.image,
            url=self.url,
            model=self.model,
            restarts=self._restarts.total,
            exit_code=state.exit_code if state and not state.runs else None,
            last_exit=keeper.last_exit if keeper else "",
            started_at=state.started_at if state else None,
            adopted=self.adopted,
        )

    async def get_container_logs(self, lines: int = 100) -> str:
        """The last lines of what vLLM wrote: 10,000 and 1 MiB at most."""
        return await self._run.logs(lines) if self._run else ""

    async def validate_container_capabilities(self) -> ContainerCapabilities:
        """Whether the engine can run this: every problem in words, with what to do about it."""
        return await in_thread(partial(check_container, self.spec, pull=self._pull))

    async def follow(
        self,
        changed: Callable[[ContainerServer], object] | None = None,
        *,
        progress: Progress | None = None,
    ) -> str:
        """Wait until the server is over: stopped here, or given up; why it is.

        Args:
            changed: Called when the server is back after an end.
            progress: Gets messages for people: ends, and how far a restart is.
        """
        if self._keeper is not None and self._keeper.over is not None:
            return self._keeper.over
        queue: asyncio.Queue[News] = asyncio.Queue()
        self._followers.add(queue)
        try:
            while (news := await queue.get()).kind != "over":
                if progress:
                    progress(news.message)
                if changed and news.kind == "back":
                    changed(self)
            return news.message
        finally:
            self._followers.discard(queue)

    async def status(self) -> ContainerStatus:
        """:meth:`get_container_status`."""
        return await self.get_container_status()

    async def logs(self, lines: int = 100) -> str:
        """:meth:`get_container_logs`."""
        return await self.get_container_logs(lines)

    async def restart(self, *, progress: Progress | None = None) -> None:
        """:meth:`restart_container`."""
        await self.restart_container(progress=progress)

    async def end(self) -> None:
        """:meth:`stop_container`: for everybody, whoever started it."""
        await self.stop_container()

    async def stop(self) -> None:
        """Use it no longer. The container is removed if this program made it, or took it over from
        one that is gone; not with ``keep``."""
        await self._end(remove=self._owned, seconds=_STOP_SECONDS)

    def client(self, *, stop: bool = True, **settings: Any) -> AsyncVllmUnified:
        """A client whose first request starts the container, as does one that finds it gone.

        Args:
            stop: Whether :meth:`stop` is called when the client is closed.
            settings: As in the constructor of :class:`AsyncVllmUnified`; ``timeout`` is 600 s by
                default, because the first request waits for the start.
        """
        from vllm_unified.client import AsyncVllmUnified

        return AsyncVllmUnified(**self._client_settings(settings, stop=stop))

    def blocking_client(self, *, stop: bool = True, **settings: Any) -> VllmUnified:
        """:meth:`client`, without ``await``. This object belongs to the client's event loop then:
        none of its own methods can be awaited elsewhere."""
        from vllm_unified.blocking import VllmUnified

        return VllmUnified(**self._client_settings(settings, stop=stop))

    def _client_settings(self, settings: dict[str, Any], *, stop: bool) -> dict[str, Any]:
        from vllm_unified.servers.containers.transport import StartingTransport

        transport = StartingTransport(self, stop=stop)
        if "VLLM_TIMEOUT" not in os.environ:
            settings.setdefault("timeout", self._start_timeout)
        own = {"api_url": self.url, "model": self.model, "api_key": self.api_key or ""}
        return {"resources": {"transport": transport}, **own, **settings}

    async def _until_begun(self, *, abandon: bool) -> None:
        """Wait for the one start, which is begun if there is none.

        Args:
            abandon: Whether the start is cancelled with the last one who waits for it.
        """
        beginning = self._beginning or self._launch(self._begin())
        self._waiting += 1
        try:
            await asyncio.wait([beginning])
        except asyncio.CancelledError:
            if abandon and self._waiting == 1:
                await _cancelled(beginning)
            raise
        finally:
            self._waiting -= 1
        if beginning.cancelled():
            raise ServerError("the container was stopped while it started")
        beginning.result()

    def _launch(self, beginning: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._beginning = asyncio.create_task(beginning)
        self._beginning.add_done_callback(self._forget_failure)
        return self._beginning

    async def _begin(self) -> None:
        engine = await in_thread(partial(ContainerEngine.connect, self.spec.docker_url))
        try:
            spec = await self._with_model()
        except BaseException:
            engine.close()
            raise
        run = ContainerRun(engine, spec, self._port, keep=self._keep, say=self._say)
        await run.start(pull=self._pull, seconds=self._start_timeout)
        self._restarts = self._no_restarts()
        self._run, self._keeper = run, self._make_keeper(run)

    async def _begin_again(self, run: ContainerRun, keeper: Keeper) -> None:
        await keeper.stop()
        try:
            self._say("restarting vLLM in its container")
            await run.stop(_STOP_SECONDS)
            await run.revive(self._start_timeout)
        except Exception:
            await self._drop(remove=run.owned)
            raise
        self._keeper = self._make_keeper(run)
        self._tell(News("back", "vLLM was restarted"))

    async def _with_model(self) -> ContainerSpec:
        cancel = threading.Event()
        loop = asyncio.get_running_loop()

        def say(message: str) -> None:
            loop.call_soon_threadsafe(self._say, message)

        work = asyncio.ensure_future(in_thread(partial(with_model, self.spec, say, cancel)))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            cancel.set()
            await asyncio.wait([work])
            raise

    def _no_restarts(self) -> Restarts:
        return Restarts(self.spec.server.max_restarts, self._pacing, random)

    def _make_keeper(self, run: ContainerRun) -> Keeper:
        return Keeper(run, self._restarts, self._tell, self._start_timeout, self._pacing)

    async def _until_up(self) -> None:
        keeper = self._keeper
        if keeper is None:
            raise ServerError("the container was stopped meanwhile")
        await keeper.up.wait()
        if keeper.over is not None:
            raise given_up(keeper.over)

    async def _health(self, state: ContainerState | None) -> ContainerHealth:
        if self._run is None or state is None or not state.runs:
            return "starting" if self._beginning and not self._beginning.done() else "stopped"
        if await self._run.generates():
            return "ok"
        return "failing" if self._keeper and self._keeper.up.is_set() else "starting"

    @property
    def _owned(self) -> bool:
        return self._run is not None and self._run.owned and not self._keep

    async def _end(self, *, remove: bool, seconds: float) -> None:
        if self._beginning is not None:
            await _cancelled(self._beginning)
        if self._keeper is not None:
            await self._keeper.stop()
        try:
            if remove and self._run is not None:
                await self._run.stop(seconds)
        finally:
            await self._drop(remove=remove)

    async def _drop(self, *, remove: bool) -> None:
        """Be as at the beginning."""
        run, self._run, self._keeper, self._beginning = self._run, None, None, None
        if run is not None:
            self._port = run.port
            await run.leave(remove=remove)
            self._tell(News("over", "the container was stopped" if remove else "it runs on"))

    def _forget_failure(self, beginning: asyncio.Task[None]) -> None:
        """The next who needs the server tries again."""
        failed = beginning.cancelled() or beginning.exception() is not None
        if failed and self._beginning is beginning:
            self._beginning = None

    @contextlib.contextmanager
    def _telling(self, progress: Progress | None) -> Iterator[None]:
        if progress is None:
            yield
            return
        self._listeners.append(progress)
        try:
            yield
        finally:
            self._listeners.remove(progress)

    def _say(self, message: str) -> None:
        self._tell(News("said", message))

    def _tell(self, news: News) -> None:
        for listener in self._listeners:
            listener(news.message)
        for queue in self._followers:
            queue.put_nowait(news)

    async def __aenter__(self) -> Self:
        await self.start_container()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    def __del__(self) -> None:
        run = getattr(self, "_run", None)
        if run is not None:
            run.abandon()
            if not sys.is_finalizing():
                warning = f"{self!r} was never stopped"
                warnings.warn(warning, ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "running" if self._run else "not started"
        return f"<ContainerServer {self.model} in {self.spec.image}, port {self._port}, {state}>"


def _free_port(spec: ContainerSpec) -> int:
    """A port that is probably free; nobody knows what is on another machine."""
    elsewhere = engine_host(spec.docker_url or os.environ.get("DOCKER_HOST"))
    try:
        return free_port("127.0.0.1" if elsewhere else spec.server.host)
    except OSError as error:
        raise ConfigurationError(
            f"server.host: {spec.server.host} is no address of this machine: {error.strerror}"
        ) from error


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task, and wait for its end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
