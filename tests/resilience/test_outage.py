"""All servers gone, and back: how much is sent in vain, and how soon all is well again."""

from __future__ import annotations

import asyncio

import pytest

from tests.resilience import outage
from tests.resilience.ledger import STEP
from tests.resilience.outage import RATE, Outage

pytestmark = pytest.mark.resilience

DOWN = 6.0
"""Seconds."""
BUDGET = 0.2
"""Retries for each request."""
FLOOR = 10
"""Retries beyond that: one a second, over the window of 10 s."""
TRIALS = 8
"""A second, at each server that is shut out: twice as many as there are on average."""
HERD = 5
"""Times the load, in the worst tenth of a second after the return."""


@pytest.fixture(scope="module")
def found() -> Outage:
    """An outage once, for all tests."""
    return asyncio.run(outage.run(DOWN))


def test_calls_fail_while_nobody_is_there(found: Outage) -> None:
    failed = [began for began, _, error in found.calls if error]

    assert len(failed) > RATE * DOWN / 2


def test_every_call_ends_once(found: Outage) -> None:
    assert len(found.calls) == found.ledger.calls
    assert (found.ledger.open_calls, found.ledger.ended_twice) == (set(), 0)


def test_retries_keep_to_their_budget(found: Outage) -> None:
    requests = sum(began < found.back_at for began, _, _ in found.calls)
    retries = found.ledger.retries_between(found.down_at, found.back_at)

    assert retries <= BUDGET * requests + FLOOR


def test_trials_at_servers_that_are_shut_out_are_spaced(found: Outage) -> None:
    assert 1 <= found.most_trials() <= TRIALS


def test_the_first_answer_comes_within_two_seconds_of_the_return(found: Outage) -> None:
    assert found.first_success < 2.0


def test_no_call_fails_that_begins_two_seconds_after_the_return(found: Outage) -> None:
    assert found.normal_after < 2.0


def test_the_return_draws_no_herd(found: Outage) -> None:
    after = found.ledger.between(found.back_at, found.back_at + 3.0)

    assert max(after) <= HERD * RATE * STEP
