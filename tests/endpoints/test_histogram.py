"""Durations: what is exact of them, and how far a quantile may be off."""

from __future__ import annotations

import math
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_unified.endpoints.histogram import (
    BUCKET_BOUNDS,
    LONGEST,
    RELATIVE_ERROR,
    SHORTEST,
    Distribution,
    Histogram,
)

durations = st.floats(0, 2 * LONGEST)
in_range = st.floats(SHORTEST, LONGEST) | st.floats(-5, 3.5).map(lambda power: 10**power)
WIDEST = 0.02 * 2.5**0.1
"""Upper edge of the bucket that begins at 0.02, one of the widest."""


def histogram(*seconds: float) -> Histogram:
    histogram = Histogram()
    for duration in seconds:
        histogram.record(duration)
    return histogram


def distribution(*seconds: float) -> Distribution:
    found = histogram(*seconds).distribution()
    assert found is not None
    return found


def exact_quantile(q: float, seconds: list[float]) -> float:
    return sorted(seconds)[max(math.ceil(q * len(seconds)), 1) - 1]


@given(st.lists(in_range, min_size=1, max_size=200), st.floats(0, 1))
@example([0.001, 0.02 * (1 + 1e-12), 1.0], 0.5)
@example([0.001, WIDEST, 1.0], 0.5)
@example([0.0] * 50 + [1.0] * 49 + [2.0], 0.99)
def test_a_quantile_is_as_near_as_promised(seconds: list[float], q: float) -> None:
    exact = exact_quantile(q, seconds)

    assert histogram(*seconds).quantile(q) == pytest.approx(exact, rel=RELATIVE_ERROR)


def test_what_is_promised_is_five_percent_and_no_more() -> None:
    assert RELATIVE_ERROR <= 0.05


@given(st.lists(st.floats(0, SHORTEST), min_size=1), st.floats(0, 1))
def test_what_is_too_short_is_off_by_less_than_the_shortest(seconds: list[float], q: float) -> None:
    exact = exact_quantile(q, seconds)

    assert histogram(*seconds).quantile(q) == pytest.approx(exact, rel=0, abs=SHORTEST)


@given(st.lists(st.floats(LONGEST, 1e9, exclude_min=True), min_size=1), st.floats(0, 1))
def test_what_is_too_long_is_still_among_the_longest(seconds: list[float], q: float) -> None:
    assert histogram(*seconds).quantile(q) == max(seconds)


@given(durations, st.floats(0, 1))
def test_a_single_duration_is_every_quantile(seconds: float, q: float) -> None:
    assert histogram(seconds).quantile(q) == seconds


@given(st.lists(durations, min_size=1))
def test_all_but_the_quantiles_is_exact(seconds: list[float]) -> None:
    found = distribution(*seconds)

    assert found.count == len(seconds)
    assert (found.min, found.max) == (min(seconds), max(seconds))
    assert found.sum == pytest.approx(math.fsum(seconds))
    assert found.mean == pytest.approx(math.fsum(seconds) / len(seconds))


@given(st.lists(in_range, min_size=1))
def test_a_distribution_has_the_histograms_quantiles(seconds: list[float]) -> None:
    whole, found = histogram(*seconds), distribution(*seconds)

    assert [found.p50, found.p90, found.p99] == [whole.quantile(q) for q in (0.5, 0.9, 0.99)]


@given(
    st.lists(
        durations
        | st.sampled_from(BUCKET_BOUNDS)
        | st.sampled_from(BUCKET_BOUNDS).map(lambda bound: math.nextafter(bound, math.inf))
        | st.sampled_from(BUCKET_BOUNDS).map(lambda bound: math.nextafter(bound, 0)),
        min_size=1,
    )
)
def test_the_counts_up_to_a_bound_are_exact(seconds: list[float]) -> None:
    up_to = [sum(duration <= bound for duration in seconds) for bound in BUCKET_BOUNDS]

    assert list(distribution(*seconds).buckets) == up_to


@given(st.lists(durations), st.lists(durations, min_size=1))
def test_merging_is_as_recording_together(some: list[float], others: list[float]) -> None:
    merged = histogram(*some)
    merged.merge(histogram(*others))
    found, together = merged.distribution(), distribution(*some, *others)

    assert found is not None
    for name in Distribution.__struct_fields__:
        assert getattr(found, name) == pytest.approx(getattr(together, name), rel=1e-12), name


def test_merging_leaves_the_other_as_it_was() -> None:
    other = histogram(1.0)

    merged = histogram(2.0)
    merged.merge(other)
    merged.record(3.0)

    assert (other.count, other.sum, other.max) == (1, 1.0, 1.0)


def test_nothing_has_no_distribution() -> None:
    assert Histogram().distribution() is None


@pytest.mark.parametrize("q", [-0.01, 1.01, 99, math.nan])
def test_a_share_outside_of_0_to_1_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        histogram(1.0).quantile(q)


def test_nothing_has_no_quantile() -> None:
    with pytest.raises(ValueError, match="nothing"):
        Histogram().quantile(0.5)


def test_memory_does_not_grow_with_what_is_recorded() -> None:
    whole = Histogram()
    tracemalloc.start()
    for number in range(20_000):
        whole.record(1.0007**number * 1e-6)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    # A number kept for each would be 160 kB.
    assert grown < 16_000
