"""Pauses of a server that refuses even a single request."""

from __future__ import annotations

import pytest

from vllm_unified.endpoints.backoff import LONGEST, SHORTEST, Backoff


def test_nothing_waits_where_nothing_was_refused() -> None:
    backoff = Backoff()

    assert backoff.ready_at < 0
    assert not backoff.is_on


def test_each_refusal_doubles_the_pause_up_to_the_longest() -> None:
    backoff = Backoff()
    pauses = []
    for _ in range(8):
        backoff.refuse(10.0, lambda: 1.0)
        pauses.append(backoff.ready_at - 10.0)

    assert pauses[:3] == pytest.approx([SHORTEST, 2 * SHORTEST, 4 * SHORTEST])
    assert pauses[-1] == pytest.approx(LONGEST)


def test_clients_that_are_refused_together_come_back_within_half_a_pause() -> None:
    early, late = Backoff(), Backoff()
    early.refuse(0.0, lambda: 0.0)
    late.refuse(0.0, lambda: 1.0)

    assert (early.ready_at, late.ready_at) == pytest.approx((SHORTEST / 2, SHORTEST))


def test_an_answer_ends_the_pauses_and_the_next_begins_short() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.refuse(0.0, lambda: 1.0)
    backoff.end()
    ended = (backoff.is_on, backoff.ready_at < 0)
    backoff.refuse(0.0, lambda: 1.0)

    assert ended == (False, True)
    assert backoff.ready_at == pytest.approx(SHORTEST)
