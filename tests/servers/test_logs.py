"""What is read out of vLLM's logs; the samples are from real failing starts of vLLM 0.32.0."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_unified.servers.logs import (
    cut,
    failure_cause,
    failure_hint,
    is_port_taken,
    older,
    progress_of,
    prune,
    since,
    tail,
)

SAMPLES = Path(__file__).with_name("samples")

CAUSES = {
    "badpath": "HFValidationError: Repo id must be in the form 'repo_name'",
    "corrupt": "SafetensorError: Error while deserializing header: incomplete metadata",
    "emptydir": "ValueError: Invalid repository ID or local directory specified: '/srv/empty'.\n",
    "flag": "unrecognized arguments: --no-such-flag",
    "hugekv": "ValueError: Available memory on node 0 (8.02/9.96 GiB) on kv cache allocation is",
    "maxlen": "ValueError: User-specified max_model_len (100000) is greater than the derived",
    "nosuchquant": "ValueError: Unknown quantization method: foo. Must be one of ['awq', ",
    "port": "OSError: [Errno 98] Address already in use",
    "quant": "ValueError: Cannot find the config file for awq",
    "repo": "LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder",
}


def sample(name: str) -> str:
    return (SAMPLES / f"{name}.log").read_text()


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_the_engines_own_words(name: str) -> None:
    cause = failure_cause(sample(name))
    assert cause is not None
    assert cause.startswith(CAUSES[name])
    assert "[type=" not in cause


def test_every_sample_is_tested() -> None:
    assert {path.stem for path in SAMPLES.glob("*.log")} == CAUSES.keys()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("port", "Another program listens"),
        ("maxlen", "Lower max_model_len"),
        ("hugekv", "Lower kv_cache_gib"),
        ("repo", "HF_HUB_OFFLINE"),
        ("quant", None),
    ],
)
def test_known_causes_have_advice(name: str, advice: str | None) -> None:
    hint = failure_hint(failure_cause(sample(name)) or "")
    assert (hint is None) == (advice is None)
    assert (advice or "") in (hint or "")


def test_a_wrapper_is_better_than_nothing() -> None:
    wrapper = "RuntimeError: Engine core initialization failed. See root cause above."
    assert failure_cause(wrapper) == wrapper
    assert failure_cause("no exception here") is None
    assert failure_cause("KeyboardInterrupt: terminated") is None


def test_only_a_taken_port_is_one() -> None:
    assert is_port_taken(CAUSES["port"])
    assert not is_port_taken(CAUSES["quant"])


def test_milestones_are_progress() -> None:
    line = "(Worker pid=8108) INFO 11-22 15:30:59 [cpu_model_runner.py:68] Starting to load model"
    assert progress_of(line) == "loading the model"
    assert progress_of("INFO: Route: /health") is None


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == ""
    log.write_text("\n".join(str(number) for number in range(10000)))
    assert tail(log, 2) == "9998\n9999"


def test_a_long_log_is_cut_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    line = b"x" * 99 + b"\n"
    with log.open("ab", buffering=0) as writing:
        writing.write(line * 200_000)
        assert not cut(log)
        writing.write(line * 20_000)
        assert cut(log)
        writing.write(b"after\n")
    assert log.read_bytes() == b"after\n"
    kept = older(log).read_bytes()
    assert 4 << 20 < len(kept) <= 5 << 20
    assert set(kept.split(b"\n")) == {line.strip(), b""}
    assert older(log).stat().st_mode & 0o077 == 0
    assert since(log, 22_000_000) == "after\n"


def test_no_log_is_not_cut(tmp_path: Path) -> None:
    assert not cut(tmp_path / "server.log")
    assert since(tmp_path / "server.log", 0) == ""


def test_the_logs_of_what_runs_are_kept(tmp_path: Path) -> None:
    logs = [tmp_path / f"server-{number}.log" for number in range(6)]
    for number, log in enumerate(logs):
        log.write_text("")
        older(log).write_text("")
        os.utime(log, (number, number))
    prune(tmp_path, spare={str(logs[0])}, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        name for log in (logs[0], *logs[4:]) for name in (log.name, older(log).name)
    }
