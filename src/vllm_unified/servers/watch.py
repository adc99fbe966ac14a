"""Is a ready vLLM alive? Tokens prove it: those of others, or one that is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vllm_unified.servers import logs
from vllm_unified.servers.adapters import loaded_adapters
from vllm_unified.servers.gauges import requests_inside, work_done
from vllm_unified.servers.probe import Contact
from vllm_unified.servers.restarts import Pacing
from vllm_unified.servers.spec import ServerSpec

_LOOK_SECONDS = 3.0


class Watch:
    """Looks at a vLLM again and again: its signs of life, its adapters, the size of its log."""

    def __init__(
        self,
        contact: Contact,
        spec: ServerSpec,
        log: Path,
        pacing: Pacing,
        noted: Callable[[Mapping[str, str]], object],
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            contact: The server.
            spec: What it runs.
            log: Its log, which is cut when it is long.
            pacing: How often, and how long silence is borne.
            noted: Gets the adapters that are loaded.
            clock: Seconds.
        """
        self._contact = contact
        self._spec = spec
        self._log = log
        self._pacing = pacing
        self._noted = noted
        self._clock = clock
        self._alive_at = clock()
        self._work: float | None = None
        self.health = "ok"

    async def until_hung(self) -> str:
        """Return when the server has given no sign of life for too long; what was seen."""
        probe: asyncio.Task[bool] | None = None
        try:
            while not self._silent_too_long():
                await asyncio.sleep(self._pacing.look_every)
                logs.cut(self._log)
                await self.note_adapters()
                if await self._works():
                    continue
                probe = probe or asyncio.create_task(_token(self._contact))
                # It goes on over several looks: a slow server is not a dead one.
                await asyncio.wait([probe], timeout=self._pacing.look_every)
                if probe.done():
                    self._see(probe.result())
                    probe = None
                else:
                    self._see(False)
        finally:
            if probe:
                probe.cancel()
                await asyncio.gather(probe, return_exceptions=True)
        return f"hung: no token for {self._pacing.hung_after:g} s"

    async def note_adapters(self) -> None:
        """Look which adapters are loaded."""
        if self._spec.enable_lora:
            found = await loaded_adapters(self._contact)
            if found is not None:
                self._noted(found)

    def _silent_too_long(self) -> bool:
        return self._clock() - self._alive_at >= self._pacing.hung_after

    async def _works(self) -> bool:
        """Whether there is a sign of life without asking for one."""
        if self._spec.dev_mode and await self._sleeps():
            self._see(True)
            self.health = "asleep"
            return True
        work = work_done(await self._contact.look("/metrics", _LOOK_SECONDS) or b"")
        moved = None not in (work, self._work) and work != self._work
        self._work = self._work if work is None else work
        if moved:
            self._see(True)
        return moved

    async def _sleeps(self) -> bool:
        """Whether it was put to sleep, or paused: it then answers nothing, and should not."""
        body = await self._contact.look("/is_sleeping", _LOOK_SECONDS)
        try:
            return bool(msgspec.json.decode(body or b"{}", type=dict[str, Any]).get("is_sleeping"))
        except msgspec.DecodeError:
            return False

    def _see(self, alive: bool) -> None:
        self.health = "ok" if alive else "silent"
        if alive:
            self._alive_at = self._clock()


async def drained(contact: Contact, seconds: float, settled: float) -> bool:
    """Wait until no request runs or waits, at two looks in a row; whether that came in time.

    A server that does not tell is given all the time.
    """
    quiet = 0
    try:
        async with asyncio.timeout(seconds):
            while quiet < 2:
                inside = requests_inside(await contact.look("/metrics", _LOOK_SECONDS) or b"")
                quiet = quiet + 1 if inside == 0 else 0
                if quiet < 2:
                    await asyncio.sleep(settled)
    except TimeoutError:
        return False
    return True


async def _token(contact: Contact) -> bool:
    try:
        return await contact.generates()
    except (PermissionError, ValueError):
        return False
