"""What several workers may have in flight at a server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ray.conftest import gauge
from tests.resilience import jobs
from tests.resilience.servers import Servers
from vllm_unified import AsyncVllmUnified, ConfigurationError, VllmUnified

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


class Peak:
    """The most that a server had at a time."""

    def __init__(self) -> None:
        self.found = 0.0


@contextmanager
def watched(url: str) -> Iterator[Peak]:
    peak, ended = Peak(), threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            now = gauge(url, "vllm:num_requests_running") + gauge(url, "vllm:num_requests_waiting")
            peak.found = max(peak.found, now)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def run(
    servers: Servers, address: str, folder: Path, *, rows: int, most: int, tokens: int = 100
) -> float:
    source = jobs.write_rows(folder / "in.jsonl", rows)
    url = servers.urls[0]
    with VllmUnified(api_url=url, max_concurrent_requests=most) as vllm, watched(url) as peak:
        summary = vllm.run_batch(
            source,
            folder / "out.jsonl",
            prompt="{n}",
            max_tokens=tokens,
            ignore_eos=True,
            ray=address,
        )
    assert summary.answered == rows
    return peak.found


def test_together_they_have_no_more_than_one_client(
    servers: Servers, address: str, tmp_path: Path
) -> None:
    assert 4 <= run(servers, address, tmp_path, rows=60, most=8) <= 8


def test_what_one_has_no_use_for_is_for_the_other(
    servers: Servers, address: str, tmp_path: Path
) -> None:
    """A block of 128 rows goes to one worker; the other has nothing to do, and says so half a
    second after it began."""
    assert 16 < run(servers, address, tmp_path, rows=128, most=32, tokens=250) <= 32


async def test_more_workers_than_requests_are_refused() -> None:
    from vllm_unified.batch.jobs.on_ray import recipe  # imports Ray

    async with AsyncVllmUnified(api_url="http://127.0.0.1:9", max_concurrent_requests=4) as vllm:
        with pytest.raises(
            ConfigurationError, match="8 workers on Ray cannot share the 4 requests"
        ):
            recipe(vllm._route(None), None, 8)
