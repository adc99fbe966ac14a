"""``vllm-unified quantize``, with servers of a fake engine."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.servers.conftest import PACING, Fakes
from tests.servers.test_rollout import Models
from tests.support.waiting import until
from vllm_unified.servers import LocalServer, launcher, running_servers
from vllm_unified.servers.engines import Engine
from vllm_unified.servers.rollouts import quantizing
from vllm_unified.simulator.background import BackgroundSimulator

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="servers run on Linux only"
)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    monkeypatch.setattr(launcher, "PACING", PACING)
    made = Fakes(tmp_path)
    yield made
    until(lambda: not made.alive())


@pytest.fixture
def models(fakes: Fakes) -> Models:
    return Models(fakes)


async def started(fakes: Fakes) -> str:
    server = await LocalServer.start(fakes.spec(), detached=True)
    await server.stop()
    return server.url


async def ended() -> None:
    for each in running_servers():
        await (await LocalServer.attach(each.fingerprint)).end()


@pytest.fixture
def url(fakes: Fakes, models: Models) -> Iterator[str]:
    """A detached server's address."""
    yield asyncio.run(started(fakes))
    asyncio.run(ended())


def test_shows_the_steps_and_a_table(cli: Cli, models: Models, url: str) -> None:
    done = cli("quantize", "--method", "awq", "--bits", "4", "--checkpoint", models.quantized())
    assert done.code == 0, done.err
    steps = [line.split()[0] for line in done.err.splitlines()]
    assert steps == ["check", "measure", "start", "prove", "switch"]
    rows = {line.split("  ")[0]: line.split() for line in done.out.splitlines()}
    assert rows["quantization"][1:] == ["none", "awq,", "4", "bits"]
    assert rows["address"][1] == url
    assert "likeliest at 100% of the probe" in done.out
    [server] = running_servers()
    assert server.url in done.out
    assert server.detached


def test_as_json_and_off_again(cli: Cli, models: Models, url: str) -> None:
    done = cli("quantize", url, "--checkpoint", models.quantized(), "--json").json
    assert done["changed"]
    assert done["quantization"]["bits"] == 4
    again = cli("quantize", "fake", "--off", "--json").json
    assert again["quantization"]["enabled"] is False
    nothing = cli("quantize", "--off")
    assert "runs so already: none" in nothing.out


def test_a_failure_is_told_with_the_engines_words(cli: Cli, models: Models, url: str) -> None:
    done = cli("quantize", "--checkpoint", models.quantized(mode="fail"))
    assert done.code == 1
    assert "no such kernel" in done.err
    assert "serves as before" in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "awq", "--bits", "8"], "awq has 4 bits"),
        ([], "method is missing"),
        (["--off", "--bits", "4"], "--off goes with"),
        (["--make", "m", "--method", "w8a8", "--checkpoint", "/c"], "--make goes with neither"),
    ],
)
def test_wrong_usage(cli: Cli, options: list[str], words: str) -> None:
    done = cli("quantize", *options)
    assert done.code == 2
    assert words in done.err


def test_without_any_server(cli: Cli) -> None:
    done = cli("quantize", "--method", "awq")
    assert done.code == 3
    assert "vllm-unified serve" in done.err


def test_somebody_elses_server_gets_a_command(
    cli: Cli, vllm_simulator: BackgroundSimulator
) -> None:
    done = cli("quantize", vllm_simulator.url, "--method", "w8a8")
    assert done.code == 1
    assert "not run by this library" in done.err
    assert "with no quantization" in done.err
    assert "vllm-unified quantize --make " in done.err
    assert "vllm serve CHECKPOINT --served-model-name" in done.err


def test_somebody_elses_server_may_run_so_already(
    cli: Cli, vllm_simulator: BackgroundSimulator
) -> None:
    assert "runs so already: none" in cli("quantize", vllm_simulator.url, "--off").out


def test_makes_a_checkpoint_and_nothing_else(
    cli: Cli, models: Models, monkeypatch: pytest.MonkeyPatch, fakes: Fakes
) -> None:
    def made(recipe: object, engine: Engine, *_: object, **__: object) -> Path:
        assert engine.name == "cpu-0.32.0"
        return Path("/made")

    monkeypatch.setattr(quantizing, "ensure_checkpoint", made)
    done = cli("quantize", "--make", str(fakes.model), "--method", "w8a8")
    assert (done.code, done.out) == (0, "/made\n")
    assert running_servers() == []
