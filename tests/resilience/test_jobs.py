"""Jobs with files that are ended in every way: every row once, in order, to the byte."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.resilience import jobs
from tests.resilience.servers import Servers
from vllm_unified.simulator import BackgroundSimulator, SimulatorConfig

pytestmark = [pytest.mark.resilience, pytest.mark.timeout(300)]

ROWS = 1500
SEED = 6


@pytest.mark.parametrize("more", [(), ("--unordered",)], ids=["ordered", "unordered"])
def test_killed_at_random_moments(
    vllm_simulator: BackgroundSimulator, tmp_path: Path, more: tuple[str, ...]
) -> None:
    report = jobs.ended(
        tmp_path,
        [vllm_simulator.url],
        rows=ROWS,
        times=3,
        how=signal.SIGKILL,
        seed=SEED,
        more=more,
    )
    assert report.codes == (-signal.SIGKILL,)
    assert report.endings == 3
    assert report.wrong == 0


def test_interrupted_at_random_moments(vllm_simulator: BackgroundSimulator, tmp_path: Path) -> None:
    report = jobs.ended(
        tmp_path, [vllm_simulator.url], rows=ROWS, times=2, how=signal.SIGINT, seed=SEED
    )
    assert report.endings == 2
    assert report.wrong == 0


@pytest.mark.parametrize("more", [(), ("--unordered",)], ids=["ordered", "unordered"])
def test_where_files_may_not_grow(
    vllm_simulator: BackgroundSimulator, tmp_path: Path, more: tuple[str, ...]
) -> None:
    right, complaints = jobs.disk_full(
        tmp_path, [vllm_simulator.url], rows=ROWS, limits=[60_000, 150_000], more=more
    )
    for complaint in complaints:
        assert "stopped after" in complaint
        assert f"{tmp_path / 'out.jsonl'}" in complaint
        assert "the size of files" in complaint or "may not grow" in complaint
    assert right


def test_servers_that_die_under_it(tmp_path: Path) -> None:
    with Servers([SimulatorConfig()] * 2) as servers:
        right, deaths = jobs.servers_dying(tmp_path, servers, rows=ROWS, times=6, seed=SEED)
    assert deaths > 0
    assert right
