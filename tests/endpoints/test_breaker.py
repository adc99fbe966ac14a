"""When a breaker opens, whom it lets through, and which verdicts count."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.endpoints.breaker import BreakerConfig, CircuitBreaker, State
from vllm_unified.errors import ConfigurationError

CONFIG = BreakerConfig(failure_threshold=3, reset_timeout=10.0, half_open_successful_calls=2)


def closed() -> CircuitBreaker:
    return CircuitBreaker(CONFIG)


def opened(at: float = 0.0) -> CircuitBreaker:
    breaker = closed()
    fail(breaker, 3, now=at)
    return breaker


def half_open(at: float = 10.0) -> CircuitBreaker:
    breaker = opened(at - 10)
    breaker.allows(at)
    return breaker


def fail(breaker: CircuitBreaker, times: int = 1, *, now: float = 0.0) -> None:
    for _ in range(times):
        breaker.fail(breaker.begin(), now)


def succeed(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.succeed(breaker.begin())


def begun(breaker: CircuitBreaker, now: float) -> list[int]:
    """Tokens of as many requests as are let through, of twenty."""
    return [breaker.begin() for _ in range(20) if breaker.allows(now)]


def test_a_new_breaker_lets_all_through() -> None:
    assert len(begun(closed(), 0.0)) == 20


def test_failures_in_a_row_open_it() -> None:
    breaker = closed()

    fail(breaker, 2)
    assert not breaker.shut
    fail(breaker)
    assert breaker.state == "open"
    assert breaker.shut


def test_a_success_between_starts_the_count_again() -> None:
    breaker = closed()

    fail(breaker, 2)
    succeed(breaker)
    fail(breaker, 2)

    assert breaker.state == "closed"


def test_no_verdict_is_neither_success_nor_failure() -> None:
    breaker = closed()

    fail(breaker, 2)
    breaker.forget(breaker.begin())
    assert not breaker.shut
    fail(breaker)
    assert breaker.shut


def test_open_lets_nobody_through_until_its_time_has_come() -> None:
    breaker = opened(at=100.0)

    assert not breaker.allows(109.9)
    assert breaker.state == "open"
    assert breaker.allows(110.0)
    assert (breaker.state, breaker.shut) == ("half_open", True)


def test_it_says_when_it_opened_and_when_it_may_be_tried() -> None:
    breaker = opened(at=100.0)

    assert (breaker.opened_at, breaker.ready_at) == (100.0, 110.0)
    breaker.reset()
    assert (breaker.opened_at, breaker.ready_at) == (None, -math.inf)


def test_half_open_lets_as_many_through_as_successes_are_missing() -> None:
    breaker = half_open()

    first, _ = begun(breaker, 10.0)
    breaker.succeed(first)

    assert begun(breaker, 10.0) == []


def test_trials_that_succeed_close_it() -> None:
    breaker = half_open()

    succeed(breaker)
    assert breaker.state == "half_open"
    succeed(breaker)
    assert (breaker.state, breaker.shut) == ("closed", False)


def test_a_trial_without_a_verdict_makes_room_for_another() -> None:
    breaker = half_open()

    for token in begun(breaker, 10.0):
        breaker.forget(token)

    assert len(begun(breaker, 10.0)) == 2


def test_a_trial_without_a_verdict_beside_one_that_succeeded_makes_room_too() -> None:
    breaker = half_open()

    first, second = begun(breaker, 10.0)
    breaker.succeed(first)
    breaker.forget(second)

    assert len(begun(breaker, 10.0)) == 1


def test_a_success_before_it_opened_again_does_not_count() -> None:
    breaker = half_open()

    succeed(breaker)
    fail(breaker, now=10.0)
    breaker.allows(30.0)
    succeed(breaker)

    assert breaker.state == "half_open"


def test_a_trial_that_fails_opens_it_again_for_longer_each_time_up_to_eight_times() -> None:
    breaker = opened(at=0.0)
    waits = []

    for _ in range(5):
        now = breaker.ready_at
        assert breaker.allows(now)
        fail(breaker, now=now)
        waits.append(breaker.ready_at - now)

    assert waits == [20, 40, 80, 80, 80]


@pytest.mark.parametrize("way", ["trials", "reset"])
def test_closing_forgets_how_long_it_was_open(way: str) -> None:
    breaker = half_open()
    fail(breaker, now=10.0)
    breaker.allows(30.0)

    if way == "trials":
        succeed(breaker, 2)
    else:
        breaker.reset()
    fail(breaker, 3, now=50.0)

    assert breaker.ready_at == 60.0


def test_late_failures_of_requests_from_before_it_opened_do_not_prolong() -> None:
    breaker = closed()
    in_flight = begun(breaker, 0.0)

    for now, token in enumerate(in_flight):
        breaker.fail(token, float(now))

    assert (breaker.opened_at, breaker.ready_at) == (2.0, 12.0)


def test_a_late_failure_from_before_it_opened_does_not_fail_a_trial() -> None:
    breaker = closed()
    late = breaker.begin()
    fail(breaker, 3)
    begun(breaker, 10.0)

    breaker.fail(late, 10.0)

    assert breaker.state == "half_open"


def test_a_late_success_from_before_it_opened_proves_nothing() -> None:
    breaker = closed()
    late = begun(breaker, 0.0)
    fail(breaker, 3)

    breaker.succeed(late.pop())
    assert not breaker.allows(9.9)
    breaker.allows(10.0)
    for token in late:
        breaker.succeed(token)
    assert breaker.state == "half_open"
    assert len(begun(breaker, 10.0)) == 2


def test_a_late_verdict_from_before_it_opened_frees_no_trial() -> None:
    breaker = closed()
    late = breaker.begin()
    fail(breaker, 3)
    begun(breaker, 10.0)

    breaker.forget(late)

    assert begun(breaker, 10.0) == []


def test_a_late_failure_from_an_earlier_life_does_not_count_when_it_is_closed_again() -> None:
    breaker = closed()
    late = begun(breaker, 0.0)[:3]
    breaker.trip(0.0)
    breaker.reset()

    for token in late:
        breaker.fail(token, 1.0)

    assert breaker.state == "closed"


def test_failures_of_requests_that_were_sent_while_it_is_open_do_not_prolong() -> None:
    """Such as those that are sent when every server's breaker is open."""
    breaker = opened(at=0.0)

    fail(breaker, 10, now=5.0)

    assert (breaker.state, breaker.ready_at) == ("open", 10.0)


def test_a_request_that_was_sent_while_it_is_open_is_no_trial() -> None:
    breaker = opened(at=0.0)
    late = breaker.begin()

    assert len(begun(breaker, 10.0)) == 2
    breaker.succeed(late)
    assert begun(breaker, 10.0) == []


def test_a_server_found_dead_is_left_alone_at_once() -> None:
    breaker = closed()

    breaker.trip(5.0)

    assert (breaker.state, breaker.opened_at, breaker.ready_at) == ("open", 5.0, 15.0)


def test_a_server_still_found_dead_is_left_alone_from_then_on() -> None:
    breaker = opened(at=0.0)

    breaker.trip(6.0)

    assert (breaker.opened_at, breaker.ready_at) == (0.0, 16.0)


def test_a_server_found_dead_during_a_trial_has_failed_it() -> None:
    breaker = half_open(at=10.0)

    breaker.trip(10.0)

    assert (breaker.state, breaker.ready_at) == ("open", 30.0)


@pytest.mark.parametrize("breaker", [opened(), half_open()], ids=["open", "half-open"])
def test_a_server_that_was_proved_to_work_is_used_at_once(breaker: CircuitBreaker) -> None:
    breaker.reset()

    assert len(begun(breaker, 0.0)) == 20


def test_a_server_that_was_proved_to_work_has_no_failures() -> None:
    breaker = closed()

    fail(breaker, 2)
    breaker.reset()
    fail(breaker, 2)

    assert breaker.state == "closed"


def test_each_change_is_told_once_and_when_it_is_made() -> None:
    told: list[tuple[State, State]] = []
    breaker = CircuitBreaker(CONFIG, changed=lambda state: told.append((state, breaker.state)))

    breaker.reset()
    fail(breaker, 3)
    breaker.trip(0.0)
    begun(breaker, 10.0)
    fail(breaker, now=10.0)
    breaker.allows(30.0)
    succeed(breaker, 2)

    assert told == [
        (state, state) for state in ("open", "half_open", "open", "half_open", "closed")
    ]


steps = st.sampled_from(["begin", "succeed", "fail", "forget", "trip", "reset"])


@given(st.lists(st.tuples(steps, st.integers(0, 50), st.integers(0, 30)), max_size=80))
def test_whatever_the_order_no_trial_leaks_and_it_can_always_close(
    steps: list[tuple[str, int, int]],
) -> None:
    breaker = half_open(at=10.0)
    in_flight: list[int] = []
    now = 10.0

    for step, index, seconds in steps:
        now += seconds
        match step:
            case "begin":
                if breaker.allows(now):
                    in_flight.append(breaker.begin())
            case "trip":
                breaker.trip(now)
            case "reset":
                breaker.reset()
            case _ if in_flight:
                token = in_flight.pop(index % len(in_flight))
                arguments = (token, now) if step == "fail" else (token,)
                getattr(breaker, step)(*arguments)
        assert breaker.shut is (breaker.state != "closed")
    for token in in_flight:
        breaker.forget(token)

    now = max(now, breaker.ready_at)
    trials = begun(breaker, now)
    assert trials
    for token in trials:
        breaker.succeed(token)
    assert breaker.state == "closed"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("failure_threshold", 0),
        ("failure_threshold", 2.5),
        ("failure_threshold", True),
        ("reset_timeout", 0),
        ("reset_timeout", -1.0),
        ("reset_timeout", math.inf),
        ("reset_timeout", math.nan),
        ("reset_timeout", "10"),
        ("half_open_successful_calls", 0),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{field} must be .*not {value!r}"):
        BreakerConfig(**{field: value})  # type: ignore[arg-type]
