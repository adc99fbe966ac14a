"""Strategies that return to a server: for what its cache holds, or for a session's sake. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from vllm_unified.fleet.candidates import (
    ENOUGH,
    FEW,
    C,
    Candidate,
    Random,
    Room,
    Route,
    lowest,
    neighbours,
)
from vllm_unified.fleet.hashing import StableHashes, stable_hash
from vllm_unified.fleet.load import LeastLoaded, loads
from vllm_unified.fleet.prefix import PrefixIndex, prefix_keys

_FIBONACCI = 0x9E3779B97F4A7C15
_53_BITS = 2**53 - 1
_BUCKETS = 16_384
"""Of sessions; as many as Redis Cluster has slots. What is remembered of each is 300 bytes."""
_PREFERRED = 32
"""Members that a bucket's sessions go to, the first of them that has room. Where none of them has,
all are looked at."""


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

    Of more than 16 servers it compares 8 neighbours, any, with up to 8 holders: those that were
    sent the prompt's beginning last.
    """

    def __init__(
        self,
        index: PrefixIndex | None = None,
        *,
        min_share: float = 0.3,
        max_surplus: float = FEW,
        max_ratio: float = 1.5,
    ) -> None:
        self._index = PrefixIndex() if index is None else index
        self._min_share = min_share
        self._max_surplus = max_surplus
        self._max_ratio = max_ratio
        self._members: Sequence[Candidate] = ()
        self._places: dict[str, int] = {}

    def choose(
        self, members: Sequence[C], room: Room[C], route: Route, now: float, random: Random
    ) -> C | None:
        """The choice is noted: the next request with this prefix finds it there."""
        keys = prefix_keys(route.body, route.model)
        few = ENOUGH if len(members) <= ENOUGH else ENOUGH // 2
        candidates = neighbours(members, room, random, few)
        if not candidates:
            return None
        seen = {candidate.id for candidate in candidates}
        if len(members) <= ENOUGH:
            count, holders = self._index.longest(keys, seen.__contains__, now)
        else:
            count, holders = self._holders(members, room, keys, now, few)
            candidates += [members[self._places[id]] for id in holders if id not in seen]
        load = loads(candidates)
        place = self._by_prefix(candidates, load, keys, count, {*holders}, random)
        if place is None:
            held = [self._index.held(each.id) / each.weight for each in candidates]
            place = lowest([*zip(load, held, strict=True)], random)
        chosen = candidates[place]
        self._index.add(keys, chosen.id, now)
        return chosen

    def forget(self, endpoint_id: str) -> None:
        """Its cache is empty when it comes back."""
        self._index.forget(endpoint_id)

    def _holders(
        self, members: Sequence[C], room: Room[C], keys: Sequence[int], now: float, most: int
    ) -> tuple[int, list[str]]:
        if members is not self._members:
            self._places = {each.id: place for place, each in enumerate(members)}
            self._members = members

        def has_room(id: str) -> bool:
            place = self._places.get(id)
            return place is not None and room.at(members[place])

        return self._index.longest(keys, has_room, now, most=most)

    def _by_prefix(
        self,
        candidates: Sequence[Candidate],
        load: Sequence[float],
        keys: Sequence[int],
        count: int,
        holders: set[str],
        random: Random,
    ) -> int | None:
        if count <= self._min_share * len(keys):
            return None
        roomy = self._with_room(candidates, load)
        if self._index.is_fork(keys, count):
            blocks = [self._blocks_at(candidates[place], holders, count) for place in roomy]
            return roomy[lowest(blocks, random)]
        held = [place for place, each in enumerate(candidates) if each.id in holders]
        best = held[lowest([load[place] for place in held], random)]
        return best if best in roomy else None

    def _blocks_at(self, candidate: Candidate, holders: set[str], count: int) -> float:
        """What the candidate would hold, for its weight; blocks that it lacks count twice, as they
        take time as well as room."""
        missing = 0 if candidate.id in holders else 2 * count
        return (self._index.held(candidate.id) + missing) / candidate.weight

    def _with_room(self, candidates: Sequence[Candidate], load: Sequence[float]) -> list[int]:
        """The places of those that are not overloaded; the least loaded one never is."""
        least = min(load)
        usual = self._max_ratio * least
        return [
            place
            for place, value in enumerate(load)
            if value <= usual
            or (weight := candidates[place].weight) * value - weight * least <= self._max_surplus
        ]


class Session:
    """The same candidate for the same session, unless it has too many requests already.

    Rendezvous hashing with weights (Thaler and Ravishankar, 1998; Schindelhauer and Schomaker,
    2005) and bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2016): a server that leaves moves
    its own sessions only, and none gets more than 1.25 times its share of this client's requests,
    or 4 where that is more. All clients agree, in all processes. Requests without a session go
    to the least loaded candidate.

    Sessions are hashed into buckets, for each of which the order of the servers is remembered: it
    takes a look at all of them. In a large fleet the share is that of some requests ago.
    """

    def __init__(self, *, bound: float = 1.25) -> None:
        self._bound = bound
        self._hashes = StableHashes()
        self._without_session = LeastLoaded()
        self._members: Sequence[Candidate] = ()
        self._places: dict[int, Sequence[int]] = {}
        """Of the members that are preferred, by bucket."""
        self._share = 0.0
        """Requests that a server may have, for its weight."""
        self._choices = 0
        self._count_at = 0
        """From which choice on the share is counted anew: so that all members are looked at once
        in as many choices as it takes to look at a few each time."""

    def choose(
        self, members: Sequence[C], room: Room[C], route: Route, now: float, random: Random
    ) -> C | None:
        """The session's first choice of those that have room."""
        if route.session is None:
            return self._without_session.choose(members, room, route, now, random)
        bucket = stable_hash(route.session) % _BUCKETS
        self._choices += 1
        for place in self._preferred(bucket, members):
            preferred = members[place]
            if room.at(preferred) and self._has_room(preferred, members, room):
                return preferred
        candidates = room.among(members)
        if not candidates:
            return None
        self._count(candidates)
        roomy = [
            each
            for each in candidates
            if each.in_flight < FEW or each.in_flight < self._share * each.weight
        ]
        return roomy[lowest(self._distances(bucket, roomy), random)]

    def forget(self, endpoint_id: str) -> None:
        """Only the hash is kept, which would be the same again."""
        self._hashes.pop(endpoint_id, None)

    def _preferred(self, bucket: int, members: Sequence[Candidate]) -> Sequence[int]:
        if members is not self._members:
            self._members, self._count_at = members, self._choices
            self._places.clear()
        places = self._places.get(bucket)
        if places is None:
            distances = self._distances(bucket, members)
            places = sorted(range(len(members)), key=distances.__getitem__)[:_PREFERRED]
            self._places[bucket] = places
        return places

    def _has_room(self, candidate: Candidate, members: Sequence[C], room: Room[C]) -> bool:
        in_flight = candidate.in_flight
        if in_flight < FEW:
            return True
        if self._choices >= self._count_at:
            self._count(room.among(members))
            self._count_at = self._choices + max(len(members) // ENOUGH, 1)
        return in_flight < self._share * candidate.weight

    def _count(self, candidates: Sequence[Candidate]) -> None:
        """What is below the bound is never nothing: the bounds add up to more than the requests in
        flight."""
        requests = sum([candidate.in_flight for candidate in candidates]) + 1
        self._share = self._bound * requests / sum([candidate.weight for candidate in candidates])

    def _distances(self, bucket: int, candidates: Sequence[Candidate]) -> list[float]:
        """Exponentially distributed, with the weight as the rate, so the least wins by weight."""
        key, hashes = stable_hash(str(bucket)), self._hashes
        # Fibonacci hashing (Knuth, volume 3, 6.4) of two hashes; 53 bits fit a float.
        return [
            -log((((key ^ hashes[each.id]) * _FIBONACCI >> 11 & _53_BITS) + 0.5) * 2.0**-53)
            / each.weight
            for each in candidates
        ]
