"""``vllm-unified generate``"""

from __future__ import annotations

import pytest

from tests.cli.conftest import Cli
from tests.support import answers
from tests.support.scripted import CLOSE, ScriptedServer


def test_the_text_and_nothing_else(cli: Cli, vllm: ScriptedServer) -> None:
    done = cli("generate", "2 + 2 is", "--url", vllm.url)
    assert (done.code, done.out, done.err) == (0, "Four.\n", "")
    assert vllm.requests[0].json["prompt"] == "2 + 2 is"
    assert vllm.requests[0].json["stream"] is True


@pytest.mark.parametrize("argument", [["-"], []], ids=["dash", "nothing"])
def test_the_prompt_from_standard_input(
    cli: Cli, vllm: ScriptedServer, argument: list[str]
) -> None:
    done = cli("generate", *argument, "--url", vllm.url, stdin="2 + 2 ist, ü".encode())
    assert (done.code, done.out) == (0, "Four.\n")
    assert vllm.requests[0].json["prompt"] == "2 + 2 ist, ü"


def test_the_address_from_the_environment(
    cli: Cli, vllm: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_URL", vllm.url)
    monkeypatch.setenv("VLLM_MODEL", "poet")
    assert cli("generate", "Hi").code == 0
    assert vllm.requests[0].json["model"] == "poet"


def test_json(cli: Cli, vllm: ScriptedServer) -> None:
    done = cli("generate", "2 + 2 is", "--json", "--url", vllm.url)
    assert done.json["text"] == "Four."
    assert done.json["finish_reason"] == "stop"
    assert done.json["usage"]["completion_tokens"] == 2
    assert done.json["metadata"]["endpoint"] == vllm.url


def test_parameters(cli: Cli, vllm: ScriptedServer) -> None:
    options = ["-n", "7", "-t", "0", "-p", 'stop=["a", "b"]', "-p", "seed=3", "-p", "user=me=you"]
    assert cli("generate", "Hi", "--url", vllm.url, *options).code == 0
    body = vllm.requests[0].json
    assert (body["max_tokens"], body["temperature"]) == (7, 0.0)
    assert (body["stop"], body["seed"], body["user"]) == (["a", "b"], 3, "me=you")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--param", "seed"], "--param 'seed' is not NAME=VALUE"),
        (["--param", "=3"], "--param '=3' is not NAME=VALUE"),
        (["--param", "max_tokenz=3"], "did you mean 'max_tokens'?"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--no-such-option"], "--no-such-option"),
        (["--url", "ftp://example.com"], "is not the URL of a server"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(
    cli: Cli, vllm: ScriptedServer, options: list[str], words: str
) -> None:
    done = cli("generate", "Hi", "--url", vllm.url, *options)
    assert done.code == 2
    assert done.out == ""
    assert words in done.err
    assert vllm.requests == []


@pytest.mark.parametrize(
    ("stdin", "words"), [(b" \n", "a prompt is needed"), (b"\xff\xfe", "is not UTF-8")]
)
def test_an_input_that_is_no_prompt(
    cli: Cli, vllm: ScriptedServer, stdin: bytes, words: str
) -> None:
    done = cli("generate", "--url", vllm.url, stdin=stdin)
    assert done.code == 2
    assert words in done.err
    assert vllm.requests == []


def test_a_stream_that_breaks_off_keeps_what_came(cli: Cli, vllm: ScriptedServer) -> None:
    vllm.reply(answers.sse(answers.text_event("Once upon")), CLOSE)
    done = cli("generate", "Hi", "--url", vllm.url)
    assert done.code == 1
    assert done.out == "Once upon\n"
    assert "cut" in done.err
