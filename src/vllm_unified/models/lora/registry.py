"""Which adapters a client knows of: where each is meant to be, and which calls use it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from typing import Protocol

from vllm_unified.endpoints.call import Call
from vllm_unified.errors import AdapterError, VllmError
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.models.lora.adapters import Adapter
from vllm_unified.models.lora.placement import Replicas


class _Member(Protocol):
    @property
    def url(self) -> str: ...


class Registration:
    """An adapter as a caller wants it at the servers of one fleet."""

    def __init__(
        self,
        adapter: Adapter,
        fleet: Fleet,
        replicas: Replicas,
        *,
        keep: bool = False,
        on_demand: bool = False,
        max_adapters: int | None = None,
    ) -> None:
        """``max_adapters`` is how many of those on demand a server may have; ``None``: as many as
        it has slots."""
        self.adapter = adapter
        self.fleet = fleet
        self.replicas = replicas
        self.keep = keep
        self.on_demand = on_demand
        self.max_adapters = max_adapters
        self.places: set[str] = set()
        """Addresses of the servers where it is meant to be."""
        self._mourned: dict[str, set[type[VllmError] | None]] = {}
        self.used_at = -math.inf
        """When a call that used it began or ended last; monotonic seconds."""
        self.changing = 0
        """How many callers are replacing it."""
        self.coming: asyncio.Task[None] | None = None
        """Loads it, for all who wait."""

    @property
    def name(self) -> str:
        """Its name in requests."""
        return self.adapter.name

    @property
    def is_kept(self) -> bool:
        """Whether it is to be loaded again where it is missing now."""
        return self.keep and not self.changing

    def concerns(self, members: Collection[_Member]) -> bool:
        """Whether one of these is a server where it may be."""
        urls = {each.url for each in self.fleet.endpoints}
        return any(each.url in urls for each in members)

    def mourn(self, url: str, error: VllmError | None = None) -> bool:
        """A server has lost it, or this error kept it away; whether that is news."""
        told = self._mourned.setdefault(url, set())
        kind = None if error is None else type(error)
        if kind in told:
            return False
        told.add(kind)
        return True

    def forget_loss(self, url: str) -> None:
        """The server has it again."""
        self._mourned.pop(url, None)

    def __repr__(self) -> str:
        return f"<Registration of {self.name!r}, {len(self.places)} places>"


class Registry:
    """The adapters of one client."""

    def __init__(self) -> None:
        self._known: dict[str, list[Registration]] = {}
        self._users: dict[Call, Registration] = {}
        self._digests: dict[tuple[str, str, str], str] = {}
        self._freed = asyncio.Event()

    @property
    def all(self) -> list[Registration]:
        """All of them."""
        return [each for known in self._known.values() for each in known]

    def find(self, name: str | None, members: Collection[_Member]) -> Registration | None:
        """What is known of the adapter of this name at these servers."""
        for each in self._known.get(name, ()) if name is not None else ():
            if each.concerns(members):
                return each
        return None

    def add(self, registration: Registration) -> None:
        """Know it, in place of what was known of its name at its servers."""
        members = registration.fleet.endpoints
        others = self._known.get(registration.name, [])
        self._known[registration.name] = [
            *(each for each in others if not each.concerns(members)),
            registration,
        ]

    def remove(self, registration: Registration) -> None:
        """Know it no more."""
        known = self._known.get(registration.name, [])
        if registration in known:
            known.remove(registration)

    def use(self, call: Call, registration: Registration, now: float) -> None:
        """The call needs it, until it ends."""
        registration.used_at = now
        self._users[call] = registration

    def ended(self, call: Call, now: float) -> None:
        """The call has ended."""
        registration = self._users.pop(call, None)
        if registration is not None:
            registration.used_at = now
            self._freed.set()

    def is_busy(self, registration: Registration, url: str) -> bool:
        """Whether a call with it is at this server, or may get there."""
        return any(
            used is registration and (call.endpoint is None or call.endpoint.url == url)
            for call, used in self._users.items()
        )

    async def freed(self) -> None:
        """Wait until a call with an adapter has ended."""
        self._freed.clear()
        await self._freed.wait()

    def check_content(self, url: str, adapter: Adapter, digest: str | None) -> None:
        """Raise if a server had another content under the same name and path.

        vLLM's prefix cache knows an adapter by its name and path: it would answer with what the
        old weights made of a prompt.

        Raises:
            AdapterError: it had.
        """
        known = self._digests.get((url, adapter.name, adapter.path))
        if digest is not None and known not in (None, digest):
            raise AdapterError(
                f"the files in {adapter.path} have changed since {adapter.name!r} was loaded "
                "from there",
                endpoint=url,
                hint="The server would mix both versions in its prefix cache: publish each "
                "version in a new folder, and load that.",
            )

    def remember_content(self, url: str, adapter: Adapter, digest: str | None) -> None:
        """The server has loaded this content."""
        if digest is not None:
            self._digests[url, adapter.name, adapter.path] = digest
