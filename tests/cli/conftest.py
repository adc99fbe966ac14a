"""The command line, run in this process or on a terminal of its own."""

from __future__ import annotations

import io
import json
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.support import answers
from tests.support.scripted import Request, ScriptedServer
from tests.support.terminal import Terminal
from vllm_unified.cli import main


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, decoded."""
        return json.loads(self.out)


class Cli(Protocol):
    """Runs a command."""

    def __call__(self, *args: str, stdin: bytes = b"") -> Outcome:
        """With these arguments, and with this on standard input."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own, so that no server and no engine of this machine is seen."""
    monkeypatch.setenv("VLLM_UNIFIED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path / "cache"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The whole command, but for a process of its own."""

    def run(*args: str, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["vllm-unified", *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert "\x1b" not in out + err, "colours, and this is no terminal"
        return Outcome(code, out, err)

    return run


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Starts the command on a terminal of its own."""
    with ExitStack() as stack:
        yield lambda *args: stack.enter_context(Terminal(*args))


@pytest.fixture
def vllm(server: ScriptedServer) -> ScriptedServer:
    """A server that knows one model, and answers all questions; scripted replies come first."""

    def respond(request: Request) -> list[bytes]:
        if request.target == "/v1/models":
            card = {"id": "SmolLM2", "max_model_len": 2048, "root": "/models/a" + "b" * 90}
            adapter = {"id": "poet", "parent": "SmolLM2", "root": "/adapters/poet"}
            return [answers.response({"object": "list", "data": [card, adapter]})]
        if request.target in ("/health", "/metrics"):
            return [answers.response()]
        if request.json.get("stream"):
            is_chat = request.target.endswith("chat/completions")
            return chat_stream("Four", ".") if is_chat else answers.texts(["Four", "."])
        if request.target.endswith("chat/completions"):
            return [answers.chat("Four.")]
        return [answers.completion("Four.")]

    return server.respond(respond)


def chat_stream(*pieces: str) -> list[bytes]:
    """A chat's answer in these pieces."""
    frames = [answers.delta_event({"content": piece}) for piece in pieces]
    end = answers.delta_event({}, finish_reason="stop")
    return answers.events(answers.ROLE_EVENT, *frames, end, answers.usage_event())


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nothing listens, and nothing will."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"
