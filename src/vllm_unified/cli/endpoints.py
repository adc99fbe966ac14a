"""``vllm-unified endpoints``"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_unified.cli.generate import AsJson
from vllm_unified.cli.target import Config, Url, target
from vllm_unified.cli.terminal import print_json, print_table
from vllm_unified.client import AsyncVllmUnified
from vllm_unified.endpoints.health import Health
from vllm_unified.endpoints.verdict import verdict_of
from vllm_unified.errors import ConfigurationError, ConnectError
from vllm_unified.fleet.directory import EndpointStatus
from vllm_unified.settings import check_metadata

_TITLES = ("id", "state", "running", "waiting", "in flight", "token in", "models", "last error")
_STATES = {"closed": "up", "open": "down", "half_open": "trying", "draining": "draining"}
_STYLES = {"up": "green", "down": "bold red", "trying": "yellow"}
_FRAME_SECONDS = 0.2

Looks = Mapping[str, Health]
"""What the last look at each endpoint found, by id."""


def endpoints(
    context: typer.Context,
    url: Url = None,
    config: Config = None,
    json: AsJson = False,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    interval: Annotated[
        str, typer.Option(metavar="TIME", help="From one look at a server to the next.")
    ] = "1s",
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds that a server has for a token.")
    ] = 5.0,
) -> None:
    """How servers do, proven by a generated token: a live table, until Ctrl-C.

    With --once or --json, or where output is no terminal, it looks once. The exit code is then 0
    if all are up, 1 if some are not, and 3 if none is reached.
    """
    pause = seconds(interval)
    made_of = target(context, url, config).client_config()
    vllm = AsyncVllmUnified(made_of.resources, made_of.metadata)
    console = Console(highlight=False)
    if not (once or json) and console.is_terminal and not console.is_dumb_terminal:
        asyncio.run(_watch(vllm, console, pause, timeout))
        return
    statuses, looks = asyncio.run(_look_once(vllm, timeout))
    if json:
        print_json([_with_look(status, looks[status.id]) for status in statuses])
    else:
        print_table(_TITLES, *(_row(status, looks.get(status.id)) for status in statuses))
    raise typer.Exit(_exit_code(looks.values()))


def seconds(interval: str) -> float:
    """``500ms``, or ``2``, which are seconds."""
    text = interval if interval[-1:].isalpha() else f"{interval}s"
    try:
        return float(check_metadata({"timeout": text})["timeout"])
    except ConfigurationError:
        raise ConfigurationError(
            f"--interval must be a time such as 1s or 500ms, not {interval!r}"
        ) from None


async def _look_once(
    vllm: AsyncVllmUnified, timeout: float
) -> tuple[list[EndpointStatus], dict[str, Health]]:
    async with vllm:
        ids = [status.id for status in vllm.list_endpoints()]
        looks = await asyncio.gather(*(vllm.check_endpoint(id, timeout=timeout) for id in ids))
        return vllm.list_endpoints(), dict(zip(ids, looks, strict=True))


async def _watch(vllm: AsyncVllmUnified, console: Console, interval: float, timeout: float) -> None:
    """Each server is looked at in its own time: one that hangs does not hold up the others."""
    looks: dict[str, Health] = {}

    async def follow(id: str) -> None:
        while True:
            looks[id] = await vllm.check_endpoint(id, timeout=timeout)
            await asyncio.sleep(interval)

    async with vllm, asyncio.TaskGroup() as group:
        for status in vllm.list_endpoints():
            group.create_task(follow(status.id))
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_table(vllm.list_endpoints(), looks), refresh=True)
                await asyncio.sleep(_FRAME_SECONDS)


def _table(statuses: Sequence[EndpointStatus], looks: Looks) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in _TITLES[:-2]:
        table.add_column(title, no_wrap=True)
    for title in _TITLES[-2:]:
        table.add_column(title)  # these two give way where the terminal is narrow
    for status in statuses:
        id, state, *rest = _row(status, looks.get(status.id))
        cells = [Text(text, no_wrap=True, overflow="ellipsis") for text in (id, *rest)]
        table.add_row(cells[0], Text(state, _STYLES.get(state, "dim")), *cells[1:])
    return table


def _row(status: EndpointStatus, look: Health | None) -> tuple[str, ...]:
    """A line of the table; nothing stands where nothing is known."""
    if look is not None:
        status = _with_look(status, look)
    return (
        status.id,
        _state(status, look),
        _number(status.server_running),
        _number(status.server_waiting),
        f"{status.in_flight}/{status.max_concurrent_requests}",
        "" if status.latency is None else f"{status.latency * 1000:.0f} ms",
        ", ".join(status.models or ()),
        status.error or "",
    )


def _with_look(status: EndpointStatus, look: Health) -> EndpointStatus:
    """The status, with the time and the error of the proof: this command sends nothing else."""
    error = None if look.error is None else " ".join(look.error.message.split())
    latency = look.duration if look.healthy else None
    return msgspec.structs.replace(status, latency=latency, error=error)


def _state(status: EndpointStatus, look: Health | None) -> str:
    if look is None:
        return "asking"
    if status.state == "closed" and not _is_up(look):
        return "down"  # it answers, and refuses us
    return _STATES[status.state]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _is_up(look: Health) -> bool:
    """Whether it generates; one that is busy does, for others."""
    return look.error is None or verdict_of(look.error) == "overloaded"


def _exit_code(looks: Collection[Health]) -> int:
    if all(map(_is_up, looks)):
        return 0
    return 3 if all(isinstance(look.error, ConnectError) for look in looks) else 1
