"""A server that refuses everything, beside one that answers."""

from __future__ import annotations

import pytest

from tests.support.waiting import eventually
from vllm_unified import AsyncVllmUnified
from vllm_unified.simulator import Fleet

CALLS = 100


async def test_a_server_that_refuses_at_once_draws_few_of_the_requests(vllm_fleet: Fleet) -> None:
    """Its refusals are quick, so that it always has the fewest requests in flight."""
    full, other = vllm_fleet.add(), vllm_fleet.add()
    full.fail_next("busy", times=10 * CALLS)

    async with AsyncVllmUnified() as vllm:
        balancer = vllm.create_load_balancer([full.url, other.url])
        for _ in range(CALLS):
            await balancer.generate("Hello", max_tokens=1)

    assert len(other.requests) == CALLS
    assert len(full.requests) < CALLS / 4


async def test_a_server_that_has_room_again_gets_requests_again(vllm_fleet: Fleet) -> None:
    full, other = vllm_fleet.add(), vllm_fleet.add()
    full.fail_next("busy", times=2)

    async with AsyncVllmUnified() as vllm:
        balancer = vllm.create_load_balancer([full.url, other.url])
        answered_by: set[str] = set()
        while full.url not in answered_by:
            answered_by.add((await balancer.generate("Hello", max_tokens=1)).metadata.endpoint)

    await eventually(lambda: full.requests[-1].status == 200)


@pytest.mark.usefixtures("no_pauses")
async def test_who_waits_for_a_server_that_refuses_is_sent_when_its_pause_is_over(
    vllm_fleet: Fleet,
) -> None:
    server = vllm_fleet.add()
    server.fail_next("busy", times=3)

    async with AsyncVllmUnified(api_url=server.url, timeout=60, max_retries=3) as vllm:
        result = await vllm.generate("Hello", max_tokens=1)

    assert len(result.metadata.attempts) == 4
