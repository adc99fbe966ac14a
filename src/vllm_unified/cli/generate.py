"""``vllm-unified generate``"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import msgspec
import typer

from vllm_unified.cli.target import Config, Model, Timeout, Url, target
from vllm_unified.cli.terminal import err, print_json
from vllm_unified.errors import BadRequestError, ConnectError
from vllm_unified.results import GenerationResult

Param = Annotated[
    list[str] | None,
    typer.Option(
        "--param", "-p", metavar="NAME=VALUE", help="Any vLLM parameter; the value may be JSON."
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Tokens at most.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", min=0, help="0 takes the likeliest token.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document in place of the text.")]


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from; '-' or none reads stdin.")
    ] = None,
    url: Url = None,
    config: Config = None,
    model: Model = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    param: Param = None,
    json: AsJson = False,
    timeout: Timeout = 120.0,
) -> None:
    """Continue a text; it appears as it is generated."""
    servers = target(context, url, config)
    text = read_text(prompt, "a prompt")
    params = parameters(param, max_tokens=max_tokens, temperature=temperature)
    try:
        with servers.connect(model, timeout) as vllm:
            if json:
                print_json(as_dict(vllm.generate(text, **params)))
                return
            with vllm.stream(text, **params) as stream:
                print_stream(stream.texts())
    except ConnectError as error:
        raise servers.explain_absence(error) from error


def read_text(given: str | None, what: str) -> str:
    """The argument, or standard input."""
    if given not in (None, "-"):
        return str(given)
    if sys.stdin.isatty():
        err.print(f"Type {what}, then Ctrl-D:", style="dim")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise BadRequestError(f"standard input is not UTF-8: {error}") from None
    if not text.strip():
        raise BadRequestError(f"{what} is needed: as an argument, or on standard input")
    return text


def print_stream(pieces: Any) -> None:
    """Write text as it comes; whatever ends it, the terminal is left on a line of its own."""
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()


def parameters(pairs: list[str] | None, **known: Any) -> dict[str, Any]:
    """Request parameters from options and ``NAME=VALUE`` pairs; pairs win."""
    found = {name: value for name, value in known.items() if value is not None}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not (name and equals):
            raise BadRequestError(f"--param {pair!r} is not NAME=VALUE")
        try:
            found[name] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            found[name] = text
    return found


def as_dict(result: GenerationResult) -> dict[str, Any]:
    """A result as a script wants it."""
    return {
        "text": result.text,
        "model": result.model,
        "finish_reason": result.finish_reason,
        "usage": result.usage,
        "choices": result.choices,
        "metadata": result.metadata,
    }
