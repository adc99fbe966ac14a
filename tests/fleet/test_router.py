"""Which members of a fleet are looked at, and how many of a large one."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_unified import AsyncVllmUnified
from vllm_unified.endpoints.endpoint import Endpoint, Slot
from vllm_unified.fleet.policies import STRATEGIES
from vllm_unified.fleet.router import Router
from vllm_unified.wire.requests import generation_request

MEMBERS = 256
PROMPT = "Tell me a story. " * 400

all_strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def router_of(vllm: AsyncVllmUnified, strategy: str, members: int = MEMBERS) -> Router:
    urls = [f"http://127.0.0.1:{9000 + number}" for number in range(members)]
    return vllm.create_load_balancer(urls, {"strategy": strategy}).fleet._router


def call(session: int = 0, **fields: Any) -> Any:
    request = generation_request(
        {"prompt": PROMPT, "model": "m", "session_id": str(session), **fields}
    )
    return SimpleNamespace(tried=set(), request=request, endpoint=None)


def fill(*endpoints: Endpoint) -> None:
    for each in endpoints:
        each.in_flight = each.capacity


def take(router: Router, asking: Any, now: float = 0.0) -> Slot:
    slot = router.take(asking, now)
    assert slot is not None
    return slot


class Looks:
    """An attribute of endpoints, and how often it was read."""

    def __init__(self) -> None:
        self.count = 0

    def __get__(self, endpoint: Endpoint | None, kind: object = None) -> Any:
        if endpoint is None:
            return self
        self.count += 1
        return endpoint.__dict__["in_flight"]

    def __set__(self, endpoint: Endpoint, value: int) -> None:
        endpoint.__dict__["in_flight"] = value


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """At ``in_flight``, which nothing that is asked of an endpoint can do without."""
    looks = Looks()
    monkeypatch.setattr(Endpoint, "in_flight", looks, raising=False)
    return looks


def looks_at_each(router: Router, looks: Looks, requests: int = 1024) -> float:
    """A request, when all servers are busy with some."""
    slots = [take(router, call(number)) for number in range(6 * len(router.endpoints))]
    looks.count = 0
    for number in range(requests):
        slots.append(take(router, call(number)))
        slots.pop(0).leave()
    mean = looks.count / requests
    for slot in slots:
        slot.leave()
    return mean


@all_strategies
async def test_in_a_large_fleet_no_more_members_are_looked_at(strategy: str, looks: Looks) -> None:
    async with AsyncVllmUnified() as vllm:
        few = looks_at_each(router_of(vllm, strategy, 16), looks)
        many = looks_at_each(router_of(vllm, strategy, 256), looks)
    assert many < 1.2 * few + 10
    assert many < 80


@all_strategies
async def test_one_that_is_not_plain_costs_only_itself(strategy: str, looks: Looks) -> None:
    async with AsyncVllmUnified() as vllm:
        router = router_of(vllm, strategy)
        before = looks_at_each(router, looks)
        router.endpoints[7].lacks("another", 0.0)
        router.endpoints[8].drain()
        after = looks_at_each(router, looks)
    assert after < 1.2 * before + 10


@all_strategies
async def test_of_a_large_fleet_all_get_requests(strategy: str) -> None:
    async with AsyncVllmUnified() as vllm:
        router = router_of(vllm, strategy)
        seen = set()
        for session in range(12 * MEMBERS):
            slot = take(router, call(session, prompt=f"{session}"))
            seen.add(slot.endpoint.id)
            slot.leave()
    assert len(seen) > 0.95 * MEMBERS


@all_strategies
async def test_one_with_room_is_found_among_the_full(strategy: str) -> None:
    async with AsyncVllmUnified() as vllm:
        router = router_of(vllm, strategy)
        fill(*router.endpoints)
        roomy = router.endpoints[3], router.endpoints[200]
        for each in roomy:
            each.in_flight -= 1
        found = [take(router, call()).endpoint for _ in roomy]
        assert router.take(call(), 0.0) is None
        for each in router.endpoints:
            each.in_flight = 0
    assert {each.id for each in found} == {each.id for each in roomy}


@all_strategies
async def test_the_only_one_with_room_is_found_without_a_look_at_the_others(
    strategy: str, looks: Looks
) -> None:
    async with AsyncVllmUnified() as vllm:
        router = router_of(vllm, strategy)
        fill(*router.endpoints)
        found, seen = [], []
        for place in (3, 200, 77):
            roomy = router.endpoints[place]
            roomy.in_flight -= 1
            looks.count = 0
            slot = router.take(call(), 0.0, roomy)
            seen.append(looks.count)
            assert slot is not None
            found.append(slot.endpoint is roomy)
        for each in router.endpoints:
            each.in_flight = 0
    assert found == [True] * 3
    assert max(seen) < 10


@pytest.mark.parametrize(
    ("strategy", "fewest"), [("least_loaded", 6), ("power_of_two", 2), ("latency", 6)]
)
async def test_the_requests_are_spread_evenly(strategy: str, fewest: int) -> None:
    random.seed(1)
    async with AsyncVllmUnified() as vllm:
        router = router_of(vllm, strategy)
        slots = [take(router, call()) for _ in range(10 * MEMBERS)]
        loads = [each.in_flight for each in router.endpoints]
        for slot in slots:
            slot.leave()
    assert sum(loads) == 10 * MEMBERS
    assert min(loads) >= fewest
    assert max(loads) <= 14


@all_strategies
async def test_a_model_that_is_known_nowhere_is_asked_for_anywhere(strategy: str) -> None:
    async with AsyncVllmUnified() as vllm:
        router = router_of(vllm, strategy)
        for each in router.endpoints:
            each.models = {"another": None}
        drained = router.endpoints[0].id
        router.endpoints[0].drain()
        seen = set()
        for number in range(100):
            slot = take(router, call(number, prompt=str(number)))
            seen.add(slot.endpoint.id)
            slot.leave()
    assert len(seen) > 30
    assert drained not in seen


@all_strategies
async def test_a_call_goes_where_it_has_not_failed_if_there_is_room(strategy: str) -> None:
    async with AsyncVllmUnified() as vllm:
        router = router_of(vllm, strategy, 20)
        asking = call()
        asking.tried = {each.id for each in router.endpoints[:-1]}
        first, second = take(router, asking), take(router, asking)
        last = router.endpoints[-1]
        fill(last)
        third = take(router, asking)
        last.in_flight = 2
        for slot in (first, second, third):
            slot.leave()
    assert first.endpoint is second.endpoint is last
    assert third.endpoint is not last
