"""When a request may be sent, so that no minute has more than the quota."""

from __future__ import annotations

import gc
import math
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.endpoints.quota import WINDOW, Quota, QuotaTicket
from vllm_unified.errors import ConfigurationError


def quota(requests: int | None = None, tokens: int | None = None) -> Quota:
    return Quota(requests_per_minute=requests, tokens_per_minute=tokens)


def windows(taken: list[QuotaTicket]) -> list[list[QuotaTicket]]:
    """The requests in each 60 s that begin with one of them: no other window has more."""
    return [
        [ticket for ticket in taken if first.at <= ticket.at < first.at + WINDOW] for first in taken
    ]


# Times on a grid, so that sums are exact and moments coincide.
seconds = st.integers(0, 200).map(lambda eighths: eighths / 8)
small_quotas = st.none() | st.integers(1, 8)
steps = st.lists(
    st.tuples(
        seconds,
        st.integers(0, 60),
        st.sampled_from(["send", "send", "send if ready", "settle for less", "refund"]),
        st.integers(0, 1000),
    ),
    max_size=60,
)


@given(small_quotas, st.none() | st.integers(1, 100), steps)
def test_no_minute_has_more_than_the_quota_whatever_is_sent_settled_and_refunded(
    requests: int | None, tokens: int | None, steps: list[tuple[float, int, str, int]]
) -> None:
    limits = quota(requests, tokens)
    taken: list[QuotaTicket] = []
    now = 0.0

    for pause, size, step, index in steps:
        now += pause
        if step.startswith("send"):
            ready = limits.ready_at(now, size)
            now = max(now, ready) if step == "send" else now
            if ready <= now:
                taken.append(limits.take(now, size))
        elif taken and step == "refund":
            limits.refund(taken.pop(index % len(taken)))
        elif taken:
            ticket = taken[index % len(taken)]
            limits.settle(ticket, index % (ticket.tokens + 1))

        for window in windows(taken):
            assert requests is None or len(window) <= requests
            used = [ticket.tokens for ticket in window if ticket.tokens]
            assert tokens is None or sum(used) <= tokens or len(used) == 1


@given(st.integers(1, 8), st.integers(1, 100), steps)
def test_it_is_ready_no_later_than_the_quota_asks_for(
    requests: int, tokens: int, steps: list[tuple[float, int, str, int]]
) -> None:
    """At any moment before, the request would have been one too many."""
    limits = quota(requests, tokens)
    taken: list[QuotaTicket] = []
    now = 0.0

    for pause, size, _, _ in steps:
        ready = limits.ready_at(now, size)
        if ready > now:
            before = math.nextafter(ready, 0)
            window = [ticket.tokens for ticket in taken if before < ticket.at + WINDOW]
            assert len(window) >= requests or sum(window) + max(size, 1) > tokens
        now = max(now, ready) + pause
        taken.append(limits.take(now, size))


def test_the_first_minute_has_no_more_than_the_others() -> None:
    limits = quota(requests=3)
    sent = []
    now = 0.0

    for _ in range(9):
        now = max(now, limits.ready_at(now))
        limits.take(now)
        sent.append(now)

    assert sent == [0, 0, 0, 60, 60, 60, 120, 120, 120]


def test_it_is_ready_when_enough_tokens_have_left_the_window() -> None:
    limits = quota(tokens=100)
    for at in range(4):
        limits.take(float(at), 25)

    assert limits.ready_at(10.0, 1) == 60
    assert limits.ready_at(10.0, 25) == 60
    assert limits.ready_at(10.0, 26) == 61
    assert limits.ready_at(10.0, 100) == 63


def test_the_stricter_of_two_quotas_holds() -> None:
    limits = quota(requests=2, tokens=100)
    limits.take(0.0, 10)
    limits.take(5.0, 50)

    assert limits.ready_at(10.0, 10) == 60
    assert limits.ready_at(10.0, 60) == 65
    limits.take(6.0, 10)
    assert limits.ready_at(10.0, 40) == 65


def test_one_larger_than_the_quota_goes_when_the_window_is_empty() -> None:
    limits = quota(tokens=100)
    assert limits.ready_at(0.0, 500) <= 0
    limits.take(0.0, 10)
    limits.take(1.0, 10)

    assert limits.ready_at(2.0, 500) == 61
    limits.take(61.0, 500)
    assert limits.ready_at(62.0, 1) == 121


def test_one_larger_than_the_quota_does_not_wait_for_requests_that_took_no_tokens() -> None:
    limits = quota(requests=5, tokens=100)
    limits.take(0.0, 10)
    limits.settle(limits.take(1.0, 10), 0)

    assert limits.ready_at(2.0, 500) == 60


def test_a_request_of_unknown_size_counts_as_one_token() -> None:
    limits = quota(tokens=2)
    limits.take(0.0)
    limits.take(1.0)

    assert limits.ready_at(2.0) == 60


def test_a_request_of_unknown_size_waits_where_all_tokens_are_used() -> None:
    limits = quota(tokens=100)
    limits.take(0.0, 100)

    assert limits.ready_at(1.0) == 60


def test_what_a_request_did_not_need_is_there_for_others() -> None:
    limits = quota(tokens=100)
    ticket = limits.take(0.0, 100)

    limits.settle(ticket, 40)

    assert limits.ready_at(1.0, 60) <= 1
    assert limits.ready_at(1.0, 61) == 60


def test_what_a_request_needed_beyond_is_waited_for() -> None:
    limits = quota(tokens=100)
    ticket = limits.take(0.0, 10)

    limits.settle(ticket, 90)

    assert limits.ready_at(1.0, 11) == 60


def test_an_answer_without_tokens_is_still_a_request() -> None:
    limits = quota(requests=1, tokens=100)
    ticket = limits.take(0.0, 100)

    limits.settle(ticket, 0)

    assert limits.ready_at(1.0) == 60


def test_what_was_not_sent_is_neither() -> None:
    limits = quota(requests=1, tokens=100)
    ticket = limits.take(0.0, 100)

    limits.refund(ticket)

    assert limits.ready_at(1.0, 100) <= 1


@pytest.mark.parametrize("ending", ["refund twice", "settle refunded", "settle old", "refund old"])
def test_a_ticket_that_is_counted_no_more_changes_nothing(ending: str) -> None:
    limits = quota(requests=5, tokens=100)
    ticket = limits.take(0.0, 50)
    if "old" in ending:
        limits.take(60.0, 30)
    else:
        limits.refund(ticket)
        limits.take(60.0, 30)

    if "settle" in ending:
        limits.settle(ticket, 90)
    else:
        limits.refund(ticket)

    assert limits.ready_at(61.0, 70) <= 61
    assert limits.ready_at(61.0, 71) == 120


def test_requests_that_were_taken_too_early_are_all_waited_for() -> None:
    limits = quota(requests=2)
    for at in range(5):
        limits.take(float(at))

    assert limits.ready_at(10.0) == 63


def test_without_a_quota_all_is_ready_at_once() -> None:
    limits = quota()
    limits.take(5.0, 10**9)

    assert limits.ready_at(5.0, 10**9) <= 5


@pytest.mark.parametrize("way", ["no quota", "time", "refund", "settle"])
def test_what_no_longer_counts_is_not_remembered(way: str) -> None:
    limits = quota() if way == "no quota" else quota(tokens=100)

    for number in range(1000):
        ticket = limits.take(number * WINDOW if way == "time" else 0.0)
        if way == "refund":
            limits.refund(ticket)
        if way == "settle":
            limits.settle(ticket, 0)

    (log,) = (each for each in gc.get_referents(limits) if isinstance(each, OrderedDict))
    assert len(log) <= 1


@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "60"])
def test_a_wrong_quota_is_named(name: str, value: object) -> None:
    arguments: dict[str, object] = {"requests_per_minute": None, "tokens_per_minute": None}

    with pytest.raises(ConfigurationError, match=rf"^{name} must be .*not {value!r}"):
        Quota(**{**arguments, name: value})  # type: ignore[arg-type]
