"""How long things took: counts in buckets, and quantiles from them. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate, pairwise
from operator import add

import msgspec

SHORTEST = 1e-5
"""Seconds; what is shorter is told apart no further."""
LONGEST = 3600.0
"""Seconds; what is longer is told apart no further."""
RELATIVE_ERROR = 0.046
"""Of a quantile above ``SHORTEST`` and up to ``LONGEST``, at most: (w - 1) / (w + 1), where w is
the widest bucket's upper edge over its lower one, 2.5 ** (1 / 10)."""

_WIDEST = 1.1
_MARKS = [float(f"{digit}e{exponent}") for exponent in range(-5, 4) for digit in (1, 2, 5)]


def _make_edges() -> list[float]:
    """Every step from mark to mark, cut into the fewest equally wide buckets within the bound."""
    marks = [*(mark for mark in _MARKS if mark < LONGEST), LONGEST]
    edges = []
    for low, high in pairwise(marks):
        steps = math.ceil(math.log(high / low, _WIDEST))
        edges += [low * (high / low) ** (step / steps) for step in range(steps)]
    return [*edges, LONGEST]


_EDGES = _make_edges()

BUCKET_BOUNDS = tuple(mark for mark in _MARKS if 1e-3 <= mark <= 500)
"""Seconds, 1-2-5 from 1 ms to 500 s. Each is an edge of the internal buckets, so the counts up to
a bound are exact."""

_BUCKETS_AT_BOUNDS = [_EDGES.index(bound) for bound in BUCKET_BOUNDS]


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """What a histogram held, in seconds. The quantiles are within ``RELATIVE_ERROR``; all else is
    exact."""

    count: int
    sum: float
    mean: float
    min: float
    max: float
    p50: float
    p90: float
    p99: float
    buckets: tuple[int, ...]
    """How many took at most ``BUCKET_BOUNDS[i]``, shorter ones included. These may be added up
    over several processes; quantiles may not."""


class Histogram:
    """Counts of durations in 225 buckets, however many are recorded.

    The buckets grow with the value, and a quantile is the point of its bucket that is relatively
    as far from both edges, as in DDSketch (Masson, Rim and Lee, VLDB 2019). The edges stand in a
    table, as HdrHistogram's linear steps and the powers of Prometheus' native histograms do not:
    so the decimal bounds of a classic Prometheus histogram are edges among others, and a value
    on an edge is on its right side, where a logarithm might round it to the other.
    """

    __slots__ = ("_counts", "max", "min", "sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(_EDGES) + 1)
        self.sum = 0.0
        self.min = math.inf
        self.max = -math.inf

    def record(self, seconds: float) -> None:
        """Count a duration, which is finite and not negative."""
        # Of equal edges the left one: a bucket has its upper edge, as Prometheus' "le" does.
        self._counts[bisect_left(_EDGES, seconds)] += 1
        self.sum += seconds
        if seconds < self.min:
            self.min = seconds
        if seconds > self.max:
            self.max = seconds

    @property
    def count(self) -> int:
        """How many durations were recorded."""
        return sum(self._counts)

    def quantile(self, q: float) -> float:
        """The smallest duration, in seconds, that at least the share ``q`` does not exceed.

        Raises:
            ValueError: ``q`` is not in [0, 1], or nothing was recorded.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is asked for by a share from 0 to 1, not {q}")
        cumulative = list(accumulate(self._counts))
        if not cumulative[-1]:
            raise ValueError("nothing was recorded")
        return self._quantile(q, cumulative)

    def distribution(self) -> Distribution | None:
        """What was recorded; ``None`` if nothing was."""
        cumulative = list(accumulate(self._counts))
        count = cumulative[-1]
        if not count:
            return None
        return Distribution(
            count=count,
            sum=self.sum,
            mean=self.sum / count,
            min=self.min,
            max=self.max,
            p50=self._quantile(0.5, cumulative),
            p90=self._quantile(0.9, cumulative),
            p99=self._quantile(0.99, cumulative),
            buckets=tuple([cumulative[bucket] for bucket in _BUCKETS_AT_BOUNDS]),
        )

    def merge(self, other: Histogram) -> None:
        """Add what another one holds, as if it had been recorded here."""
        self._counts[:] = map(add, self._counts, other._counts)
        self.sum += other.sum
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)

    def _quantile(self, q: float, cumulative: list[int]) -> float:
        bucket = bisect_left(cumulative, max(q * cumulative[-1], 1))
        if bucket == len(_EDGES):
            return self.max
        low, high = _EDGES[bucket - 1] if bucket else 0.0, _EDGES[bucket]
        middle = 2 * low * high / (low + high)
        return min(max(middle, self.min), self.max)
