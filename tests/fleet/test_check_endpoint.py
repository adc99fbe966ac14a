"""One look at one endpoint, and what the client makes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.clients import KINDS, make_client
from vllm_unified import AsyncVllmUnified, ConfigurationError, ConnectError, EndpointStatus
from vllm_unified.simulator import BackgroundSimulator


@pytest.fixture(params=KINDS)
async def client(
    request: pytest.FixtureRequest, vllm_simulator: BackgroundSimulator
) -> AsyncIterator[AsyncVllmUnified]:
    resources = {"endpoints": {"gpu1": vllm_simulator.url}}
    async with make_client(request.param, resources=resources) as client:
        yield client


async def status(client: Any) -> EndpointStatus:
    found = client.list_endpoints()
    (only,) = found if isinstance(found, list) else await found
    assert isinstance(only, EndpointStatus)
    return only


async def test_a_server_that_generates_says_what_it_serves_and_how_loaded_it_is(
    client: AsyncVllmUnified,
) -> None:
    assert (await client.check_endpoint("gpu1")).proven
    found = await status(client)
    assert (found.models, found.server_running, found.server_waiting) == (("sim",), 0, 0)


async def test_a_server_that_fails_is_shut_out(
    client: AsyncVllmUnified, vllm_simulator: BackgroundSimulator
) -> None:
    vllm_simulator.kill()
    health = await client.check_endpoint("gpu1")
    assert isinstance(health.error, ConnectError)
    assert (await status(client)).state == "open"


async def test_a_server_that_generates_again_is_let_in(
    client: AsyncVllmUnified, vllm_simulator: BackgroundSimulator
) -> None:
    vllm_simulator.fail_next("error_500")
    assert not await client.check_endpoint("gpu1")
    assert await client.check_endpoint("gpu1")
    assert (await status(client)).state == "closed"


async def test_it_is_counted_in_no_statistics(client: AsyncVllmUnified) -> None:
    await client.check_endpoint("gpu1")
    assert (await status(client)).stats.attempts == 0


async def test_what_is_neither_an_id_nor_an_address(client: AsyncVllmUnified) -> None:
    with pytest.raises(ConfigurationError, match="gpu9"):
        await client.check_endpoint("gpu9")
