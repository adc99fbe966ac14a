"""Which members of a large fleet are looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_unified import AsyncVllmUnified
from vllm_unified.fleet.router import Router
from vllm_unified.wire.requests import WireRequest, generation_request

MEMBERS = 256
FEW = ["least_loaded", "power_of_two", "latency"]


@pytest.fixture
def request_() -> WireRequest:
    return generation_request({"prompt": "a", "model": "m"})


def router_of(vllm: AsyncVllmUnified, strategy: str) -> Router:
    urls = [f"http://127.0.0.1:{9000 + number}" for number in range(MEMBERS)]
    return vllm.create_load_balancer(urls, {"strategy": strategy}).fleet._router


@pytest.mark.parametrize("strategy", FEW)
async def test_few_are_enough(strategy: str, request_: WireRequest) -> None:
    async with AsyncVllmUnified() as vllm:
        router = router_of(vllm, strategy)
        seen = {each.id for _ in range(400) for each in router.free(request_, 0.0)}
        assert len(router.free(request_, 0.0)) == 16
    assert len(seen) == MEMBERS


async def test_round_robin_sees_all(request_: WireRequest) -> None:
    async with AsyncVllmUnified() as vllm:
        assert len(router_of(vllm, "round_robin").free(request_, 0.0)) == MEMBERS


@pytest.mark.parametrize("strategy", FEW)
async def test_those_with_room_are_found_among_the_full(
    strategy: str, request_: WireRequest
) -> None:
    async with AsyncVllmUnified() as vllm:
        router = router_of(vllm, strategy)
        for each in router.endpoints:
            each.in_flight = each.capacity
        roomy = router.endpoints[3], router.endpoints[200]
        for each in roomy:
            each.in_flight -= 1
        found = router.free(request_, 0.0)
        for each in router.endpoints:
            each.in_flight = 0
    assert sorted(each.id for each in found) == sorted(each.id for each in roomy)


@pytest.mark.parametrize("strategy", FEW)
async def test_the_requests_are_spread_evenly(strategy: str, request_: WireRequest) -> None:
    call: Any = SimpleNamespace(tried=(), request=request_)
    async with AsyncVllmUnified() as vllm:
        router = router_of(vllm, strategy)
        slots = [router.take(call, router.free(request_, 0.0), 0.0) for _ in range(10 * MEMBERS)]
        loads = [each.in_flight for each in router.endpoints]
        for slot in slots:
            slot.leave()
    assert sum(loads) == 10 * MEMBERS
    assert min(loads) >= 6
    assert max(loads) <= 14
