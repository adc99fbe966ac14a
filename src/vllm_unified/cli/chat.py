"""``vllm-unified chat``"""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from vllm_unified.blocking import VllmUnified
from vllm_unified.cli.generate import (
    AsJson,
    MaxTokens,
    Param,
    Temperature,
    as_dict,
    parameters,
    print_stream,
    read_text,
)
from vllm_unified.cli.target import Config, Model, Timeout, Url, target
from vllm_unified.cli.terminal import complain, err, print_json
from vllm_unified.errors import ConnectError, VllmError

_HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def chat(
    context: typer.Context,
    message: Annotated[
        str | None, typer.Argument(help="One message, for one answer; '-' reads stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    url: Url = None,
    config: Config = None,
    model: Model = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    param: Param = None,
    json: AsJson = False,
    timeout: Timeout = 120.0,
) -> None:
    """Chat: a conversation on a terminal, one answer to MESSAGE or to stdin otherwise."""
    servers = target(context, url, config)
    params = parameters(param, max_tokens=max_tokens, temperature=temperature)
    messages = [{"role": "system", "content": system}] if system else []
    talk = message is None and not json and sys.stdin.isatty() and sys.stdout.isatty()
    try:
        with servers.connect(model, timeout) as vllm:
            if talk:
                _converse(vllm, messages, params)
                return
            text = read_text(message, "a message")
            messages.append({"role": "user", "content": text})
            if json:
                result = vllm.chat(messages, **params)
                print_json({"message": result.message, **as_dict(result)})
                return
            with vllm.stream_chat(messages, **params) as stream:
                print_stream(stream.texts())
    except ConnectError as error:
        raise servers.explain_absence(error) from error


def _converse(vllm: VllmUnified, messages: list[dict[str, Any]], params: dict[str, Any]) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing and history
    served = vllm.settings.model or vllm.list_models()[0].id
    err.print(f"{served} at {_place(vllm)}. {_HELP}", style="dim", markup=False)
    start = len(messages)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            err.print()
            return
        except KeyboardInterrupt:
            err.print()
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/clear":
            del messages[start:]
        elif text.startswith("/"):
            err.print(_HELP, style="dim", markup=False)
        elif text:
            _take_turn(vllm, messages, text, params)


def _place(vllm: VllmUnified) -> str:
    endpoints = vllm.list_endpoints()
    return ", ".join(endpoint.id for endpoint in endpoints) or vllm.settings.api_url


def _take_turn(
    vllm: VllmUnified, messages: list[dict[str, Any]], text: str, params: dict[str, Any]
) -> None:
    """One question and its answer; a question without an answer is taken back."""
    messages.append({"role": "user", "content": text})
    stream = vllm.stream_chat(messages, **params)
    try:
        with stream:
            print_stream(stream.texts())
    except KeyboardInterrupt:
        err.print("(stopped)", style="dim")
    except VllmError as error:
        complain(str(error))
    if stream.text:
        messages.append({"role": "assistant", "content": stream.text})
    else:
        messages.pop()
