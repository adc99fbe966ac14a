"""Keeps one container's server alive, and tells who wants to know."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from vllm_unified.errors import ContainerEngineError, ServerStartError, VllmError
from vllm_unified.servers.adapters import load_again
from vllm_unified.servers.containers.engine import ContainerState
from vllm_unified.servers.containers.run import ContainerRun
from vllm_unified.servers.restarts import Pacing, Restarts
from vllm_unified.servers.watch import Watch

_POLL = 0.5
_HUNG_STOP_SECONDS = 2.0


class News(msgspec.Struct, frozen=True):
    """Something that happened to a server."""

    kind: Literal["said", "back", "over"]
    message: str


class Keeper:
    """Watches a container that is ready, and starts it again when it ends, or hangs.

    Docker's own restart policies do not bring back what ``docker kill`` or ``docker rm`` ended.
    """

    def __init__(
        self,
        run: ContainerRun,
        restarts: Restarts,
        tell: Callable[[News], object],
        start_timeout: float,
        pacing: Pacing,
    ) -> None:
        self.up = asyncio.Event()
        """Set while the server is ready, and for good when it is given up."""
        self.over: str | None = None
        """Why it was given up."""
        self.last_exit = ""
        self._run = run
        self._restarts = restarts
        self._tell = tell
        self._start_timeout = start_timeout
        self._pacing = pacing
        self._adapters: Mapping[str, str] = {}
        self._doubted = asyncio.Event()
        self._ready_at: float | None = None
        self._started_at: float | None = None
        """As the engine tells it, of the vLLM that is ready."""
        self._hang: asyncio.Task[str] | None = None
        self._mark_ready()
        self._task = asyncio.create_task(self._keep())
        self._task.add_done_callback(self._ended)

    async def check(self) -> None:
        """Look now: somebody could not connect. Returns when the server is ready, or given up."""
        if self._is_lost(await self._run.state()):
            self.up.clear()
            self._doubted.set()
        await self.up.wait()

    async def stop(self) -> None:
        """Watch no longer."""
        await self._watch_no_longer()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._watch_no_longer()
        self.up.set()

    async def _keep(self) -> None:
        while self.over is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL):
                    await self._doubted.wait()
            self._doubted.clear()
            # An engine that is gone for a while is no end: containers can outlive it.
            with contextlib.suppress(ContainerEngineError):
                state = await self._run.state()
                if self._is_lost(state):
                    await self._bring_back(await self._why(state))
                elif self._hang is not None and self._hang.done():
                    await self._end_hang(state, self._hang.result())
                elif not self.up.is_set():
                    self.up.set()

    def _is_lost(self, state: ContainerState | None) -> bool:
        """Whether the vLLM that was ready is gone; another may be starting in its place."""
        if state is None or not state.runs:
            return True
        if self._started_at is None:
            self._started_at = state.started_at
        return state.started_at != self._started_at

    async def _why(self, state: ContainerState | None) -> str:
        self.up.clear()
        if state is not None and state.runs:
            return "somebody else started the container again"
        return await self._run.why_it_ended(state)

    async def _end_hang(self, state: ContainerState | None, reason: str) -> None:
        if state is not None and state.status == "paused":  # as somebody wanted it
            self._hang = asyncio.create_task(self._watch().until_hung())
            return
        self.up.clear()
        await self._run.stop(_HUNG_STOP_SECONDS)
        await self._bring_back(reason)

    async def _bring_back(self, reason: str) -> None:
        await self._watch_no_longer()
        while not self.up.is_set():
            self.last_exit = reason
            pause = self._restarts.ended(self._ready_for())
            if pause is None:
                self._give_up(reason)
                return
            self._tell(News("said", f"{reason}; starting it again in {pause:.1f} s"))
            await asyncio.sleep(pause)
            try:
                await self._run.revive(self._start_timeout)
                problems = await load_again(self._run.contact, self._adapters)
            except VllmError as error:
                reason = error.message
                continue
            self._mark_ready()
            for problem in problems:
                self._tell(News("said", problem))
            self._tell(News("back", f"the server is back at port {self._run.port}"))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody must wait for a keeper that broke."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._give_up(f"it cannot be watched: {error}")

    def _mark_ready(self) -> None:
        self._ready_at = time.monotonic()
        self._started_at = None
        self._hang = asyncio.create_task(self._watch().until_hung())
        self.up.set()

    def _watch(self) -> Watch:
        run = self._run
        # The log is the container engine's own.
        log = Path(os.devnull)
        return Watch(run.contact, run.spec.server, log, self._pacing, self._note, time.monotonic)

    def _note(self, adapters: Mapping[str, str]) -> None:
        self._adapters = adapters

    async def _watch_no_longer(self) -> None:
        watch, self._hang = self._hang, None
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    def _ready_for(self) -> float:
        """Seconds; they are told once."""
        since, self._ready_at = self._ready_at, None
        return 0.0 if since is None else time.monotonic() - since

    def _give_up(self, reason: str) -> None:
        ends = self._restarts.in_a_row
        times = "once" if ends == 1 else f"{ends} times in a row"
        self.over = f"the container's server ended {times}; the last time: {reason}"
        self._tell(News("over", self.over))
        self.up.set()


def given_up(reason: str) -> ServerStartError:
    """The error for who needs a server that was given up."""
    return ServerStartError(reason, hint="start_container() tries again.")
