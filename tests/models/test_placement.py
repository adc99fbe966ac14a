"""Where adapters go, and which of them give way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.models.lora.placement import (
    PATIENCE_SECONDS,
    Place,
    Replicas,
    by_preference,
    to_evict,
    to_repair,
)


def place(url: str, **known: Any) -> Place:
    return Place(url=url, **known)


def urls(places: list[Place]) -> str:
    return "".join(each.url for each in places)


@pytest.mark.parametrize(
    ("places", "order"),
    [
        ([place("a", adapters=2), place("b", adapters=1), place("c")], "cba"),
        ([place("a", requests=9), place("b", requests=1)], "ba"),
        ([place("a", adapters=1), place("b", requests=9)], "ba"),
        ([place("a", adapters=1, slots=1), place("b", adapters=3, slots=4)], "ba"),
        ([place("a"), place("b", adapters=5, version="same")], "ba"),
        ([place("a"), place("b", version="other"), place("c", version="same")], "cba"),
        ([place("a", down_for=1.0), place("b", adapters=5)], "ba"),
        ([place("a"), place("b")], "ab"),
    ],
    ids=["adapters", "requests", "adapters first", "slots", "same", "other", "down", "tie"],
)
def test_the_best_place_first(places: list[Place], order: str) -> None:
    assert urls(by_preference(places)) == order


def test_nothing_to_repair_where_all_is_well() -> None:
    places = [place("a", version="same", meant=True), place("b")]
    assert to_repair(places, 1) == []


def test_a_server_that_forgot_it_gets_it_again() -> None:
    places = [place("a", meant=True), place("b", version="same", meant=True), place("c")]
    assert [urls(each) for each in to_repair(places, 2)] == ["a"]


def test_one_that_is_gone_keeps_its_replica_for_a_while() -> None:
    for seconds, repairs in ((PATIENCE_SECONDS - 1, []), (PATIENCE_SECONDS, ["cb"])):
        gone = place("a", meant=True, down_for=seconds)
        places = [gone, place("b", adapters=1), place("c")]
        assert [urls(each) for each in to_repair(places, 1)] == repairs


def test_two_that_are_gone_go_to_two_others() -> None:
    gone = [place(url, meant=True, down_for=99.0) for url in "ab"]
    places = [*gone, place("c"), place("d"), place("e", down_for=1.0)]
    assert [urls(each) for each in to_repair(places, 2)] == ["cd", "d"]


def test_all_means_those_that_joined_too() -> None:
    places = [place("a", version="same", meant=True), place("b"), place("c", down_for=5.0)]
    assert [urls(each) for each in to_repair(places, "all")] == ["b"]


PLACES = st.builds(
    Place,
    url=st.uuids().map(str),
    version=st.sampled_from([None, "same", "other"]),
    adapters=st.integers(0, 5),
    slots=st.none() | st.integers(1, 3),
    down_for=st.sampled_from([0.0, 1.0, 100.0]),
    meant=st.booleans(),
)


@given(st.lists(PLACES, max_size=8), st.integers(1, 8) | st.just("all"))
def test_a_repair_is_where_a_server_answers_and_has_it_not(
    places: list[Place], wanted: Replicas
) -> None:
    repairs = to_repair(places, wanted)
    for candidates in repairs:
        assert candidates
        assert not any(each.down_for for each in candidates)
        assert candidates[0].version is None or not candidates[0].meant
    assert len(repairs) <= len(places)


def test_who_gives_way() -> None:
    used = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert to_evict(used, (), 4) == []
    assert to_evict(used, (), 3) == ["b"]
    assert to_evict(used, {"b"}, 3) == ["c"]
    assert to_evict(used, (), 2) == ["b", "c"]
    assert to_evict(used, {"a", "b", "c"}, 3) is None
    assert to_evict(used, {"a", "b"}, 2) is None
