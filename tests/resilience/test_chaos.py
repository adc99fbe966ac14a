"""What callers notice while servers fail at random; :mod:`chaos` says what is compressed how."""

from __future__ import annotations

import asyncio

import pytest

from tests.resilience import chaos
from tests.resilience.chaos import SERVERS, SPELLS, STROKES, Chaos

pytestmark = pytest.mark.resilience

SECONDS = 20.0
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def found() -> Chaos:
    """Chaos once, for all tests."""
    return asyncio.run(chaos.run(SECONDS, seed=1))


def test_it_was_chaos(found: Chaos) -> None:
    assert found.faults.keys() == {*SPELLS, *STROKES}
    assert found.most_down == SERVERS // 2
    assert found.ledger.attempts > found.ledger.calls > 1000


def test_no_request_is_lost(found: Chaos) -> None:
    assert not found.ledger.open_calls
    assert found.answered + found.errors.total() == found.ledger.calls


def test_no_request_ends_twice(found: Chaos) -> None:
    assert found.ledger.ended_twice == 0


def test_every_text_is_that_of_a_server_that_never_fails(found: Chaos) -> None:
    assert found.wrong == []


def test_of_a_thousand_requests_one_fails_at_most(found: Chaos) -> None:
    assert found.success >= 0.999, found.errors


def test_ten_requests_make_twelve_attempts_at_most(found: Chaos) -> None:
    assert found.amplification <= 1.2


def test_no_slot_is_held_and_nobody_waits_at_the_end(found: Chaos) -> None:
    assert (found.in_flight, found.waiting) == (0, 0)


def test_no_connection_is_open_at_the_end(found: Chaos) -> None:
    assert found.connections == 0


def test_memory_grows_by_less_than_eight_megabytes_in_the_second_half(found: Chaos) -> None:
    half = found.memory[len(found.memory) // 2]

    assert found.memory[-1] - half < 8 * MEGABYTE
