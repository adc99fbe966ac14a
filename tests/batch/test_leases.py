"""How clients share what a server takes: pure, with a clock of the tests'."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.batch.jobs.leases import EXPECTED_SECONDS, SILENT_SECONDS, Leases, shares


def settle(leases: Leases, wanted: dict[str, int], *, now: float) -> dict[str, int]:
    """Leases after everybody has reported often enough, using up what they have."""
    found = dict.fromkeys(wanted, 0)
    for round in range(6):
        for name, want in wanted.items():
            in_flight = min(found[name], want)
            at = now + round / 10
            found[name] = leases.report(name, in_flight=in_flight, wanted=want, now=at)
    return found


def test_everybody_gets_the_same() -> None:
    leases = Leases(100, clients=2, now=0)
    assert settle(leases, {"a": 1000, "b": 1000}, now=0) == {"a": 50, "b": 50}


def test_what_one_does_not_want_is_for_the_others() -> None:
    leases = Leases(100, clients=3, now=0)
    assert settle(leases, {"a": 1000, "b": 10, "c": 1}, now=0) == {"a": 89, "b": 10, "c": 1}


def test_nothing_is_lost_by_rounding() -> None:
    leases = Leases(7, clients=4, now=0)
    wanted = dict.fromkeys("abcd", 100)
    assert sorted(settle(leases, wanted, now=0).values()) == [1, 2, 2, 2]


def test_a_share_is_kept_for_who_has_not_come() -> None:
    leases = Leases(100, clients=2, now=0)
    assert leases.report("a", in_flight=0, wanted=1000, now=0) == 50
    assert leases.report("a", in_flight=50, wanted=1000, now=EXPECTED_SECONDS) == 99


def test_a_lease_grows_only_when_the_other_has_confirmed_a_smaller_one() -> None:
    leases = Leases(100, clients=1, now=0)
    assert leases.report("a", in_flight=0, wanted=1000, now=0) == 100
    assert leases.report("b", in_flight=0, wanted=1000, now=1) == 1
    assert leases.report("a", in_flight=99, wanted=1000, now=2) == 50
    assert leases.report("b", in_flight=1, wanted=1000, now=3) == 1
    assert leases.report("a", in_flight=80, wanted=1000, now=4) == 50
    assert leases.report("b", in_flight=1, wanted=1000, now=5) == 20
    assert leases.report("a", in_flight=50, wanted=1000, now=6) == 50
    assert leases.report("b", in_flight=1, wanted=1000, now=7) == 50


def test_what_a_dead_client_had_is_free() -> None:
    leases = Leases(100, clients=2, now=0)
    settle(leases, {"a": 1000, "b": 1000}, now=EXPECTED_SECONDS)
    at = EXPECTED_SECONDS + SILENT_SECONDS + 1
    assert leases.report("a", in_flight=50, wanted=1000, now=at) == 99


@pytest.mark.parametrize("clients", [0, 5])
def test_too_many_clients(clients: int) -> None:
    with pytest.raises(ValueError, match="cannot share 4 requests"):
        Leases(4, clients=clients, now=0)


NAMES = "abcd"


@given(
    most=st.integers(4, 60),
    events=st.lists(
        st.tuples(st.sampled_from(NAMES), st.integers(0, 100), st.integers(0, 99)), max_size=60
    ),
)
def test_together_they_never_have_more(most: int, events: list[tuple[str, int, int]]) -> None:
    """Each may use up its lease at any moment, and what is in flight ends when it likes."""
    leases = Leases(most, clients=len(NAMES), now=0)
    lease, in_flight = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0)
    for number, (name, wanted, ended) in enumerate(events):
        in_flight[name] = max(in_flight[name], lease[name])  # all that it may
        assert sum(in_flight.values()) <= most
        reported = in_flight[name] * ended // 100
        told = leases.report(name, in_flight=reported, wanted=wanted, now=number / 1000)
        # Between the report and the answer it used up its old lease.
        in_flight[name] = max(reported, lease[name]) if ended < 50 else reported
        lease[name] = told
        assert told >= 1


@given(st.integers(0, 200), st.dictionaries(st.text(max_size=3), st.integers(0, 100), max_size=8))
def test_shares_are_all_there_is_or_all_that_is_wanted(most: int, wanted: dict[str, int]) -> None:
    found = shares(most, wanted)
    assert sum(found.values()) == min(most, sum(wanted.values()))
    assert all(found[name] <= wanted[name] for name in wanted)
    short = [found[name] for name in wanted if found[name] < wanted[name]]
    assert not short or max(short) - min(short) <= 1
    assert not short or max(found.values()) <= max(short)
