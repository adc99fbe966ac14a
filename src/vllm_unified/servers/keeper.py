"""Keeps one vLLM running: starts it, watches it, starts it again, and does as it is told."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from vllm_unified.servers import logs
from vllm_unified.servers.adapters import load_again
from vllm_unified.servers.lease import ServerEvent
from vllm_unified.servers.process import VllmProcess
from vllm_unified.servers.restarts import Restarts
from vllm_unified.servers.starter import Starter, StartFailedError, SupervisorConfig, cancel
from vllm_unified.servers.watch import Watch, drained

Order = Literal["run", "suspend", "end"]


class Ended(NamedTuple):
    """How a vLLM ended that nobody had ended."""

    reason: str
    """After "vLLM", or "it"."""
    code: int | None = None
    hint: str | None = None


class Keeper:
    """One vLLM, over all its lives. Its orders are a state, not a queue: the last one counts."""

    def __init__(
        self,
        config: SupervisorConfig,
        tell: Callable[[ServerEvent], object],
        note: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            config: What to run.
            tell: Gets every new state.
            note: Called when something has changed that is no state.
            clock: Seconds.
        """
        self._config = config
        self._pacing = config.pacing
        self._tell = tell
        self._note = note
        self._clock = clock
        self._log = Path(config.log_path)
        self._starter = Starter(config, self._say, self._spawned)
        self._restarts = Restarts(config.spec.max_restarts, config.pacing, random.random)
        self._process: VllmProcess | None = None
        self._watch: Watch | None = None
        self._order: Order = "run"
        self._drain = 0.0
        self._ended_by = ""
        self._told = asyncio.Event()
        self._changed = asyncio.Event()
        self._ready_at: float | None = None
        self._ready_for = 0.0
        self._was_ready = False
        self.lives = 0
        """How often vLLM became ready."""
        self.last = ServerEvent(state="starting", message="starting vLLM")
        """The present state."""
        self.over: ServerEvent | None = None
        """How it all ended, when it has."""
        self.url = ""
        self.pid = 0
        self.last_exit = ""
        """Why vLLM ended the last time by itself."""
        self.adapters: dict[str, str] = {}
        """LoRA adapters that a restart loads again: name to path."""

    @property
    def ordered(self) -> Order:
        """What vLLM is to do."""
        return self._order

    @property
    def restarts(self) -> int:
        """How often vLLM was started again after it had ended by itself, or hung."""
        return self._restarts.total

    @property
    def uptime(self) -> float:
        """Seconds since vLLM became ready; 0 where it is not."""
        return 0.0 if self._ready_at is None else self._clock() - self._ready_at

    @property
    def health(self) -> str:
        """As in ``ServerStatus``."""
        if self.last.state == "ready":
            return self._watch.health if self._watch else "ok"
        return {"starting": "starting", "suspended": "suspended"}.get(self.last.state, "down")

    async def run(self) -> ServerEvent:
        """Until it is ended, or given up; how."""
        try:
            self.over = await self._obey()
        finally:
            self._wake()
        return self.over

    async def _obey(self) -> ServerEvent:
        while True:
            self._told.clear()
            if self._order == "end":
                return ServerEvent(state="exited", message=self._ended_by)
            if self._order == "suspend":
                self._enter(ServerEvent(state="suspended", message="suspended"))
                await self._told.wait()
                continue
            try:
                ended = await self._live()
            except StartFailedError as failure:
                return failure.event
            if ended is None:
                continue
            self.last_exit = ended.reason
            pause = self._restarts.ended(self._ready_for)
            if pause is None:
                return self._given_up(ended)
            said = f"vLLM {ended.reason}; it is started again in {pause:.1f} s"
            self._enter(ServerEvent(state="restarting", message=said))
            await self._told_within(pause)

    def order(self, order: Order, *, drain: float = 0.0, by: str = "") -> None:
        """Say what vLLM is to do from now on; ``run`` while it runs starts it anew.

        Args:
            order: What.
            drain: Seconds that requests have to end by themselves before vLLM is ended.
            by: For the end: the last message.
        """
        self._order, self._drain, self._ended_by = order, drain, by
        self._told.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a state in which the condition holds, or the end of all."""
        while self.over is None and not condition():
            await self._changed.wait()

    async def note_adapters(self) -> None:
        """Look now which adapters are loaded."""
        if self._watch:
            await self._watch.note_adapters()

    async def stop(self) -> None:
        """End vLLM and all its processes."""
        if self._process is not None:
            await self._process.stop(self._config.stop_grace)

    async def _live(self) -> Ended | None:
        """One life of vLLM; ``None`` where an order ended it."""
        self._ready_at, self._ready_for = None, 0.0
        life = asyncio.create_task(self._start_and_watch())
        told = asyncio.create_task(self._told.wait())
        try:
            await asyncio.wait([life, told], return_when=asyncio.FIRST_COMPLETED)
            if life.done():
                return life.result()
            await cancel(life)
            if self._drain and self.last.state == "ready":
                await self._let_drain()
            if self._order == "run":
                self._enter(ServerEvent(state="restarting", message="vLLM is restarted"))
            return None
        finally:
            await cancel(life, told)
            await self.stop()
            self._ready_for, self._ready_at = self.uptime, None
            self._watch = None

    async def _let_drain(self) -> None:
        """Wait until no request is left, time is up, vLLM has ended, or there is a new order."""
        assert self._process is not None
        self._told.clear()
        contact, pacing = self._starter.contact, self._pacing
        waiting = [
            asyncio.create_task(drained(contact, self._drain, pacing.settled)),
            asyncio.create_task(self._process.wait()),
            asyncio.create_task(self._told.wait()),
        ]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(*waiting)

    async def _start_and_watch(self) -> Ended:
        try:
            process = await self._starter.start()
        except StartFailedError as failure:
            if not self._was_ready:
                raise
            return Ended(f"did not start: {failure.event.message}", hint=failure.event.hint)
        problems = await load_again(self._starter.contact, self.adapters)
        self._note_problems(problems)
        self._be_ready("\n".join(problems))
        watch = self._watch = Watch(
            self._starter.contact,
            self._config.spec,
            self._log,
            self._pacing,
            self._note_adapters,
            self._clock,
        )
        hung = asyncio.create_task(watch.until_hung())
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait([hung, ended], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return Ended(self._starter.why_it_ended(ended.result()), ended.result())
            return Ended(hung.result())
        finally:
            await cancel(hung, ended)

    def _be_ready(self, message: str) -> None:
        self._ready_at = self._clock()
        self._was_ready = True
        self.lives += 1
        self._enter(
            ServerEvent(
                state="ready",
                message=message,
                url=self.url,
                pid=self.pid,
                model=self._config.spec.name,
                log_path=str(self._log),
            )
        )

    def _given_up(self, ended: Ended) -> ServerEvent:
        times = self._restarts.in_a_row
        last = f"vLLM {ended.reason}"
        if times > 1:
            last = f"vLLM ended {times} times in a row; the last time it {ended.reason}"
        return ServerEvent(
            state="exited",
            message=last,
            code=ended.code,
            hint=ended.hint,
            log=logs.tail(self._log),
            log_path=str(self._log),
        )

    def _spawned(self, process: VllmProcess, url: str) -> None:
        self._process, self.pid, self.url = process, process.pid, url
        self._say("starting vLLM")

    def _say(self, message: str) -> None:
        self._enter(ServerEvent(state="starting", message=message))

    def _enter(self, event: ServerEvent) -> None:
        self.last = event
        self._tell(event)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _note_adapters(self, found: Mapping[str, str]) -> None:
        if self.adapters != found:
            self.adapters = dict(found)
            self._note()

    def _note_problems(self, problems: list[str]) -> None:
        if problems:
            with self._log.open("a") as file:
                file.writelines(f"{problem}\n" for problem in problems)

    async def _told_within(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._told.wait()
        except TimeoutError:
            pass
