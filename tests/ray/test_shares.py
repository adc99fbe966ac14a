"""What each of several workers may have in flight at a server."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_unified import AsyncVllmUnified, ConfigurationError

pytestmark = pytest.mark.ray


async def made(most: int, workers: int) -> dict[str, Any]:
    from vllm_unified.batch.jobs.on_ray import recipe  # imports Ray

    async with AsyncVllmUnified(api_url="http://127.0.0.1:9", max_concurrent_requests=most) as vllm:
        [endpoint] = recipe(vllm._route(None), None, workers).endpoints
        return endpoint


@pytest.mark.parametrize(("most", "workers"), [(1, 1), (4, 4), (7, 4), (256, 3)])
async def test_together_they_have_no_more_than_one_client(most: int, workers: int) -> None:
    endpoint = await made(most, workers)
    assert 1 <= endpoint["max_concurrent_requests"] * workers <= most


async def test_more_workers_than_requests_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="8 workers on Ray cannot share the 4 requests"):
        await made(4, 8)
