"""Three times as much as the servers can do: how much they do, and for whom."""

from __future__ import annotations

import asyncio

import pytest

from tests.resilience import overload
from tests.resilience.overload import OVERLOAD, Overload

pytestmark = pytest.mark.resilience

SECONDS = 16.0


@pytest.fixture(scope="module")
def found() -> Overload:
    """An overload once, for all tests."""
    return asyncio.run(overload.run(SECONDS, seed=1))


def test_it_was_an_overload(found: Overload) -> None:
    offered = sum(counts.total() for counts in found.outcomes.values()) / found.seconds

    assert offered > 0.9 * OVERLOAD * found.capacity
    assert found.outcomes["low"]["QueueFullError"] > 0
    assert len(found.latencies["low"]) > 100


def test_the_servers_do_nine_tenths_of_what_they_can(found: Overload) -> None:
    assert found.goodput >= 0.9 * found.capacity


def test_refusals_open_no_circuit(found: Overload) -> None:
    assert found.circuits_opened == 0


def test_urgent_requests_are_answered(found: Overload) -> None:
    assert found.outcomes["high"].keys() == {"answered"}


def test_urgent_requests_wait_for_a_quarter_of_the_time_of_others_at_most(
    found: Overload,
) -> None:
    assert found.p99("high") <= found.p99("low") / 4


def test_every_call_ends_once(found: Overload) -> None:
    assert (found.ledger.open_calls, found.ledger.ended_twice) == (set(), 0)
