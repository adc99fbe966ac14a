"""The limits of servers that actors share: who keeps them, and how an actor keeps to them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_unified.batch.jobs.leases import SILENT_SECONDS, Leases
from vllm_unified.fleet.fleet import Fleet

REPORT_SECONDS = 0.5
_GIVE_UP_SECONDS = SILENT_SECONDS - 5
"""After which a client without an answer takes no more than the even share, before others may be
told that it is dead."""


class Demand(msgspec.Struct, frozen=True, array_like=True):
    """What a client has of a server, and what it could use."""

    in_flight: int
    wanted: int


class LimitKeeper:
    """An actor that keeps the limits of all servers of a job."""

    def __init__(self, most: Mapping[str, int], clients: int) -> None:
        """``most`` is how many requests each server, by its id, may have at once."""
        now = time.monotonic()
        self._leases = {
            server: Leases(number, clients=clients, now=now) for server, number in most.items()
        }

    def report(self, client: str, demands: Mapping[str, Demand]) -> dict[str, int]:
        """What the client may have in flight at each server."""
        now = time.monotonic()
        return {
            server: self._leases[server].report(
                client, in_flight=demand.in_flight, wanted=demand.wanted, now=now
            )
            for server, demand in demands.items()
        }


class SharedLimit:
    """Keeps a fleet to its leases, for as long as the event loop runs."""

    def __init__(self, fleet: Fleet, keeper: Any, shares: Mapping[str, int]) -> None:
        """Args:
        keeper: The actor.
        shares: What the fleet may have at each server where the keeper does not answer.
        """
        self._fleet = fleet
        self._keeper = keeper
        self._shares = shares
        self._client = uuid.uuid4().hex
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Get the first leases, and keep reporting."""
        await self._report(first=True)
        self._task = asyncio.create_task(self._go_on())

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            await self._report(first=False)

    async def _report(self, *, first: bool) -> None:
        from ray.exceptions import RayError

        demands = {
            each.id: Demand(
                each.in_flight,
                # Who uses up what it may have could perhaps use more.
                2 * each.capacity if first or each.in_flight >= each.capacity else each.in_flight,
            )
            for each in self._fleet.endpoints
        }
        try:
            answer = self._keeper.report.remote(self._client, demands)
            leases = await asyncio.wait_for(answer, _GIVE_UP_SECONDS)
        except (RayError, TimeoutError):
            leases = self._shares
        for each in self._fleet.endpoints:
            each.bound(leases[each.id])
