"""Strategies: which server of a fleet gets a request. Pure.

A strategy sees servers as candidates, and has the state that it needs to choose among them; it
belongs to one client. Load is compared per weight, and ties are broken at random: many clients
that start at once do not all begin with the same server.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import exp, isnan, log
from types import MappingProxyType
from typing import Protocol, TypeVar

import msgspec

from vllm_unified.errors import ConfigurationError
from vllm_unified.fleet.hashing import StableHashes, stable_hash
from vllm_unified.fleet.prefix import PrefixIndex, prefix_keys

Random = Callable[[], float]
"""Uniform in [0, 1)."""

_Value = TypeVar("_Value", float, tuple[float, float])

ENOUGH = 16
"""Candidates that are compared. The least loaded of so many is hardly more loaded than that of all
(Mitzenmacher's argument for two holds all the more), and the choice takes no longer in a fleet of
hundreds."""
_FEW = 4
"""Requests that do not make a server busy: vLLM batches them. As many as one that waits counts."""
_FIBONACCI = 0x9E3779B97F4A7C15
_53_BITS = 2**53 - 1


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


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """What a strategy sees of a request."""

    model: str | None = None
    session: str | None = None
    """Requests with equal sessions belong together, and to one server if possible."""
    body: bytes = b""
    """The JSON as it is sent."""
    tried: frozenset[str] = frozenset()
    """Ids of the servers where this call has failed."""


ChooseFunction = Callable[[Sequence[Candidate], Route], Candidate]
"""A user's own strategy: one of the candidates, for a request."""


class Strategy(Protocol):
    """Chooses the server of each request."""

    def choose(
        self, candidates: Sequence[Candidate], route: Route, now: float, random: Random
    ) -> Candidate:
        """One of the candidates: the servers that may take the request now, at least one.

        ``now`` is in monotonic seconds. Of many, a strategy with an attribute ``enough`` sees only
        so many: neighbours, beginning anywhere.
        """

    def forget(self, endpoint_id: str) -> None:
        """Drop what is kept about a server that has left the fleet, or was restarted."""


class _Stateless:
    def forget(self, endpoint_id: str) -> None:
        """Nothing is kept."""


class RoundRobin:
    """The candidate that was chosen longest ago; it stays fair while candidates come and go."""

    def __init__(self) -> None:
        self._choices = 0
        self._last: dict[str, int] = {}

    def choose(
        self, candidates: Sequence[Candidate], route: Route, now: float, random: Random
    ) -> Candidate:
        """Those never chosen come first."""
        last = [self._last.get(candidate.id, 0) for candidate in candidates]
        chosen = candidates[_lowest(last, random)]
        self._choices += 1
        self._last[chosen.id] = self._choices
        return chosen

    def forget(self, endpoint_id: str) -> None:
        """It is new when it comes back."""
        self._last.pop(endpoint_id, None)


class Weighted:
    """Shares by weight, without bursts: the smooth weighted round robin of nginx (2012).

    Weights are shares of each choice here, so that a choice among few candidates counts as much as
    one among all. Every candidate stays within a few requests of the sum of its shares, however
    the candidates change (the greedy rule of the carpool problem: Ajtai et al., "Fairness in
    Scheduling", 1998).
    """

    def __init__(self) -> None:
        self._ahead: dict[str, float] = {}
        """Requests that a server has had beyond its share."""

    def choose(
        self, candidates: Sequence[Candidate], route: Route, now: float, random: Random
    ) -> Candidate:
        """The candidate that is furthest behind its share."""
        total = sum([candidate.weight for candidate in candidates])
        ahead = [self._ahead.get(each.id, 0.0) - each.weight / total for each in candidates]
        for candidate, value in zip(candidates, ahead, strict=True):
            self._ahead[candidate.id] = value
        chosen = candidates[_lowest(ahead, random)]
        self._ahead[chosen.id] += 1.0
        return chosen

    def forget(self, endpoint_id: str) -> None:
        """Neither a debt nor a claim is left."""
        self._ahead.pop(endpoint_id, None)


class LeastLoaded(_Stateless):
    """The candidate with the least load for its weight; see ``loads``. Of more than 16 candidates,
    it compares 16 neighbours, any.

    Clients that see the same gauges choose the same server: where they are many, ``PowerOfTwo``
    spreads better.
    """

    enough = ENOUGH

    def choose(
        self, candidates: Sequence[Candidate], route: Route, now: float, random: Random
    ) -> Candidate:
        """Of equally loaded ones any."""
        return candidates[_lowest(loads(candidates), random)]


class PowerOfTwo(_Stateless):
    """The less loaded of two random candidates.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001: nearly as even as
    the least loaded of all, and no herd where the loads are out of date.
    """

    enough = ENOUGH

    def choose(
        self, candidates: Sequence[Candidate], route: Route, now: float, random: Random
    ) -> Candidate:
        """The two are different, if there are two."""
        count = len(candidates)
        if count == 1:
            return candidates[0]
        first = int(random() * count)
        second = int(random() * (count - 1))
        if second >= first:
            second += 1
        pair = (candidates[first], candidates[second])
        return pair[_lowest(loads(pair), random)]


class PrefixAware:
    """The candidate whose prefix cache holds most of the prompt; the least loaded otherwise.

    A match counts where it covers more than ``min_share`` of the prompt (vllm-router: 0.3), and
    of several holders the least loaded one is taken. It is passed over if its load exceeds that
    of the least loaded candidate by more than ``max_surplus`` requests and by more than the
    factor ``max_ratio``. vllm-router says 64 and 1.5; with 64, a system prompt that everybody
    shares would keep all requests of a small fleet on one server. With 4 it gets as many holders
    as its requests need, and a server where two wait is left to others.

    Caches are shared out too. A prompt that leaves a known one behind, as a new conversation does
    after the system prompt, goes to the server with the fewest blocks for its weight: to one
    without that beginning as soon as the holders have more blocks beside it than it is long.
    """

    def __init__(
        self,
        index: PrefixIndex | None = None,
        *,
        min_share: float = 0.3,
        max_surplus: float = _FEW,
        max_ratio: float = 1.5,
    ) -> None:
        self._index = PrefixIndex() if index is None else index
        self._min_share = min_share
        self._max_surplus = max_surplus
        self._max_ratio = max_ratio

    def choose(
        self, candidates: Sequence[Candidate], route: Route, now: float, random: Random
    ) -> Candidate:
        """The choice is noted: the next request with this prefix finds it there."""
        keys = prefix_keys(route.body, route.model)
        load = loads(candidates)
        place = self._by_prefix(candidates, load, keys, now, random)
        if place is None:
            held = [self._index.held(each.id) / each.weight for each in candidates]
            place = _lowest([*zip(load, held, strict=True)], random)
        chosen = candidates[place]
        self._index.add(keys, chosen.id, now)
        return chosen

    def forget(self, endpoint_id: str) -> None:
        """Its cache is empty when it comes back."""
        self._index.forget(endpoint_id)

    def _by_prefix(
        self,
        candidates: Sequence[Candidate],
        load: Sequence[float],
        keys: Sequence[int],
        now: float,
        random: Random,
    ) -> int | None:
        places = {candidate.id: place for place, candidate in enumerate(candidates)}
        count, holders = self._index.longest(keys, places, now)
        if count <= self._min_share * len(keys):
            return None
        roomy = self._with_room(candidates, load)
        if self._index.is_fork(keys, count):
            blocks = [self._blocks_at(candidates[place], holders, count) for place in roomy]
            return roomy[_lowest(blocks, random)]
        held = [places[holder] for holder in holders]
        best = held[_lowest([load[place] for place in held], random)]
        return best if best in roomy else None

    def _blocks_at(self, candidate: Candidate, holders: Sequence[str], count: int) -> float:
        """What the candidate would hold, for its weight; blocks that it lacks count twice, as they
        take time as well as room."""
        missing = 0 if candidate.id in holders else 2 * count
        return (self._index.held(candidate.id) + missing) / candidate.weight

    def _with_room(self, candidates: Sequence[Candidate], load: Sequence[float]) -> list[int]:
        """The places of those that are not overloaded; the least loaded one never is."""
        least = min(load)
        return [
            place
            for place, each in enumerate(candidates)
            if not self._is_overloaded(load[place] * each.weight, least * each.weight)
        ]

    def _is_overloaded(self, requests: float, level: float) -> bool:
        return requests - level > self._max_surplus and requests > self._max_ratio * level


class Session:
    """The same candidate for the same session, unless it has too many requests already.

    Rendezvous hashing with weights (Thaler and Ravishankar, 1998; Schindelhauer and Schomaker,
    2005) and bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2016): a server that leaves moves
    its own sessions only, and none gets more than 1.25 times its share of this client's requests,
    or 4 where that is more. All clients agree, in all processes. Requests without a session go
    to the least loaded candidate.
    """

    def __init__(self, *, bound: float = 1.25) -> None:
        self._bound = bound
        self._hashes = StableHashes()
        self._without_session = LeastLoaded()

    def choose(
        self, candidates: Sequence[Candidate], route: Route, now: float, random: Random
    ) -> Candidate:
        """The session's first choice of those that have room."""
        if route.session is None:
            return self._without_session.choose(candidates, route, now, random)
        roomy = self._with_room(candidates)
        return roomy[_lowest(self._distances(route.session, roomy), random)]

    def forget(self, endpoint_id: str) -> None:
        """Only the hash is kept, which would be the same again."""
        self._hashes.pop(endpoint_id, None)

    def _with_room(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Never empty: the bounds add up to more than the requests in flight."""
        requests = sum([candidate.in_flight for candidate in candidates]) + 1
        share = self._bound * requests / sum([candidate.weight for candidate in candidates])
        return [
            candidate
            for candidate in candidates
            if (in_flight := candidate.in_flight) < _FEW or in_flight < share * candidate.weight
        ]

    def _distances(self, session: str, candidates: Sequence[Candidate]) -> list[float]:
        """Exponentially distributed, with the weight as the rate, so the least wins by weight."""
        key, hashes = stable_hash(session), self._hashes
        # Fibonacci hashing (Knuth, volume 3, 6.4) of two hashes; 53 bits fit a float.
        return [
            -log((((key ^ hashes[each.id]) * _FIBONACCI >> 11 & _53_BITS) + 0.5) * 2.0**-53)
            / each.weight
            for each in candidates
        ]


class LowestLatency:
    """The candidate with the shortest expected time: latency times requests, for its weight.

    Finagle's Peak EWMA: a server whose latency is unknown is tried at once, by one request; until
    that is answered it is the last choice, as it is for a second after each try. The latency of
    an idle server fades, to 1/e in ten seconds since it was chosen: the slower it was, the later
    it is tried again, but it is. As there, of many not all are compared: of more than 16
    candidates, 16 neighbours.
    """

    enough = ENOUGH
    _DECAY = 10.0
    _BETWEEN_TRIES = 1.0
    _UNKNOWN = 1e12

    def __init__(self) -> None:
        self._chosen_at: dict[str, float] = {}

    def choose(
        self, candidates: Sequence[Candidate], route: Route, now: float, random: Random
    ) -> Candidate:
        """Of the unknown ones, those with the fewest requests."""
        costs = [self._cost(candidate, now) for candidate in candidates]
        chosen = candidates[_lowest(costs, random)]
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


class _Custom(_Stateless):
    def __init__(self, function: ChooseFunction) -> None:
        self._function = function
        self._name = getattr(function, "__qualname__", None) or repr(function)

    def choose(
        self, candidates: Sequence[Candidate], route: Route, now: float, random: Random
    ) -> Candidate:
        """What the function says.

        Raises:
            ConfigurationError: it raised, or returned none of the candidates.
        """
        try:
            chosen = self._function(candidates, route)
        except Exception as error:
            raise ConfigurationError(
                f"the routing function {self._name} raised {type(error).__name__}: {error}"
            ) from error
        if not any(chosen is candidate for candidate in candidates):
            raise ConfigurationError(
                f"the routing function {self._name} returned {chosen!r:.80}, which is none of the "
                "candidates",
                hint="It must return one of the objects in its first argument.",
            )
        return chosen


STRATEGIES: Mapping[str, Callable[[], Strategy]] = MappingProxyType(
    {
        "round_robin": RoundRobin,
        "weighted": Weighted,
        "least_loaded": LeastLoaded,
        "power_of_two": PowerOfTwo,
        "prefix_aware": PrefixAware,
        "session": Session,
        "latency": LowestLatency,
    }
)
"""The strategies by name; calling one makes it, without any state."""


def strategy(spec: str | ChooseFunction) -> Strategy:
    """A new strategy, of that name or around a function ``(candidates, route) -> candidate``.

    Raises:
        ConfigurationError: there is no strategy of that name, or the function is asynchronous.
    """
    if isinstance(spec, str):
        make = STRATEGIES.get(spec)
        if make is not None:
            return make()
        raise ConfigurationError(
            f"there is no routing strategy {spec!r}",
            hint=f"There are {', '.join(STRATEGIES)}; or give a function of your own.",
        )
    if not callable(spec):
        raise ConfigurationError(
            f"a routing strategy is a name or a function, not {spec!r:.80}",
            hint=f"The names are {', '.join(STRATEGIES)}.",
        )
    if inspect.iscoroutinefunction(spec):
        raise ConfigurationError(
            "the routing function must not be async: it is called between two steps of a request"
        )
    return _Custom(spec)


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


def _lowest(values: Sequence[_Value], random: Random) -> int:
    """Where the least value stands; any of the places, if there are several."""
    least = min(values)
    if values.count(least) == 1:
        return values.index(least)
    places = [place for place, value in enumerate(values) if value == least]
    return places[int(random() * len(places))]
