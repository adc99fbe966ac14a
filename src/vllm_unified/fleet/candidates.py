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
Free = Callable[[C], bool]
"""Whether a server may take the request now."""


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
        self, members: Sequence[C], free: Free[C], route: Route, now: float, random: Random
    ) -> C | None:
        """One of the members that are free; ``None`` where none is.

        In a large fleet a strategy looks at few of them, and asks only of those whether they are
        free. ``members`` is the same object until one joins or leaves. ``now`` is in monotonic
        seconds.
        """

    def forget(self, endpoint_id: str) -> None:
        """Drop what is kept about a server that has left the fleet, or was restarted."""


class Stateless:
    """A strategy that remembers nothing."""

    def forget(self, endpoint_id: str) -> None:
        """Nothing is kept."""


def neighbours(
    members: Sequence[C], free: Free[C], random: Random, enough: int = ENOUGH
) -> list[C]:
    """Members that are free: all, or of more than enough so many neighbours, beginning anywhere."""
    count = len(members)
    if count <= enough:
        return [*filter(free, members)]
    first = int(random() * count)
    found = [*filter(free, members[first : first + enough])]
    if len(found) == enough:
        return found
    for place in range(min(first + enough - count, 0), first):
        each = members[place]
        if free(each):
            found.append(each)
            if len(found) == enough:
                break
    return found


def lowest(values: Sequence[_Value], random: Random) -> int:
    """Where the least value stands; any of the places, if there are several."""
    least = min(values)
    if values.count(least) == 1:
        return values.index(least)
    places = [place for place, value in enumerate(values) if value == least]
    return places[int(random() * len(places))]
