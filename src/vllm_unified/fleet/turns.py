"""Strategies that go by whose turn it is. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

from vllm_unified.fleet.candidates import (
    ENOUGH,
    C,
    Candidate,
    Free,
    Random,
    Route,
    lowest,
)

_GOLDEN = (5**0.5 - 1) / 2
"""Steps of the golden ratio visit all parts of a circle alike, at any time (Weyl; Knuth, volume 3,
6.4)."""


class RoundRobin:
    """The candidate that was chosen longest ago; it stays fair while candidates come and go."""

    def __init__(self) -> None:
        self._choices = 0
        self._last: dict[str, int] = {}
        self._members: Sequence[Candidate] = ()
        self._queue: OrderedDict[int, None] = OrderedDict()
        """Places of the members, the one that was chosen longest ago first."""

    def choose(
        self, members: Sequence[C], free: Free[C], route: Route, now: float, random: Random
    ) -> C | None:
        """Those never chosen come first."""
        if members is not self._members:
            self._line_up(members, random)
        for place in self._queue:
            chosen = members[place]
            if free(chosen):
                self._queue.move_to_end(place)
                self._choices += 1
                self._last[chosen.id] = self._choices
                return chosen
        return None

    def forget(self, endpoint_id: str) -> None:
        """It is new when it comes back."""
        self._last.pop(endpoint_id, None)
        self._members = ()

    def _line_up(self, members: Sequence[Candidate], random: Random) -> None:
        last = [(self._last.get(each.id, 0), random()) for each in members]
        self._queue = OrderedDict.fromkeys(sorted(range(len(members)), key=last.__getitem__))
        self._members = members


class Weighted:
    """Shares by weight, without bursts: the smooth weighted round robin of nginx (2012).

    Weights are shares of each choice here, so that a choice among few candidates counts as much as
    one among all. Every candidate stays within a few requests of the sum of its shares, however
    the candidates change (the greedy rule of the carpool problem: Ajtai et al., "Fairness in
    Scheduling", 1998). Of more than 16 servers, a choice is among those of 16 neighbours that are
    free; which 16 goes by their weight, so that all shares add up to the weights.
    """

    def __init__(self) -> None:
        self._ahead: dict[str, float] = {}
        """Requests that a server has had beyond its share."""
        self._members: Sequence[Candidate] = ()
        self._until: list[float] = []
        """Sums of the members' weights, up to each of them."""
        self._point: float | None = None
        """Where on the line of all weights, as a part of it."""
        self._offset = 0

    def choose(
        self, members: Sequence[C], free: Free[C], route: Route, now: float, random: Random
    ) -> C | None:
        """The candidate that is furthest behind its share."""
        candidates = self._candidates(members, free, random)
        if not candidates:
            return None
        total = sum([candidate.weight for candidate in candidates])
        known = self._ahead
        ahead = [known.get(each.id, 0.0) - each.weight / total for each in candidates]
        for candidate, value in zip(candidates, ahead, strict=True):
            known[candidate.id] = value
        chosen = candidates[lowest(ahead, random)]
        known[chosen.id] += 1.0
        return chosen

    def forget(self, endpoint_id: str) -> None:
        """Neither a debt nor a claim is left."""
        self._ahead.pop(endpoint_id, None)

    def _candidates(self, members: Sequence[C], free: Free[C], random: Random) -> list[C]:
        if len(members) > ENOUGH:
            if members is not self._members:
                self._until = [*accumulate([each.weight for each in members])]
                self._members = members
            for _ in range(ENOUGH):
                place = self._next_place(random)
                # Around one that is not free, the free ones would get more than their shares.
                if free(members[place]):
                    return [*filter(free, self._around(members, place))]
        return [*filter(free, members)]

    def _next_place(self, random: Random) -> int:
        """Any member, in the long run as often as its weight says."""
        self._point = random() if self._point is None else (self._point + _GOLDEN) % 1.0
        until = self._until
        return min(bisect_right(until, self._point * until[-1]), len(until) - 1)

    def _around(self, members: Sequence[C], place: int) -> Sequence[C]:
        """The member at this place with neighbours, of which it is the first, the second..."""
        self._offset = (self._offset + 1) % ENOUGH
        first = place - self._offset
        last = first + ENOUGH - len(members)
        if first < 0:
            return [*members[first:], *members[: first + ENOUGH]]
        return [*members[first:], *members[:last]] if last > 0 else members[first : first + ENOUGH]
