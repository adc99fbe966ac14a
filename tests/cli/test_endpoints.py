"""``vllm-unified endpoints``"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.support.terminal import CTRL_C, Terminal
from vllm_unified import EndpointStatus
from vllm_unified.simulator import Fleet

pty_only = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
pytestmark = pytest.mark.processes

PATIENT = ("--timeout", "60")

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


def rows(table: str) -> dict[str, dict[str, str]]:
    """The cells of a table by id and title; cut where the titles begin."""
    titles, *lines = table.splitlines()
    names = "id,state,running,waiting,in flight,token in,models,last error".split(",")
    starts = [titles.index(name) for name in names]
    return {
        line.split()[0]: {
            name: line[start:end].strip()
            for name, start, end in zip(names, starts, [*starts[1:], None], strict=True)
        }
        for line in lines
    }


def states(found: list[dict[str, Any]]) -> dict[str, str]:
    return {status["id"]: status["state"] for status in found}


def test_a_row_says_how_a_server_does(cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]) -> None:
    vllm_fleet.add(model="dragon")
    done = cli("endpoints", "--config", file())
    assert (done.code, done.err) == (0, "")
    row = rows(done.out)["gpu1"]
    assert row.pop("token in").endswith(" ms")
    assert row == {
        "id": "gpu1",
        "state": "up",
        "running": "0",
        "waiting": "0",
        "in flight": "0/256",
        "models": "dragon",
        "last error": "",
    }


def test_a_server_that_is_not_there_is_down(
    cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]
) -> None:
    vllm_fleet.add()
    vllm_fleet.add().kill()
    done = cli("endpoints", "--config", file())
    assert done.code == 1
    found = rows(done.out)
    assert (found["gpu1"]["state"], found["gpu2"]["state"]) == ("up", "down")
    assert found["gpu2"]["last error"].startswith("no connection: ")
    assert found["gpu2"]["token in"] == found["gpu2"]["running"] == ""


def test_health_alone_proves_nothing(cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]) -> None:
    vllm_fleet.add().fail_next("hang")
    done = cli("endpoints", "--json", "--config", file(), "--timeout", "0.1")
    assert done.code == 1
    [status] = done.json
    assert (status["state"], status["error"]) == ("open", "no answer within 0.1 s")


def test_a_server_that_does_not_accept_the_key_is_down(
    cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]
) -> None:
    vllm_fleet.add(api_keys=("another",))
    done = cli("endpoints", "--config", file())
    assert done.code == 1
    row = rows(done.out)["gpu1"]
    assert row["state"] == "down"
    assert "does not accept the key" in row["last error"]


def test_a_server_that_is_busy_is_up(cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]) -> None:
    vllm_fleet.add().fail_next("busy")
    done = cli("endpoints", "--config", file())
    assert done.code == 0
    row = rows(done.out)["gpu1"]
    assert row["state"] == "up"
    assert "busy" in row["last error"]


def test_what_a_server_says_is_one_line(
    cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]
) -> None:
    vllm_fleet.add().fail_next("html")
    assert len(cli("endpoints", "--config", file()).out.splitlines()) == 2


def test_json_has_all_that_is_known(cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]) -> None:
    vllm_fleet.add(model="dragon")
    [status] = cli("endpoints", "--json", "--config", file()).json
    assert tuple(status) == EndpointStatus.__struct_fields__
    assert status["url"] == vllm_fleet.urls[0]
    assert (status["state"], status["models"], status["error"]) == ("closed", ["dragon"], None)
    assert status["latency"] > 0


def test_none_reached_has_an_exit_code_of_its_own(
    cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]
) -> None:
    for _ in range(2):
        vllm_fleet.add().kill()
    done = cli("endpoints", "--json", "--config", file())
    assert done.code == 3
    assert states(done.json) == {"gpu1": "open", "gpu2": "open"}


def test_reached_and_dead_is_not_unreached(
    cli: Cli, vllm_fleet: Fleet, file: Callable[[], str]
) -> None:
    vllm_fleet.add().kill()
    vllm_fleet.add().fail_next("error_500")
    assert cli("endpoints", "--json", "--config", file()).code == 1


def test_one_server_by_its_address(cli: Cli, vllm_fleet: Fleet) -> None:
    url = vllm_fleet.add().url
    done = cli("endpoints", "--json", "--url", f"{url}/v1/")
    assert (done.code, states(done.json)) == (0, {url: "closed"})


def test_without_a_word_it_is_the_server_that_other_commands_use(
    cli: Cli, vllm_fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = vllm_fleet.add().url
    monkeypatch.setattr("vllm_unified.cli.target.DEFAULT_API_URL", url)
    assert states(cli("endpoints", "--json").json) == {url: "closed"}


def test_the_key_of_the_environment_is_used(
    cli: Cli, vllm_fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "ours")
    assert cli("endpoints", "--url", vllm_fleet.add(api_keys=("ours",)).url).code == 0


@pytest.mark.parametrize("interval", ["soon", "0", "-1", "inf", "", "1 week"])
def test_an_interval_that_is_no_time_is_wrong_usage(cli: Cli, nobody: str, interval: str) -> None:
    done = cli("endpoints", "--url", nobody, f"--interval={interval}")
    assert (done.code, done.out) == (2, "")
    assert "--interval must be a time such as 1s or 500ms" in done.err


def test_the_help_names_the_exit_codes(cli: Cli) -> None:
    words = " ".join(cli("endpoints", "--help").out.split())
    assert "0 if all are up, 1 if some are not, and 3 if none is reached" in words


# On a terminal


@pytest.fixture
def watch(file: Callable[[], str]) -> Iterator[Callable[..., Terminal]]:
    """Starts the live table of the fleet, with short pauses."""
    with ExitStack() as stack:

        def start(*args: str, term: str = "xterm") -> Terminal:
            options = ("--config", file(), "--interval", "20ms", *args)
            return stack.enter_context(Terminal("endpoints", *options, term=term))

        yield start


def plain(state: str) -> str:
    """A state between the codes of its colour."""
    return f"m{state}"


@pty_only
def test_the_table_follows_a_server_down_and_up(
    vllm_fleet: Fleet, watch: Callable[..., Terminal]
) -> None:
    server = vllm_fleet.add()
    screen = watch()
    screen.expect(plain("up"))
    server.kill()
    screen.expect(plain("down"))
    server.start()
    screen.expect(plain("up"))


@pty_only
def test_a_server_that_hangs_does_not_hold_up_the_others(
    vllm_fleet: Fleet, watch: Callable[..., Terminal]
) -> None:
    vllm_fleet.add().fail_next("hang")
    vllm_fleet.add()
    screen = watch(*PATIENT)
    screen.expect(plain("up"))
    assert plain("asking") in screen.shown


@pty_only
def test_ctrl_c_leaves_the_terminal_as_it_was(
    vllm_fleet: Fleet, watch: Callable[..., Terminal]
) -> None:
    vllm_fleet.add()
    screen = watch()
    screen.expect(plain("up"))
    screen.enter(CTRL_C)
    assert screen.wait() == 130
    assert "Traceback" not in screen.shown
    assert screen.shown.rindex(SHOW_CURSOR) > screen.shown.rindex(plain("up"))


@pty_only
def test_ctrl_c_while_a_server_hangs(vllm_fleet: Fleet, watch: Callable[..., Terminal]) -> None:
    vllm_fleet.add().fail_next("hang")
    screen = watch(*PATIENT)
    screen.expect(plain("asking"))
    screen.enter(CTRL_C)
    assert screen.wait() == 130
    assert "Traceback" not in screen.shown


@pty_only
@pytest.mark.parametrize(("args", "term"), [(["--once"], "xterm"), ([], "dumb")])
def test_one_look_on_a_terminal(
    vllm_fleet: Fleet, watch: Callable[..., Terminal], args: list[str], term: str
) -> None:
    vllm_fleet.add()
    screen = watch(*args, term=term)
    assert screen.wait() == 0
    assert screen.shown.count("gpu1") == 1
