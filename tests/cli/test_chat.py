"""``vllm-unified chat``: one answer for scripts, a conversation on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.support import answers
from tests.support.scripted import STALL, ScriptedServer
from tests.support.terminal import CTRL_C, CTRL_D, Terminal
from tests.support.waiting import until


def test_one_message_one_answer(cli: Cli, vllm: ScriptedServer) -> None:
    done = cli("chat", "2 + 2?", "--system", "Be brief.", "--url", vllm.url)
    assert (done.code, done.out, done.err) == (0, "Four.\n", "")
    assert vllm.requests[0].json["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
    ]


def test_the_message_from_standard_input(cli: Cli, vllm: ScriptedServer) -> None:
    assert cli("chat", "--url", vllm.url, stdin=b"2 + 2?").out == "Four.\n"
    assert vllm.requests[0].json["messages"] == [{"role": "user", "content": "2 + 2?"}]


def test_json(cli: Cli, vllm: ScriptedServer) -> None:
    done = cli("chat", "2 + 2?", "--json", "--url", vllm.url)
    assert done.json["message"] == {"role": "assistant", "content": "Four."}
    assert done.json["usage"]["total_tokens"] == 7


pty_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
Talk = Callable[..., Terminal]


@pytest.fixture
def talk(terminal: Callable[..., Terminal], vllm: ScriptedServer) -> Talk:
    """Starts a conversation, and waits for its first prompt."""

    def start(*args: str) -> Terminal:
        screen = terminal("chat", "--url", vllm.url, *args)
        screen.expect("> ")
        return screen

    return start


def asked(vllm: ScriptedServer) -> list[list[dict[str, Any]]]:
    """The messages of each question that the server got."""
    return [request.json["messages"] for request in vllm.requests if request.method == "POST"]


@pty_only
def test_a_conversation_has_a_memory(talk: Talk, vllm: ScriptedServer) -> None:
    screen = talk()
    assert "SmolLM2 at " in screen.shown
    assert "Ctrl-D leaves" in screen.shown
    screen.enter("2 + 2?\n")
    screen.expect("Four.\n> ")
    screen.enter("And 1 + 3?\n")
    screen.expect("Four.\n> ")
    screen.enter(CTRL_D)
    assert screen.wait() == 0
    assert asked(vllm)[1] == [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And 1 + 3?"},
    ]


@pty_only
def test_an_answer_appears_as_it_comes(talk: Talk, vllm: ScriptedServer) -> None:
    vllm.reply(*chat_models())
    vllm.reply(answers.sse(answers.ROLE_EVENT, answers.delta_event({"content": "One"})), STALL)
    screen = talk()
    screen.enter("Count.\n")
    screen.expect("One")  # the rest never comes


@pty_only
def test_clear_forgets_all_but_the_system_message(talk: Talk, vllm: ScriptedServer) -> None:
    screen = talk("--system", "Be brief.")
    screen.enter("2 + 2?\n")
    screen.expect("Four.\n> ")
    screen.enter("/clear\n")
    screen.expect("> ")
    screen.enter("1 + 3?\n")
    screen.expect("Four.\n> ")
    assert asked(vllm)[1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 3?"},
    ]


@pty_only
def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(
    talk: Talk, vllm: ScriptedServer
) -> None:
    vllm.reply(*chat_models())
    vllm.reply(answers.sse(answers.ROLE_EVENT, answers.delta_event({"content": "One"})), STALL)
    screen = talk()
    screen.enter("Count.\n")
    screen.expect("One")
    screen.enter(CTRL_C)
    screen.expect("(stopped)\n> ")
    screen.enter("Go on.\n")
    screen.expect("Four.\n> ")
    assert asked(vllm)[1] == [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "One"},
        {"role": "user", "content": "Go on."},
    ]
    screen.enter("/exit\n")
    assert screen.wait() == 0
    until(lambda: vllm.open_connections == 0)


@pty_only
def test_ctrl_c_at_the_prompt_only_drops_the_line(talk: Talk, vllm: ScriptedServer) -> None:
    screen = talk()
    screen.enter("never mind")
    screen.expect("never mind")
    screen.press_until(CTRL_C, "> ")
    screen.enter("2 + 2?\n")
    screen.expect("Four.\n> ")
    assert asked(vllm) == [[{"role": "user", "content": "2 + 2?"}]]


@pty_only
def test_a_question_that_fails_is_taken_back(talk: Talk, vllm: ScriptedServer) -> None:
    vllm.reply(*chat_models())
    vllm.reply(answers.error("400 Bad Request", "too many dragons"))
    screen = talk()
    screen.enter("Dragons?\n")
    screen.expect("too many dragons")
    screen.expect("> ")
    screen.enter("2 + 2?\n")
    screen.expect("Four.\n> ")
    assert asked(vllm)[1] == [{"role": "user", "content": "2 + 2?"}]


@pty_only
def test_an_unknown_command_shows_the_known_ones(talk: Talk, vllm: ScriptedServer) -> None:
    screen = talk()
    screen.enter("/help\n")
    screen.expect("/clear forgets the conversation")
    screen.expect("> ")
    assert asked(vllm) == []


def chat_models() -> list[bytes]:
    """The reply to the question which model is served, where replies are scripted."""
    return [answers.response({"object": "list", "data": [{"id": "SmolLM2"}]})]
