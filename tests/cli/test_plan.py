"""``plan``, and the machine in ``doctor --json``."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.cli.conftest import Cli
from tests.hardware import configs


def folder(tmp_path: Path, config: object) -> str:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    return str(tmp_path)


def test_plan_shows_the_arithmetic_and_the_command(cli: Cli, tmp_path: Path) -> None:
    model = folder(tmp_path, configs.LLAMA_70B)
    done = cli("plan", model, "--gpus", "8")
    assert done.code == 0
    assert "= 70,553,706,496" in done.out
    last = done.out.splitlines()[-1].strip()
    assert last.startswith(f"vllm-unified serve {model} --dtype bfloat16")
    assert "--tensor-parallel-size 4" in last


def test_plan_that_does_not_fit(cli: Cli, tmp_path: Path) -> None:
    done = cli("plan", folder(tmp_path, configs.LLAMA_70B), "--gpus", "1", "--gpu-memory", "24")
    assert done.code == 1
    assert "it does not fit: each GPU needs" in done.out


def test_plan_as_json(cli: Cli) -> None:
    found = cli("plan", "bundled", "--gpus", "1", "--json").json
    assert (found["fits"], found["parameters"], found["device"]) == (True, 134_515_008, "cuda")


def test_plan_of_a_model_that_is_not_here(cli: Cli) -> None:
    done = cli("plan", "nobody/nothing")
    assert done.code == 2
    assert "no config.json of 'nobody/nothing'" in done.err


def test_doctor_has_the_whole_machine(cli: Cli, nobody: str) -> None:
    findings = {each["name"]: each for each in cli("doctor", "--json", "--url", nobody).json}
    machine = findings["system"]["details"]
    assert machine["cpus"] >= machine["cores"] >= 1
    assert machine["memory_total"] >= machine["memory_available"] > 0
