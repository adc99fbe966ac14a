"""How many retries there may be, and for how long a budget lasts."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.endpoints.budget import RetryBudget
from vllm_unified.errors import ConfigurationError

RATIO, FLOOR, WINDOW = 0.25, 0.5, 10.0
RESERVE = FLOOR * WINDOW

# Many in each moment, and pauses of about a slot, of about a window, and of more than both.
bursts = st.lists(
    st.tuples(
        st.sampled_from([0.125, 0.875, 1.0, 5.5, 8.875, 9.0, 9.5, 10.0, 10.5, 11.0, 40.0]),
        st.integers(0, 30),
        st.integers(0, 15),
    ),
    max_size=30,
)


def granted(budget: RetryBudget, now: float, wanted: int = 1000) -> int:
    return sum(budget.withdraw(now) for _ in range(wanted))


def between(times: list[float], after: float, until: float) -> int:
    return sum(after < time <= until for time in times)


class Run(NamedTuple):
    """What happened when."""

    requests: list[float]
    retries: list[float]
    refusals: list[float]


def run(bursts: list[tuple[float, int, int]], start: float) -> Run:
    budget = RetryBudget(ratio=RATIO, floor=FLOOR, window=WINDOW)
    happened = Run([], [], [])
    now = start
    for pause, begun, wanted in bursts:
        now += pause
        for _ in range(begun):
            budget.deposit(now)
        happened.requests.extend([now] * begun)
        for _ in range(wanted):
            (happened.retries if budget.withdraw(now) else happened.refusals).append(now)
    return happened


starts = st.sampled_from([0.0, 0.5, 1e6 + 0.25])


@given(bursts, starts)
def test_in_the_window_up_to_a_grant_retries_are_within_ratio_and_floor(
    bursts: list[tuple[float, int, int]], start: float
) -> None:
    requests, retries, _ = run(bursts, start)

    for at in retries:
        allowed = RATIO * between(requests, at - WINDOW, at) + RESERVE
        assert between(retries, at - WINDOW, at) <= allowed


@given(bursts, starts, st.floats(0, 300))
def test_in_any_window_retries_are_within_ratio_of_it_and_the_one_before_and_floor(
    bursts: list[tuple[float, int, int]], start: float, offset: float
) -> None:
    requests, retries, _ = run(bursts, start)

    end = start + offset
    allowed = RATIO * between(requests, end - 2 * WINDOW, end) + RESERVE
    assert between(retries, end - WINDOW, end) <= allowed


@given(bursts, starts)
def test_no_more_is_refused_than_counting_by_tenths_asks_for(
    bursts: list[tuple[float, int, int]], start: float
) -> None:
    requests, retries, refusals = run(bursts, start)

    for at in refusals:
        allowed = RATIO * between(requests, at - 0.9 * WINDOW, at) + RESERVE
        assert between(retries, at - 1.1 * WINDOW, at) >= math.floor(allowed)


def test_a_share_of_the_requests_is_granted_on_top_of_the_floor() -> None:
    budget = RetryBudget(ratio=0.2, floor=1.0, window=10.0)
    for _ in range(100):
        budget.deposit(5.0)

    assert granted(budget, 5.0) == 30


def test_a_client_that_sends_little_may_retry_too() -> None:
    assert granted(RetryBudget(ratio=0.2, floor=1.0, window=10.0), 5.0) == 10


def test_without_a_floor_only_requests_pay_for_retries() -> None:
    budget = RetryBudget(ratio=0.2, floor=0)
    for _ in range(4):
        budget.deposit(0.0)

    assert not budget.withdraw(0.0)
    budget.deposit(0.0)
    assert budget.withdraw(0.0)
    assert not budget.withdraw(0.0)


def test_a_budget_that_is_not_used_is_gone_after_a_window() -> None:
    budget = RetryBudget(ratio=0.2, floor=0, window=10.0)
    for _ in range(100):
        budget.deposit(0.0)

    assert budget.remaining(9.9) == 20
    assert budget.remaining(10.0) == 0


@pytest.mark.parametrize("idle", [*range(11, 23), 3600])
def test_idle_times_save_up_nothing_and_owe_nothing(idle: int) -> None:
    budget = RetryBudget(ratio=0.2, floor=1.0, window=10.0)
    granted(budget, 0.0)

    assert granted(budget, float(idle)) == 10


def test_the_floor_is_there_again_when_its_retries_have_left_the_window() -> None:
    budget = RetryBudget(ratio=0.2, floor=1.0, window=10.0)
    granted(budget, 0.5)

    assert not budget.withdraw(10.5)
    assert granted(budget, 11.0) == 10


def test_what_remains_is_what_is_granted() -> None:
    budget = RetryBudget(ratio=0.2, floor=0.3, window=10.0)
    for _ in range(12):
        budget.deposit(0.0)

    assert budget.remaining(0.0) == 5
    assert granted(budget, 0.0, 3) == 3
    assert budget.remaining(0.0) == 2


def test_no_less_than_nothing_remains() -> None:
    """Requests leave the window before the retries that they paid for."""
    budget = RetryBudget(ratio=0.2, floor=0, window=10.0)
    for _ in range(100):
        budget.deposit(0.0)
    granted(budget, 0.5)

    assert budget.remaining(10.0) == 0


def test_a_clock_that_went_back_forgets_nothing() -> None:
    budget = RetryBudget(ratio=0.2, floor=1.0, window=10.0)
    granted(budget, 100.0)

    assert not budget.withdraw(50.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ratio", -0.1), ("ratio", math.nan), ("floor", -1.0), ("floor", math.inf), ("window", 0.0)],
)
def test_a_wrong_setting_is_named(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{name} must be .*not {value!r}"):
        RetryBudget(**{name: value})
