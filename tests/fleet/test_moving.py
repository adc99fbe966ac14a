"""A server that moves to another address: who sends there, who waits, and what keeps its place."""

from __future__ import annotations

import asyncio

from tests.support.waiting import eventually
from vllm_unified import AsyncVllmUnified
from vllm_unified.endpoints.stats import EndpointStats
from vllm_unified.errors import EngineDeadError
from vllm_unified.simulator.background import Fleet


def client_of(url: str) -> AsyncVllmUnified:
    return AsyncVllmUnified(api_url=url, timeout=30, max_retries=0)


async def ask(client: AsyncVllmUnified, where: str | None = None) -> str:
    """The address that answered."""
    answer = await client.make_request(where, "hello", max_tokens=1)
    return answer.metadata.endpoint


async def test_both_addresses_mean_the_new_one(vllm_fleet: Fleet) -> None:
    server, new = vllm_fleet.add(), vllm_fleet.add()
    old = server.url
    async with client_of(old) as client:
        assert await ask(client) == old
        client._directory.move(old, new.url)
        server.stop()
        assert await ask(client) == await ask(client, old) == await ask(client, new.url)
        stats = client.get_stats(new.url)
        assert isinstance(stats, EndpointStats)
        assert stats.success == 4
        assert stats == client.get_stats(old)


async def test_it_may_move_again_and_back(vllm_fleet: Fleet) -> None:
    one, two, three = vllm_fleet.add(), vllm_fleet.add(), vllm_fleet.add()
    async with client_of(one.url) as client:
        await ask(client)
        for source, target in ((one, two), (two, three), (three, one)):
            client._directory.move(source.url, target.url)
            found = {await ask(client, each.url) for each in (one, source, target)}
            assert found == {target.url}


async def test_requests_wait_while_it_is_held(vllm_fleet: Fleet) -> None:
    old, new = vllm_fleet.add(), vllm_fleet.add()
    async with client_of(old.url) as client:
        await ask(client)
        client._directory.hold(old.url)
        waiting = [asyncio.create_task(ask(client, old.url)) for _ in range(5)]
        fleet = client._directory.route(old.url)
        await eventually(lambda: fleet.waiting == 5)
        client._directory.move(old.url, new.url)
        assert set(await asyncio.gather(*waiting)) == {new.url}


async def test_they_wait_also_when_it_is_found_dead_meanwhile(vllm_fleet: Fleet) -> None:
    server = vllm_fleet.add()
    async with client_of(server.url) as client:
        await ask(client)
        [endpoint] = client._directory.endpoints
        client._directory.hold(server.url)
        endpoint.shut_out(EngineDeadError("no token"))
        waiting = asyncio.create_task(ask(client))
        fleet = client._directory.route(None)
        await eventually(lambda: fleet.waiting == 1)
        client._directory.move(server.url, server.url)
        assert await waiting == server.url


async def test_what_is_held_may_stay_where_it_is(vllm_fleet: Fleet) -> None:
    server = vllm_fleet.add()
    async with client_of(server.url) as client:
        await ask(client)
        client._directory.hold(server.url)
        waiting = asyncio.create_task(ask(client))
        client._directory.move(server.url, server.url)
        assert await waiting == server.url


async def test_a_stream_ends_where_it_began(vllm_fleet: Fleet) -> None:
    old, new = vllm_fleet.add(), vllm_fleet.add()
    async with client_of(old.url) as client:
        async with client.stream("hello", max_tokens=20) as stream:
            await anext(stream)
            client._directory.move(old.url, new.url)
            rest = [chunk.text async for chunk in stream]
        assert len(rest) > 1
        assert len(stream.result.metadata.attempts) == 1
        assert not stream.result.metadata.continuations
        assert await ask(client) == new.url


async def test_a_shut_out_server_is_trusted_anew_at_its_new_address(vllm_fleet: Fleet) -> None:
    old, new = vllm_fleet.add(), vllm_fleet.add()
    async with client_of(old.url) as client:
        await ask(client)
        [endpoint] = client._directory.endpoints
        endpoint.breaker.trip(0.0)
        client._directory.move(old.url, new.url)
        assert endpoint.state == "closed"
        assert await ask(client) == new.url
