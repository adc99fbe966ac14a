"""``vllm-unified stats``"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterable
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_unified.cli.endpoints import seconds
from vllm_unified.cli.generate import AsJson
from vllm_unified.cli.target import Config, Model, Url, target
from vllm_unified.cli.terminal import out, print_json, print_table
from vllm_unified.client import AsyncVllmUnified
from vllm_unified.errors import ConnectError, VllmError
from vllm_unified.models.statistics import ModelStatistics, ServerStatistics

_TITLES = (
    *("server", "tok/s", "requests", "errors", "running", "waiting", "KV", "prefix hits"),
    *("TTFT p50", "TTFT p99", "ITL p50"),
)

_ASKING = "asking"


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What all servers said at one moment; times in seconds."""

    time: float
    """Since the Unix epoch."""
    model: str | None
    interval: float | None
    restarted: bool
    statistics: ServerStatistics | None
    """Of all that answer; ``None`` if none does."""
    endpoints: dict[str, ServerStatistics]
    unavailable: dict[str, str]


def stats(
    context: typer.Context,
    url: Url = None,
    config: Config = None,
    model: Model = None,
    json: AsJson = False,
    once: Annotated[
        bool, typer.Option("--once", help="Look once, at all since the servers started, and end.")
    ] = False,
    interval: Annotated[
        str, typer.Option(metavar="TIME", help="What is counted together, from look to look.")
    ] = "2s",
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds that a server has for an answer.")
    ] = 5.0,
) -> None:
    """What servers do, for everybody, by their own counters: a live table, until Ctrl-C.

    Lines where output is no terminal; with --json one object for each interval. With --once the
    exit code is 0 if all answer, 1 if some do not, and 3 if none is reached.
    """
    window = seconds(interval)
    made_of = target(context, url, config).client_config()
    vllm = AsyncVllmUnified(made_of.resources, made_of.metadata)
    if once:
        raise typer.Exit(asyncio.run(_look_once(vllm, model, timeout, json)))
    console = Console(highlight=False)
    if json or not console.is_terminal or console.is_dumb_terminal:
        asyncio.run(_print_lines(vllm, model, window, timeout, json))
    else:
        asyncio.run(_watch(vllm, console, model, window, timeout))


async def _look_once(vllm: AsyncVllmUnified, model: str | None, timeout: float, json: bool) -> int:
    """The exit code."""
    async with vllm:
        reading, errors = await _read(vllm, model, None, timeout)
    if json:
        print_json(reading)
    else:
        print_table(_TITLES, *_rows(reading))
        for id, reason in reading.unavailable.items():
            out.print(f"{id}: {reason}", markup=False)
    if reading.statistics is None:
        return 3 if all(isinstance(error, ConnectError) for error in errors) else 1
    return 1 if reading.unavailable else 0


async def _print_lines(
    vllm: AsyncVllmUnified, model: str | None, window: float, timeout: float, json: bool
) -> None:
    async with vllm:
        async for reading in _readings(vllm, model, window, timeout):
            if json:
                sys.stdout.write(msgspec.json.encode(reading).decode() + "\n")
            else:
                for row in _rows(reading):
                    sys.stdout.write(_line(row, reading) + "\n")
            sys.stdout.flush()


async def _watch(
    vllm: AsyncVllmUnified, console: Console, model: str | None, window: float, timeout: float
) -> None:
    async with vllm:
        asking = {status.id: _ASKING for status in vllm.list_endpoints()}
        with Live(_table(_nothing(asking)), console=console, auto_refresh=False) as live:
            live.refresh()
            async for reading in _readings(vllm, model, window, timeout):
                live.update(_table(reading), refresh=True)


async def _readings(
    vllm: AsyncVllmUnified, model: str | None, window: float, timeout: float
) -> AsyncIterator[Reading]:
    """One for each window; servers that are gone are asked no more often."""
    while True:
        began = time.monotonic()
        reading, _ = await _read(vllm, model, window, timeout)
        yield reading
        await asyncio.sleep(max(0.0, began + window - time.monotonic()))


async def _read(
    vllm: AsyncVllmUnified, model: str | None, window: float | None, timeout: float
) -> tuple[Reading, list[VllmError]]:
    """What they say; and the errors, if none says anything."""
    try:
        found = await vllm.get_model_statistics(None, model, window=window, timeout=timeout)
    except VllmError:
        # That was the first one's. All of them have to be known, and none keeps us waiting long.
        ids = [status.id for status in vllm.list_endpoints()]
        errors = {id: await _why(vllm, id, model, timeout) for id in ids}
        words = {id: _words(error) for id, error in errors.items() if error is not None}
        return _nothing(words), [error for error in errors.values() if error is not None]
    return _reading(found), []


async def _why(
    vllm: AsyncVllmUnified, id: str, model: str | None, timeout: float
) -> VllmError | None:
    try:
        await vllm.get_model_statistics(id, model, timeout=timeout)
    except VllmError as error:
        return error
    return None  # it has come back


def _reading(found: ModelStatistics) -> Reading:
    shared = {name: getattr(found, name) for name in Reading.__struct_fields__[1:]}
    return Reading(time=time.time(), **shared)


def _nothing(unavailable: dict[str, str]) -> Reading:
    return Reading(
        time=time.time(),
        model=None,
        interval=None,
        restarted=False,
        statistics=None,
        endpoints={},
        unavailable=unavailable,
    )


def _words(error: VllmError) -> str:
    return " ".join(f"{type(error).__name__}: {error.message}".split())


def _table(reading: Reading) -> Table:
    table = Table(box=None, pad_edge=False)
    if reading.interval is not None:
        table.title = Text(f"{reading.model}, in {reading.interval:.1f} s")
        table.title_justify = "left"
    for title in _TITLES:
        table.add_column(title, no_wrap=True, justify="left" if title == "server" else "right")
    for row in _rows(reading):
        table.add_row(*(Text(cell, "dim" if row[0] in reading.unavailable else "") for cell in row))
    reasons = [f"{id}: {why}" for id, why in reading.unavailable.items() if why != _ASKING]
    if reasons:
        table.caption = Text("\n".join(reasons), "red")
        table.caption_justify = "left"
    return table


def _rows(reading: Reading) -> Iterable[tuple[str, ...]]:
    """A line for each server, and one for all of several."""
    for id, found in reading.endpoints.items():
        yield _row(id, found)
    for id in reading.unavailable:
        yield (id, *[""] * (len(_TITLES) - 1))
    if len(reading.endpoints) + len(reading.unavailable) > 1 and reading.statistics is not None:
        yield _row("all", reading.statistics)


def _row(name: str, found: ServerStatistics) -> tuple[str, ...]:
    return (
        name,
        "" if found.throughput is None else f"{found.throughput:.1f}",
        str(found.requests_processed),
        str(found.errors),
        str(found.running),
        str(found.waiting),
        _percent(found.kv_cache_usage),
        _percent(found.prefix_cache_hit_rate),
        _milliseconds(found.ttft.p50),
        _milliseconds(found.ttft.p99),
        _milliseconds(found.inter_token_latency.p50),
    )


def _line(row: tuple[str, ...], reading: Reading) -> str:
    """``10:21:02 gpu1: tok/s 12.3, requests 4, ...``; what is not known is left out."""
    known = [f"{title} {cell}" for title, cell in zip(_TITLES[1:], row[1:], strict=True) if cell]
    clock = time.strftime("%H:%M:%S", time.localtime(reading.time))
    return f"{clock} {row[0]}: {reading.unavailable.get(row[0]) or ', '.join(known)}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.0f} ms"
