"""``vllm-unified quantize``"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_unified.cli.terminal import err, out, print_json, print_table, progress_lines
from vllm_unified.client import AsyncVllmUnified
from vllm_unified.errors import ConfigurationError
from vllm_unified.models.quantization import (
    QuantizationConfig,
    QuantizationResult,
    ServerFigures,
    StepProgress,
    quantization_config,
)
from vllm_unified.servers.finding import find_server
from vllm_unified.servers.rollouts.quantizing import make_checkpoint
from vllm_unified.servers.threads import in_thread


def quantize(
    where: Annotated[
        str | None,
        typer.Argument(
            help="Address, fingerprint, model or process id of a server that runs here; "
            "may be left out when there is one."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="awq, w8a8, fp8, ...")] = None,
    bits: Annotated[int | None, typer.Option(help="Of a weight.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="A folder or repository that is quantized already; else one is made."),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="A JSONL file of texts like those that you will ask for.")
    ] = None,
    in_place: Annotated[
        bool | None,
        typer.Option(
            "--in-place/--beside",
            help="End the old server before the new one starts, or after. Default: by memory.",
        ),
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None, typer.Option(help="How much worse the new server may be.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Back to the plain model.")] = False,
    make: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Only make the checkpoint of a model; print its folder."
        ),
    ] = None,
    json: Annotated[bool, typer.Option(help="Print the result as JSON.")] = False,
) -> None:
    """Change how a running server's weights are stored, without an error for its users.

    A new server is started with quantized weights, compared with the old one, and takes its place.
    """
    given = {
        "method": method,
        "bits": bits,
        "checkpoint": checkpoint,
        "calibration": calibration,
        "in_place": in_place,
        "max_perplexity_ratio": max_perplexity_ratio,
    }
    if off and (method or bits or checkpoint or make):
        raise ConfigurationError("--off goes with no method, no bits and no checkpoint")
    config = quantization_config(None, {"enabled": not off, **given})
    if make is not None:
        if where or checkpoint:
            raise ConfigurationError("--make goes with neither a server nor a checkpoint")
        asyncio.run(_make(make, config, json=json))
    else:
        asyncio.run(_quantize(_address(where), config, json=json))


def _address(where: str | None) -> str:
    if where is not None and "://" in where:
        return where  # if somebody else runs it, the error says what that one can do
    return find_server(where).url


async def _make(model: str, config: QuantizationConfig, *, json: bool) -> None:
    loop = asyncio.get_running_loop()
    with progress_lines() as say:

        def told(message: str) -> None:
            loop.call_soon_threadsafe(say, message)

        folder = await in_thread(lambda cancel: make_checkpoint(model, config, told, cancel=cancel))
    if json:
        print_json({"checkpoint": str(folder)})
    else:
        out.print(str(folder), markup=False)


async def _quantize(url: str, config: QuantizationConfig, *, json: bool) -> None:
    key = os.environ.get("VLLM_API_KEY")
    async with AsyncVllmUnified(api_url=url, api_key=key) as client:
        with _steps() as tell:
            result = await client.set_quantization(url, None, config, progress=tell)
    if json:
        print_json(result)
    else:
        _show(result)


@contextmanager
def _steps() -> Iterator[Callable[[StepProgress], None]]:
    """A line for each step that has ended; on a terminal, one below for what goes on now."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as live:
        now = live.add_task("")
        step = ""

        def tell(told: StepProgress) -> None:
            nonlocal step
            if told.done:
                line = f"{told.step:<11}{told.seconds:7.1f} s  {told.message}"
                live.console.print(line, markup=False)
                return
            if told.step != step:
                step = told.step
                live.reset(now)
            live.update(now, description=escape(f"{told.step}: {told.message}"))

        yield tell


def _show(result: QuantizationResult) -> None:
    if not result.changed:
        out.print(f"{result.url} runs so already: {_name(result.after)}", markup=False)
        return
    rows = [("", "before", "after")]
    rows += [(title, show(result.before), show(result.after)) for title, show in _ROWS]
    print_table(*rows)
    if result.agreement is not None:
        out.print(f"The same token is the likeliest at {result.agreement:.0%} of the probe.")
    out.print(f"{result.duration:.0f} s in all. Served at {result.url}", markup=False)


def _name(figures: ServerFigures) -> str:
    found: dict[str, Any] = figures.quantization
    if not found["enabled"]:
        return "none"
    return f"{found['method']}, {found['bits']} bits" if found["bits"] else str(found["method"])


def _size(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:,.0f} MB"


def _number(number: float | None) -> str:
    return "?" if number is None else f"{number:.1f}"


_ROWS: tuple[tuple[str, Callable[[ServerFigures], str]], ...] = (
    ("quantization", _name),
    ("weights", lambda figures: _size(figures.weights_bytes)),
    ("memory", lambda figures: _size(figures.memory_bytes)),
    ("tokens/s", lambda figures: _number(figures.tokens_per_second)),
    ("perplexity", lambda figures: _number(figures.perplexity)),
    ("address", lambda figures: figures.url),
)
