"""Jobs on a Ray cluster of two nodes: the output is that of one process, whatever dies."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.ray.conftest import processes
from tests.resilience import jobs
from tests.resilience.servers import Servers
from tests.support.waiting import until
from vllm_unified import BatchProgress, JobStoppedError, VllmUnified
from vllm_unified.errors import ConfigurationError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROWS = 2000
PROMPT = "Question {n}: {topic}\nAnswer:"
WORKER = "BatchWorker"


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


def run(vllm: VllmUnified, source: Path, output: Path, **options: Any) -> Any:
    return vllm.run_batch(source, output, prompt=PROMPT, max_tokens=6, **options)


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
            victim = processes(WORKER)[0]
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
    until(lambda: not processes(WORKER), 60)


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
