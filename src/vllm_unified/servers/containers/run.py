"""One container, from being found or made until it is removed. Knows no waiting callers."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from functools import partial

from vllm_unified.errors import (
    ContainerConflictError,
    ContainerError,
    ServerStartError,
)
from vllm_unified.servers import logs
from vllm_unified.servers.cache import run_dir
from vllm_unified.servers.containers.engine import ContainerEngine, ContainerState, in_thread
from vllm_unified.servers.containers.model import model_folders
from vllm_unified.servers.containers.spec import (
    LABEL,
    ContainerSpec,
    container_fingerprint,
    container_name,
    container_order,
    reachable_host,
)
from vllm_unified.servers.locks import FileLock
from vllm_unified.servers.probe import Contact
from vllm_unified.servers.starter import free_port

_POLL = 0.25
_LOG_EVERY = 8
"""Polls between two looks into the log of a container that starts."""
_PORT_TRIES = 5
_TOKEN_SECONDS = 30.0
_LOG_LINES = 400
_STOP_SECONDS = 10.0
_FINGERPRINT, _PORT, _KEEP = f"{LABEL}.fingerprint", f"{LABEL}.port", f"{LABEL}.keep"

Say = Callable[[str], None]


class ContainerRun:
    """A container that serves a spec."""

    def __init__(
        self, engine: ContainerEngine, spec: ContainerSpec, port: int, *, keep: bool, say: Say
    ) -> None:
        """``spec`` is resolved; ``port`` is what is tried first, unless the spec has one."""
        self.spec = spec
        self.port = spec.port or port
        self.id: str | None = None
        self.adopted = False
        self.owned = False
        """Whether the container is ours to end: we made it, or who did is gone."""
        self._engine = engine
        self._keep = keep
        self._say = say
        self._fingerprint = container_fingerprint(spec)
        self._alive: FileLock | None = None
        self._last_said = ""

    def url_host(self) -> str:
        """Where a client finds the server.

        Raises:
            ConfigurationError: nowhere but on the engine's own machine.
        """
        return reachable_host(self.spec.server.host, self._engine.host)

    async def start(self, *, pull: bool, seconds: float) -> None:
        """Find or make the container, and wait until it generates.

        Raises:
            VllmError: as :meth:`ContainerServer.start_container`. When it fails or is cancelled,
                what is ours is removed.
        """
        self._claim()
        try:
            self.url_host()
            if not await self._find():
                await self._make(pull=pull)
            await self._become_ready(seconds)
        except BaseException:
            with contextlib.suppress(ContainerError):  # the failure says more
                await self.leave(remove=self.owned)
            raise

    async def revive(self, seconds: float) -> None:
        """Start it again after its end, or make it anew where it is gone; wait as above.

        Raises:
            VllmError: it does not start; the container is still there, and does not run.
        """
        state = await self.state()
        if state is None:
            await self._make(pull=False)
        else:
            await self._start_again(state)
        try:
            await self._become_ready(seconds)
        except ServerStartError:
            await self.stop(_STOP_SECONDS)
            raise

    async def state(self) -> ContainerState | None:
        """The container; ``None``: it is gone."""
        if self.id is None:
            return None
        return await in_thread(partial(self._engine.inspect, self.id))

    @property
    def contact(self) -> Contact:
        """The server in it."""
        server = self.spec.server
        return Contact(
            host=self.url_host(), port=self.port, model=server.name, api_key=server.api_key
        )

    async def generates(self) -> bool:
        """Whether it gives a token, in half a minute."""
        with contextlib.suppress(TimeoutError, PermissionError, ValueError):
            async with asyncio.timeout(_TOKEN_SECONDS):
                return await self.contact.generates()
        return False

    async def logs(self, lines: int) -> str:
        """The last lines of what it wrote."""
        if self.id is None:
            return ""
        return await in_thread(partial(self._engine.logs, self.id, lines))

    async def stop(self, seconds: float) -> None:
        """End its processes: SIGTERM, a deadline, SIGKILL."""
        if self.id is not None:
            await in_thread(partial(self._engine.stop, self.id, seconds))

    async def leave(self, *, remove: bool) -> None:
        """Give the connection back; remove the container, or let it run."""
        try:
            if remove and self.id is not None:
                await in_thread(partial(self._engine.remove, self.id))
                self.id = None
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give connection and lock back, and wait for nothing."""
        if self._alive is not None:
            self._alive.release()
        self._engine.close()

    async def why_it_ended(self, state: ContainerState | None) -> str:
        """The reason, in the words of vLLM if there are any."""
        if state is None:
            return "the container was removed"
        how = f"exit code {state.exit_code}"
        if state.out_of_memory:
            how = f"out of memory, {how}"
        said = f"the container ended ({how})"
        cause = logs.failure_cause(await self._own_log(state)) or state.error
        return f"{said}: {cause}" if cause else said

    def _claim(self) -> None:
        """Hold a lock that dies with this process: who gets it has no living predecessor."""
        if sys.platform == "win32":
            self.owned = self.id is not None and not self.adopted
            return
        if self._alive is None:
            self._alive = FileLock(run_dir() / f"container-{self._fingerprint}.alive")
        self.owned = self._alive.try_acquire()

    async def _find(self) -> bool:
        """Take over a container of the same spec; whether there is one."""
        find = partial(self._engine.find, _FINGERPRINT, self._fingerprint)
        state = await in_thread(find)
        if state is None:
            return False
        self.id, self.adopted = state.id, True
        self.port = int(state.labels.get(_PORT, self.port))
        if state.labels.get(_KEEP) == "true":
            self.owned = False
        if state.runs:
            self._say(f"the container {state.name} runs already")
            return True
        self._say(f"the container {state.name} is there, and is started again")
        await self._start_again(state)
        return True

    async def _start_again(self, state: ContainerState) -> None:
        """Start a container that ended, or make another where its port is taken now."""
        try:
            await in_thread(partial(self._engine.start, state.id))
        except ContainerConflictError:
            if self.spec.port:
                raise
            await in_thread(partial(self._engine.remove, state.id))
            self.id = None
            await self._make(pull=False)

    async def _make(self, *, pull: bool) -> None:
        """Make it and run it, on another port where that is taken and none was chosen.

        Whatever it fails with, what was made is removed.
        """
        if pull and not await in_thread(partial(self._engine.has_image, self.spec.image)):
            await self._pull()
        tries = 1 if self.spec.port else _PORT_TRIES
        while True:
            tries -= 1
            try:
                await self._create()
                return
            except ContainerConflictError:
                if await self._find():
                    return
                await self._check_name()
                if not tries:
                    raise
            self.port = free_port(self.spec.server.host)
            self._say("the port was taken meanwhile: trying another")

    async def _create(self) -> None:
        engine = self._engine
        folders = await in_thread(partial(model_folders, self.spec.server.model))
        order = container_order(self.spec, self.port, folders=folders, keep=self._keep)
        self._say(f"making a container of {self.spec.image}")
        id = await in_thread(partial(engine.create, order), discard=engine.remove)
        try:
            await in_thread(partial(engine.start, id))
        except BaseException:
            await in_thread(partial(engine.remove, id))
            raise
        self.id, self.adopted = id, False
        self._claim()

    async def _check_name(self) -> None:
        """After a conflict, when what was made is removed again."""
        name = container_name(self.spec)
        holder = await in_thread(partial(self._engine.inspect, name))
        if holder is not None:
            whose = (
                "one of ours, with another spec" if _FINGERPRINT in holder.labels else "not ours"
            )
            raise ContainerConflictError(
                f"the name {name} belongs to a container of {holder.image} ({whose})",
                hint=f"Choose another name, or remove that one: docker rm -f {name}",
            )

    async def _pull(self) -> None:
        loop = asyncio.get_running_loop()
        cancel = threading.Event()

        def say(message: str) -> None:
            loop.call_soon_threadsafe(self._say, message)

        self._say(f"pulling {self.spec.image}")
        try:
            pull = partial(self._engine.pull, self.spec.image, say, cancel)
            await in_thread(pull, patient=False)
        finally:
            cancel.set()

    async def _become_ready(self, seconds: float) -> None:
        began = asyncio.get_running_loop().time()
        polls = 0
        try:
            async with asyncio.timeout(seconds):
                while not await self._is_ready():
                    state = await self.state()
                    if state is None or not state.runs:
                        raise await self._failed(await self.why_it_ended(state))
                    if polls % _LOG_EVERY == 0:
                        self._tell_progress(await self._own_log(state))
                    polls += 1
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            raise await self._failed(
                f"not ready within {seconds:g} s", hint="Give it more time with start_timeout."
            ) from None
        took = asyncio.get_running_loop().time() - began
        self._say(f"ready after {took:.0f} s")

    async def _is_ready(self) -> bool:
        try:
            async with asyncio.timeout(_TOKEN_SECONDS):
                return await self.contact.generates()
        except TimeoutError:
            return False
        except (PermissionError, ValueError) as error:
            raise await self._failed(str(error)) from error

    async def _own_log(self, state: ContainerState) -> str:
        """What it wrote since it was started the last time."""
        return await in_thread(
            partial(self._engine.logs, state.id, _LOG_LINES, since=state.started_at)
        )

    def _tell_progress(self, log: str) -> None:
        said = [logs.progress_of(line) for line in log.splitlines()]
        known = [message for message in said if message]
        if known and known[-1] != self._last_said:
            self._last_said = known[-1]
            self._say(known[-1])

    async def _failed(self, message: str, hint: str | None = None) -> ServerStartError:
        said = await self.logs(logs.TAIL_LINES)
        return ServerStartError(
            f"vLLM did not start in its container: {message}",
            log=said,
            hint=hint or _hint(message) or logs.failure_hint(said),
        )


def _hint(message: str) -> str | None:
    if "/dev/shm" in message:
        return "Raise shm_size, or give ipc_host=True."
    return logs.failure_hint(message)
