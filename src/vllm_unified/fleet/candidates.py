"""What a strategy sees, of servers and of a request, and what strategies have in common. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

Random = Callable[[], float]
"""Uniform in [0, 1)."""

ENOUGH = 16
"""Candidates that are compared. The least loaded of so many is hardly more loaded than that of all
(Mitzenmacher's argument for two holds all the more), and the choice takes no longer in a fleet of
hundreds."""
FEW = 4
"""Requests that do not make a server busy: vLLM batches them. As many as one that waits counts."""

_Value = TypeVar("_Value", float, tuple[float, float])


class Candidate(Protocol):
    """What a strategy sees of a server."""

    @property
    def id(self) -> str:
        """The same in every process and at every time, such as the address."""

    @property
    def weight(self) -> float:
        """Share of the requests that it can take, relative to the others; above 0."""

    @property
    def in_flight(self) -> int:
        """This client's requests that are there now."""

    @property
    def capacity(self) -> int:
        """How many of them there may be."""

    @property
    def latency(self) -> float | None:
        """Exponentially weighted mean, in seconds, to the first token or the answer."""

    @property
    def server_running(self) -> float:
        """vLLM's gauge of running requests, everybody's; NaN where unknown or stale."""

    @property
    def server_waiting(self) -> float:
        """vLLM's gauge of waiting requests, everybody's; NaN where unknown or stale."""

    @property
    def polled_in_flight(self) -> int:
        """What ``in_flight`` was when the gauges were read."""


C = TypeVar("C", bound=Candidate)


class Room(Protocol[C]):
    """Where there is room for a request now; whoever has none is full, shut out, or does not serve
    the model."""

    def at(self, candidate: C) -> bool:
        """Whether this one may take it."""

    def among(self, candidates: Sequence[C]) -> list[C]:
        """Those that may take it, in the order of the members."""


class Route(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a strategy sees of a request."""

    model: str | None = None
    session: str | None = None
    """Requests with equal sessions belong together, and to one server if possible."""
    body: bytes = b""
    """The JSON as it is sent."""
    tried: frozenset[str] = frozenset()
    """Ids of the servers where this call has failed."""


class Strategy(Protocol):
    """Chooses the server of each request."""

    def choose(
        self, members: Sequence[C], room: Room[C], route: Route, now: float, random: Random
    ) -> C | None:
        """One of the members that have room; ``None`` where none has.

        In a large fleet a strategy looks at few of them, and asks only of those whether they have
        room. ``members`` is the same object until one joins or leaves. ``now`` is in monotonic
        seconds.
        """

    def forget(self, endpoint_id: str) -> None:
        """Drop what is kept about a server that has left the fleet, or was restarted."""


class Stateless:
    """A strategy that remembers nothing."""

    def forget(self, endpoint_id: str) -> None:
        """Nothing is kept."""


def neighbours(
    members: Sequence[C], room: Room[C], random: Random, enough: int = ENOUGH
) -> list[C]:
    """Members with room: all, or of more than enough so many neighbours, beginning anywhere."""
    count = len(members)
    if count <= enough:
        return room.among(members)
    first = int(random() * count)
    found = room.among(members[first : first + enough])
    if len(found) == enough:
        return found
    others = [*members[first + enough :], *members[:first]]
    for place in range(0, len(others), enough):
        found += room.among(others[place : place + enough])
        if len(found) >= enough:
            break
    return found[:enough]


def lowest(values: Sequence[_Value], random: Random) -> int:
    """Where the least value stands; any of the places, if there are several."""
    least = min(values)
    if values.count(least) == 1:
        return values.index(least)
    places = [place for place, value in enumerate(values) if value == least]
    return places[int(random() * len(places))]
