"""Strategies that go by whose turn it is. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import islice

from vllm_unified.fleet.candidates import (
    ENOUGH,
    C,
    Candidate,
    Random,
    Room,
    Route,
)

_ROUNDING = 1e-9

_Turn = tuple[float, float, int]
"""A time, a random number that decides between equal ones, and whose turn it is, by place."""


class RoundRobin:
    """The candidate that was chosen longest ago; it stays fair while candidates come and go."""

    def __init__(self) -> None:
        self._choices = 0
        self._last: dict[str, int] = {}
        self._members: Sequence[Candidate] = ()
        self._queue: OrderedDict[int, None] = OrderedDict()
        """Places of the members, the one that was chosen longest ago first."""

    def choose(
        self, members: Sequence[C], room: Room[C], route: Route, now: float, random: Random
    ) -> C | None:
        """Those never chosen come first."""
        if members is not self._members:
            self._line_up(members, random)
        for place in self._queue:
            chosen = members[place]
            if room.at(chosen):
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
    """Shares by weight, without bursts: earliest eligible virtual deadline first (Stoica and
    Abdel-Wahab, 1995).

    A server's turns follow each other, and are as long as its weight says. Of those whose turn has
    begun the one is chosen whose turn ends first, so that each stays within about one request of
    its share. One that is full when its turn comes is put aside, with what it is behind or ahead,
    until it has room; the others share what comes in the meantime. Of those that are aside, 16 are
    looked at for each request.
    """

    def __init__(self) -> None:
        self._members: Sequence[Candidate] = ()
        self._behind: dict[str, float] = {}
        """Requests that a server that is aside, or no member now, has had less than its share."""
        self._aside: deque[int] = deque()
        self._begins: list[float] = []
        """When the turn of each member begins."""
        self._coming: list[_Turn] = []
        """Heap of turns that have not begun, by their beginning..."""
        self._begun: list[_Turn] = []
        """... and of those that have, by their end."""
        self._time = 0.0
        """Virtual: requests so far, for the weight of those that share them."""
        self._weight = 0.0

    def choose(
        self, members: Sequence[C], room: Room[C], route: Route, now: float, random: Random
    ) -> C | None:
        """Of equal ones any."""
        if members is not self._members:
            self._take_in(members, random)
        others = len(self._aside) - ENOUGH
        self._look_aside(members, room, ENOUGH, random)
        place = self._next(members, room)
        if place is None and others > 0:
            self._look_aside(members, room, others, random)
            place = self._next(members, room)
        if place is None:
            return None
        chosen = members[place]
        self._time += 1 / self._weight
        self._begins[place] += 1 / chosen.weight
        heappush(self._coming, (self._begins[place], random(), place))
        return chosen

    def forget(self, endpoint_id: str) -> None:
        """Neither a debt nor a claim is left."""
        self._leave()
        self._behind.pop(endpoint_id, None)

    def _next(self, members: Sequence[C], room: Room[C]) -> int | None:
        coming, begun = self._coming, self._begun
        while coming or begun:
            while coming and coming[0][0] <= self._time + _ROUNDING:
                begin, tie, place = heappop(coming)
                heappush(begun, (begin + 1 / members[place].weight, tie, place))
            _, _, place = heappop(begun or coming)
            if room.at(members[place]):
                return place
            self._put_aside(members[place], place)
        return None

    def _put_aside(self, member: Candidate, place: int) -> None:
        self._behind[member.id] = (self._time - self._begins[place]) * member.weight
        self._weight -= member.weight
        self._aside.append(place)

    def _look_aside(self, members: Sequence[C], room: Room[C], most: int, random: Random) -> None:
        if not self._aside:
            return
        places = [*islice(self._aside, most)]
        if not room.among([members[place] for place in places]):
            self._aside.rotate(-len(places))
            return
        for place in places:
            self._aside.popleft()
            if room.at(members[place]):
                self._begin(members[place], place, random)
            else:
                self._aside.append(place)

    def _begin(self, member: Candidate, place: int, random: Random) -> None:
        self._weight += member.weight
        self._begins[place] = self._time - self._behind.pop(member.id, 0.0) / member.weight
        heappush(self._coming, (self._begins[place], random(), place))

    def _take_in(self, members: Sequence[Candidate], random: Random) -> None:
        self._leave()
        self._members, self._begins = members, [0.0] * len(members)
        for place, member in enumerate(members):
            self._begin(member, place, random)

    def _leave(self) -> None:
        """Remember what all members are behind."""
        for _, _, place in self._coming + self._begun:
            member = self._members[place]
            self._behind[member.id] = (self._time - self._begins[place]) * member.weight
        self._members, self._time, self._weight = (), 0.0, 0.0
        self._coming.clear()
        self._begun.clear()
        self._aside.clear()
