"""``vllm-unified batch``"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.cli.test_endings import started
from tests.support.terminal import Terminal
from tests.support.waiting import until
from vllm_unified.simulator import BackgroundSimulator

ASK = ("--prompt", r"Q: {q}\nA:", "-n", "4")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"q": "{n}?"}}\n' for n in range(20)))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_file_is_answered(
    cli: Cli, vllm_simulator: BackgroundSimulator, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    command = ["batch", str(source), str(output), *ASK, "-t", "0", "--url", vllm_simulator.url]
    done = cli(*command)
    assert (done.code, done.out) == (0, "")
    assert f"{output}: 20 rows in" in done.err
    assert "cut off by their token limit: --max-tokens" in done.err
    assert len(rows(output)) == 20
    assert vllm_simulator.requests[0].json["temperature"] == 0
    assert b'"Q: 0?\\nA:"' in vllm_simulator.requests[0].body
    again = cli(*command, "--json")
    assert again.code == 0
    assert (again.json["rows"], again.json["resumed"]) == (20, 20)
    assert "nothing was to be done" in again.err


def test_rows_without_an_answer_make_the_exit_code(
    cli: Cli, vllm_simulator: BackgroundSimulator, source: Path, tmp_path: Path
) -> None:
    source.write_text(source.read_text() + "broken\n")
    done = cli("batch", str(source), str(tmp_path / "o.csv"), *ASK, "--url", vllm_simulator.url)
    assert done.code == 1
    assert "1 rows have no answer, 1 of them not sent" in done.err
    assert "--retry-failed" in done.err


def test_a_column_that_is_not_there(cli: Cli, source: Path, tmp_path: Path, nobody: str) -> None:
    output = str(tmp_path / "o.csv")
    done = cli("batch", str(source), output, "--prompt", "{question}", "--url", nobody)
    assert done.code == 2
    assert "'question'" in done.err
    assert "Its columns are: q." in done.err


def test_nobody_is_there(cli: Cli, source: Path, tmp_path: Path, nobody: str) -> None:
    output = str(tmp_path / "o.csv")
    command = ["batch", str(source), output, *ASK, "--url", nobody, "--patience", "0.01"]
    done = cli(*command)
    assert done.code == 3
    assert "stopped after 0 of 20 rows" in done.err
    assert "running" in done.err


def test_from_pipe_to_pipe(cli: Cli, vllm_simulator: BackgroundSimulator) -> None:
    data = b'{"q": 1}\n{"q": 2}\n'
    done = cli("batch", "-", "-", *ASK, "--url", vllm_simulator.url, stdin=data)
    assert done.code == 0
    assert [json.loads(line)["q"] for line in done.out.splitlines()] == [1, 2]
    assert cli("batch", "-", "-", "--json", stdin=data).code == 2


def test_a_schema_and_columns(
    cli: Cli, vllm_simulator: BackgroundSimulator, source: Path, tmp_path: Path
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"a": {"type": "boolean"}}}')
    output = tmp_path / "out.jsonl"
    options = ["--schema", str(schema), "--columns", "parsed=p, error", "--keep", "none"]
    cli("batch", str(source), str(output), *ASK, "-n", "40", *options, "--url", vllm_simulator.url)
    assert all(list(row) == ["p", "error"] for row in rows(output))
    assert any(isinstance(row["p"], dict) for row in rows(output))


def many(path: Path) -> Path:
    path.write_text("".join(f'{{"q": "{n}?"}}\n' for n in range(3000)))
    return path


@pytest.mark.processes
def test_ctrl_c_says_how_to_go_on(
    cli: Cli, vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    source, output = many(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    command = ("batch", str(source), str(output), *ASK, "--url", vllm_simulator.url)
    with started(*command) as process:
        until(lambda: len(vllm_simulator.requests) > 20, 20)
        vllm_simulator.hang()
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=20)
    vllm_simulator.heal()
    assert process.returncode == 130, complaints
    assert b"Traceback" not in complaints
    assert b"Stopped after " in complaints
    assert b"the same command goes on after them" in complaints
    assert not output.exists()
    done = cli(*command, "--json")
    assert done.code == 0
    assert 0 < done.json["resumed"] < 3000
    assert [row["q"] for row in rows(output)] == [f"{n}?" for n in range(3000)]


# The ledger cannot be let go of: its disk, say, is on a network that is gone.
STUCK = """
import pathlib, sys, time
from vllm_unified.batch.jobs import job
def let_go(self):
    pathlib.Path(sys.argv[3] + ".stuck").touch()
    time.sleep(60)
job._Run._let_go = let_go
from vllm_unified.cli import main
main()
"""


@pytest.mark.processes
def test_a_second_ctrl_c_ends_it_at_once_and_keeps_the_ledger(
    cli: Cli, vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    source, output = many(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    stuck, ledger = tmp_path / "out.jsonl.stuck", tmp_path / "out.jsonl.ledger-wal"
    command = ("batch", str(source), str(output), *ASK, "--url", vllm_simulator.url)
    program = [sys.executable, "-c", STUCK, *command]
    with subprocess.Popen(program, stderr=subprocess.PIPE) as process:
        until(lambda: ledger.exists() and ledger.stat().st_size > 50_000, 30)
        process.send_signal(signal.SIGINT)
        until(stuck.exists, 30)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=20)
    assert process.returncode == 130, complaints
    assert b"Traceback" not in complaints
    done = cli(*command, "--json")
    assert 0 < done.json["resumed"] < 3000
    assert [row["q"] for row in rows(output)] == [f"{n}?" for n in range(3000)]


@pytest.mark.processes
def test_a_terminal_shows_how_far_it_is(
    vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    source, output = many(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    command = ("batch", str(source), str(output), *ASK, "--url", vllm_simulator.url)
    vllm_simulator.hang()
    with Terminal(*command, term="xterm") as program:
        program.expect("0 of about 3,")
        vllm_simulator.heal()
        program.expect("rows/s")
        program.expect("tokens/s")
        program.expect("left")
        assert program.wait() == 0
    assert "3,000 rows in" in program.shown
