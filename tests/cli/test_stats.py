"""``vllm-unified stats``"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.support.terminal import CTRL_C, Terminal
from vllm_unified import ServerStatistics, VllmUnified
from vllm_unified.simulator import Fleet

pty_only = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")

pytestmark = pytest.mark.processes

_PROGRAM = "from vllm_unified.cli import main; main()"
SHOW_CURSOR = "\x1b[?25h"


@pytest.fixture
def file(tmp_path: Path, vllm_fleet: Fleet) -> Callable[[], str]:
    """Writes a file with all servers of the fleet, as gpu1, gpu2, and so on."""

    def write() -> str:
        lines = (f'gpu{number} = "{url}"' for number, url in enumerate(vllm_fleet.urls, 1))
        path = tmp_path / "fleet.toml"
        path.write_text("\n".join(["[endpoints]", *lines]))
        return str(path)

    return write


def generate(url: str, tokens: int) -> None:
    with VllmUnified(api_url=url) as vllm:
        vllm.generate("Hi", max_tokens=tokens, ignore_eos=True)


def test_once_is_all_since_the_start(cli: Cli, vllm_fleet: Fleet) -> None:
    url = vllm_fleet.add(model="dragon").url
    generate(url, 7)
    done = cli("stats", "--once", "--url", url)
    assert (done.code, done.err) == (0, "")
    titles, row = done.out.splitlines()
    assert titles.split()[:4] == ["server", "tok/s", "requests", "errors"]
    name, rate, requests, errors, running, waiting, kv, hits, *_ = row.split()
    assert name == url
    assert float(rate) > 0
    assert (requests, errors, running, waiting, kv, hits) == ("1", "0", "0", "0", "0.0%", "0.0%")
    assert row.endswith("ms")


def test_json_has_all_that_is_known(cli: Cli, vllm_fleet: Fleet) -> None:
    url = vllm_fleet.add(model="dragon").url
    generate(url, 7)
    found = cli("stats", "--once", "--json", "--url", url).json
    assert (found["model"], found["restarted"], found["unavailable"]) == ("dragon", False, {})
    assert tuple(found["statistics"]) == ServerStatistics.__struct_fields__
    assert found["statistics"]["tokens_generated"] == 7
    assert found["endpoints"] == {url: found["statistics"]}


def test_a_fleet_has_a_row_for_each_and_one_for_all(
    cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]
) -> None:
    for tokens in (3, 4):
        generate(vllm_fleet.add(model="m").url, tokens)
    done = cli("stats", "--once", "--config", file())
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == ["server", "gpu1", "gpu2", "all"]
    assert done.out.splitlines()[-1].split()[2] == "2"


def test_a_server_that_is_gone_is_shown_and_told(
    cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]
) -> None:
    vllm_fleet.add()
    vllm_fleet.add().kill()
    done = cli("stats", "--once", "--config", file())
    assert done.code == 1
    assert "gpu2: ConnectError: no connection: " in done.out


def test_none_reached_has_an_exit_code_of_its_own(
    cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]
) -> None:
    for _ in range(2):
        vllm_fleet.add().kill()
    done = cli("stats", "--once", "--json", "--config", file())
    assert done.code == 3
    assert (done.json["statistics"], done.json["endpoints"]) == (None, {})
    assert list(done.json["unavailable"]) == ["gpu1", "gpu2"]


def test_a_server_without_series_says_which_flag_it_has(cli: Cli, vllm_fleet: Fleet) -> None:
    done = cli("stats", "--once", "--url", vllm_fleet.add(disable_log_stats=True).url)
    assert done.code == 1
    assert "/metrics has none of vLLM's series" in done.out


def test_an_interval_that_is_no_time_is_wrong_usage(cli: Cli, nobody: str) -> None:
    done = cli("stats", "--url", nobody, "--interval", "soon")
    assert (done.code, done.out) == (2, "")
    assert "--interval must be a time such as 1s or 500ms" in done.err


# Until Ctrl-C


@pytest.fixture
def lines() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command where output is no terminal."""
    with ExitStack() as stack:

        def start(*args: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", _PROGRAM, "stats", *args]
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_json_is_an_object_for_each_interval(
    vllm_fleet: Fleet, lines: Callable[..., subprocess.Popen[str]]
) -> None:
    server = vllm_fleet.add(model="m")
    process = lines("--json", "--url", server.url, "--interval", "20ms")
    first, second = (json.loads(next_line(process)) for _ in range(2))
    assert first["statistics"]["throughput"] == second["statistics"]["throughput"] == 0
    assert second["time"] - first["time"] >= 0.02
    assert 0.02 <= second["interval"] < 5


def test_lines_go_on_without_the_server_and_with_it_again(
    vllm_fleet: Fleet, lines: Callable[..., subprocess.Popen[str]]
) -> None:
    server = vllm_fleet.add()
    process = lines("--url", server.url, "--interval", "20ms")
    assert f"{server.url}: tok/s 0.0, requests 0, errors 0, running 0" in next_line(process)
    server.kill()
    while "ConnectError: no connection" not in next_line(process):
        pass
    server.start()
    while "tok/s" not in next_line(process):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT for one process")
def test_an_interrupt_ends_it_quietly(
    vllm_fleet: Fleet, lines: Callable[..., subprocess.Popen[str]]
) -> None:
    process = lines("--url", vllm_fleet.add().url, "--interval", "20ms")
    next_line(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.fixture
def watch(file: Callable[[], str]) -> Iterator[Callable[..., Terminal]]:
    """Starts the live table of the fleet, with a short interval."""
    with ExitStack() as stack:

        def start(*args: str) -> Terminal:
            options = ("--config", file(), "--interval", "20ms", *args)
            return stack.enter_context(Terminal("stats", *options, term="xterm"))

        yield start


@pty_only
def test_the_table_follows_a_server_down_and_up(
    vllm_fleet: Fleet, watch: Callable[..., Terminal]
) -> None:
    server = vllm_fleet.add()
    vllm_fleet.add()
    screen = watch()
    screen.expect("all")
    server.kill()
    screen.expect("gpu1: ConnectError")
    server.start()
    screen.expect("all")


@pty_only
def test_ctrl_c_leaves_the_terminal_as_it_was(
    vllm_fleet: Fleet, watch: Callable[..., Terminal]
) -> None:
    vllm_fleet.add()
    screen = watch()
    screen.expect("0.0%")
    screen.enter(CTRL_C)
    assert screen.wait() == 130
    assert "Traceback" not in screen.shown
    assert screen.shown.rindex(SHOW_CURSOR) > screen.shown.rindex("0.0%")
