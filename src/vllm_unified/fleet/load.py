"""Strategies that go by how busy servers are. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, isnan

from vllm_unified.fleet.candidates import (
    ENOUGH,
    C,
    Candidate,
    Random,
    Room,
    Route,
    Stateless,
    lowest,
    neighbours,
)


class LeastLoaded(Stateless):
    """The candidate with the least load for its weight; see ``loads``. Of more than 16 candidates,
    it compares 16 neighbours, any.

    Clients that see the same gauges choose the same server: where they are many, ``PowerOfTwo``
    spreads better.
    """

    def choose(
        self, members: Sequence[C], room: Room[C], route: Route, now: float, random: Random
    ) -> C | None:
        """Of equally loaded ones any."""
        candidates = neighbours(members, room, random)
        return candidates[lowest(loads(candidates), random)] if candidates else None


class PowerOfTwo(Stateless):
    """The less loaded of two random candidates.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001: nearly as even as
    the least loaded of all, and no herd where the loads are out of date.
    """

    def choose(
        self, members: Sequence[C], room: Room[C], route: Route, now: float, random: Random
    ) -> C | None:
        """The two are different, if there are two."""
        first = None
        for _ in range(ENOUGH):
            each = members[int(random() * len(members))]
            if each is not first and room.at(each):
                if first is not None:
                    return _less_loaded(first, each)
                first = each
        # Hardly any has room.
        rest = room.among(members)
        if len(rest) < 2:
            return rest[0] if rest else None
        return _less_loaded(*(rest.pop(int(random() * len(rest))) for _ in range(2)))


class LowestLatency:
    """The candidate with the shortest expected time: latency times requests, for its weight.

    Finagle's Peak EWMA: a server whose latency is unknown is tried at once, by one request; until
    that is answered it is the last choice, as it is for a second after each try. The latency of
    an idle server fades, to 1/e in ten seconds since it was chosen: the slower it was, the later
    it is tried again, but it is. As there, of many not all are compared: of more than 16
    candidates, 16 neighbours.
    """

    _DECAY = 10.0
    _BETWEEN_TRIES = 1.0
    _UNKNOWN = 1e12

    def __init__(self) -> None:
        self._chosen_at: dict[str, float] = {}

    def choose(
        self, members: Sequence[C], room: Room[C], route: Route, now: float, random: Random
    ) -> C | None:
        """Of the unknown ones, those with the fewest requests."""
        candidates = neighbours(members, room, random)
        if not candidates:
            return None
        costs = [self._cost(candidate, now) for candidate in candidates]
        chosen = candidates[lowest(costs, random)]
        self._chosen_at[chosen.id] = now
        return chosen

    def forget(self, endpoint_id: str) -> None:
        """It may be tried at once when it comes back."""
        self._chosen_at.pop(endpoint_id, None)

    def _cost(self, candidate: Candidate, now: float) -> float:
        latency, in_flight = candidate.latency, candidate.in_flight
        if latency is None:
            return self._cost_of_unknown(candidate, now)
        if not in_flight and (chosen_at := self._chosen_at.get(candidate.id)) is not None:
            latency *= exp((chosen_at - now) / self._DECAY)
        return latency * (in_flight + 1) / candidate.weight

    def _cost_of_unknown(self, candidate: Candidate, now: float) -> float:
        chosen_at = self._chosen_at.get(candidate.id)
        if not candidate.in_flight and (
            chosen_at is None or now - chosen_at >= self._BETWEEN_TRIES
        ):
            return 0.0
        return self._UNKNOWN + (candidate.in_flight + 1) / candidate.weight


def _less_loaded(first: C, second: C) -> C:
    load, other = loads((first, second))
    return first if load <= other else second


def loads(candidates: Sequence[Candidate]) -> list[float]:
    """The load of each candidate if it got one request more, for its weight.

    That is (own + others' + 3 x waiting + 1) / weight: this client's requests, those of others
    when the gauges were read, and the waiting again, because a waiting request counts as four
    running ones, as in the balancer of vLLM's data parallel ranks (``DPLBAsyncMPClient``); the
    request to come counts too, as in the shortest expected delay of LVS, or an idle server would
    seem as good as one that is idle and twice as fast. What this client has sent since the gauges
    were read counts at once.

    Gauges count only where all candidates have them. Otherwise the one that cannot be read would
    seem to have nobody else's requests, and attract everybody's.
    """
    result = []
    for candidate in candidates:
        waiting = candidate.server_waiting
        there = candidate.server_running + waiting
        if isnan(there):
            return [(each.in_flight + 1.0) / each.weight for each in candidates]
        others = there - candidate.polled_in_flight
        if others < 0:  # requests that were under way to the server
            others = 0.0
        own = candidate.in_flight
        result.append((own + others + 3.0 * waiting + 1.0) / candidate.weight)
    return result
