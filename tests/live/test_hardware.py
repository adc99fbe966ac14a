"""The hardware layer on a real vLLM, and a model in a process of its own that has torch."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.vllm import OWN_SERVERS
from vllm_unified.servers import ensure_bundled_model, find_engine

pytestmark = [pytest.mark.live, pytest.mark.timeout(900), OWN_SERVERS]

ROOT = Path(__file__).parents[2]


def run(scenario: str) -> dict[str, Any]:
    """What a scenario found, in the engine's interpreter, which has torch and transformers."""
    engine = find_engine("cpu")
    assert engine is not None
    ensure_bundled_model(engine)
    done = subprocess.run(
        [engine.python, "-m", "tests.live.in_process", scenario],
        capture_output=True,
        text=True,
        timeout=800,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # a library prints nothing
    print(done.stdout)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_model_in_the_process() -> None:
    found = run("answers")

    assert found["before"] == [{"SmolLM2-135M-Instruct": 8192}, "cpu", None]
    assert "Paris" in found["chats"][0]
    assert "Berlin" in found["chats"][2]
    assert found["finish"] == "stop"
    text, reason, tokens = found["plain"]
    assert (bool(text), reason, tokens) == (True, "length", 16)
    text, pieces, reason = found["stream"]
    assert "".join(pieces) == text == found["chats"][0]
    assert (len(pieces) > 4, reason) == (True, "stop")
    assert found["stopped"] == [found["chats"][0].partition("Paris")[0], "Paris"]
    assert 40 <= found["held"] <= 64
    assert found["seeded"][0] == found["seeded"][1]
    assert len(found["several"]) == 2
    assert found["ids"] == 3
    assert found["left"] == ["cancelled", 1]
    assert found["errors"] == [
        "UnsupportedError",
        "ContextLengthError",
        "BadRequestError",
        "UnsupportedError",
        "BackendError",
    ]


def test_a_server_that_is_killed_in_the_middle_of_100_requests() -> None:
    found = run("failover")

    assert found["first"] == "local-vllm"
    assert set(found["guide"]) == {"client", "fleet", "transformers"}
    assert all(found["guide"].values())
    planned, real = found["plan"]["kv_cache_tokens"]
    assert real == pytest.approx(planned, rel=0.1)
    planned, real = found["plan"]["weights_bytes"]
    assert real == pytest.approx(planned, rel=0.1)

    assert sum(found["answered"].values()) == 100
    assert found["answered"]["transformers"] > 0
    assert found["killed_after"]["local-vllm"] == 30
    assert found["again"] == ["local-vllm"]
    succeeded, failed, failovers = found["statistics"]
    assert (succeeded >= 111, failed, failovers > 0) == (True, 0, True)
    assert found["starts"] == 1  # its supervisor started it again
