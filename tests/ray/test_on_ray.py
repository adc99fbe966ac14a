"""Jobs on a Ray cluster of two nodes: the output is that of one process, whatever dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.resilience import jobs
from tests.resilience.servers import Servers
from tests.support.waiting import until
from vllm_unified import BatchProgress, JobStoppedError, VllmUnified
from vllm_unified.errors import ConfigurationError
from vllm_unified.simulator import SimulatorConfig, Timing

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROWS = 2000
PROMPT = "Question {n}: {topic}\nAnswer:"
SLOW = Timing(inter_token_latency=0.01)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Two nodes with a CPU each, so that each gets a worker."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with Servers([SimulatorConfig(timing=SLOW, max_num_seqs=64)] * 2) as servers:
        yield servers


@pytest.fixture
def vllm(servers: Servers) -> Iterator[VllmUnified]:
    with VllmUnified({"endpoints": servers.urls}) as client:
        yield client


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.write_rows(tmp_path_factory.mktemp("rows") / "in.jsonl", ROWS)


@pytest.fixture(scope="module")
def expected(source: Path, servers: Servers) -> bytes:
    """The output of one process."""
    output = source.with_name("whole.jsonl")
    with VllmUnified({"endpoints": servers.urls}) as client:
        run(client, source, output)
    return output.read_bytes()


@pytest.fixture
def nobody() -> Iterator[str]:
    """Host and port at which nothing listens, and nothing will."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{unused.getsockname()[1]}"


def run(vllm: VllmUnified, source: Path, output: Path, **options: Any) -> Any:
    return vllm.run_batch(source, output, prompt=PROMPT, max_tokens=6, **options)


def workers() -> list[psutil.Process]:
    """Of ours, on this machine."""
    found = psutil.process_iter(["name", "cmdline"])
    return [each for each in found if "BatchWorker" in " ".join(each.info["cmdline"] or ())]


def test_the_output_is_the_same(
    vllm: VllmUnified, address: str, source: Path, expected: bytes, tmp_path: Path
) -> None:
    summary = run(vllm, source, tmp_path / "out.jsonl", ray=address)
    assert (summary.rows, summary.failed) == (ROWS, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_a_worker_that_is_killed_loses_nothing(
    vllm: VllmUnified, address: str, source: Path, expected: bytes, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill(progress: BatchProgress) -> None:
        if progress.rows > 100 and not killed:
            victim = workers()[0]
            killed.append(victim.pid)
            victim.kill()

    summary = run(vllm, source, tmp_path / "out.jsonl", ray=address, on_progress=kill)
    assert killed
    assert (summary.rows, summary.failed) == (ROWS, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_a_job_that_is_killed_goes_on(
    address: str, servers: Servers, source: Path, expected: bytes, tmp_path: Path
) -> None:
    output, config = tmp_path / "out.jsonl", tmp_path / "fleet.toml"
    lines = [f'[endpoints.s{n}]\nurl = "{url}"\n' for n, url in enumerate(servers.urls)]
    config.write_text("".join(lines))
    command = [*jobs.COMMAND, "batch", str(source), str(output), *jobs.ASK, "-c", str(config)]
    command += ["--ray", address]
    ledger = output.with_name("out.jsonl.ledger-wal")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until(lambda: ledger.exists() and ledger.stat().st_size > 200_000, 60)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert not output.exists()
    done = jobs.run(command)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.partition('"resumed": ')[2].partition(",")[0]) < ROWS
    assert output.read_bytes() == expected
    until(lambda: not workers(), 60)


def test_servers_that_are_gone_end_it(
    address: str, nobody: str, source: Path, tmp_path: Path
) -> None:
    with (
        VllmUnified(api_url=f"http://{nobody}") as client,
        pytest.raises(JobStoppedError) as raised,
    ):
        run(client, source, tmp_path / "out.jsonl", ray=address, patience=0.1)
    assert raised.value.is_transient_error
    assert list(tmp_path.iterdir()) == []


def test_no_cluster_there(vllm: VllmUnified, nobody: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no Ray cluster"):
        run(vllm, source, tmp_path / "out.jsonl", ray=nobody)
    assert os.listdir(tmp_path) == []
