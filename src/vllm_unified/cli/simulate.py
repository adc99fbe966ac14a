"""``vllm-unified simulate``"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from vllm_unified.errors import ConfigurationError


def simulate(
    model: Annotated[str, typer.Argument(help="The name that it serves.")] = "sim",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            "--fault",
            "-f",
            metavar="KIND[:NAME=VALUE,...]",
            help="A fault to begin with, such as 'busy:probability=0.1'; may be repeated.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Any field of SimulatorConfig, such as max_num_seqs=8 or "
            "timing.inter_token_latency=0.02; may be repeated.",
        ),
    ] = None,
) -> None:
    """Run a vLLM look-alike that fails on request: for tests, without a GPU."""
    from vllm_unified.simulator import SimulatorConfig, parse_fault, run

    fields = {"model": model, "host": host, "port": port, **_nested(option or [])}
    try:
        config = msgspec.convert(fields, SimulatorConfig, strict=False)
        faults = [parse_fault(text) for text in fault or ()]
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigurationError(str(error)) from None
    try:
        run(config, faults=faults)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error.strerror}", hint="--port 0 takes a free one."
        ) from error


def _nested(pairs: list[str]) -> dict[str, Any]:
    """``timing.jitter=0.1`` as ``{"timing": {"jitter": "0.1"}}``; values may be JSON."""
    fields: dict[str, Any] = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        if not (path and equals):
            raise ConfigurationError(f"--option {pair!r} is not NAME=VALUE")
        *outer, name = path.split(".")
        target = fields
        for part in outer:
            target = target.setdefault(part, {})
        try:
            target[name] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            target[name] = text
    return fields
