"""``vllm-unified ps``"""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import msgspec

from vllm_unified.cli.generate import AsJson
from vllm_unified.cli.terminal import err, print_json, print_table
from vllm_unified.errors import ServerError
from vllm_unified.servers import RunningServer, ServerStatus, running_servers
from vllm_unified.servers.commands import report

_TITLES = (
    *("id", "model", "address", "state", "health", "up", "restarts", "memory", "users"),
    "detached",
)


def ps(json: AsJson = False) -> None:
    """The servers that run on this machine by this library's hand."""
    servers = running_servers()
    statuses = asyncio.run(_statuses(servers))
    if json:
        print_json([_as_dict(*each) for each in zip(servers, statuses, strict=True)])
    elif servers:
        print_table(_TITLES, *(_row(*each) for each in zip(servers, statuses, strict=True)))
    else:
        err.print("No server runs here. `vllm-unified serve --detach` starts one.", style="dim")


async def _statuses(servers: list[RunningServer]) -> list[ServerStatus | None]:
    return await asyncio.gather(*(_status(server) for server in servers))


async def _status(server: RunningServer) -> ServerStatus | None:
    """``None`` where the server has just ended, or its supervisor is silent."""
    try:
        return await report(server.fingerprint)
    except ServerError:
        return None


def _row(server: RunningServer, status: ServerStatus | None) -> tuple[str, ...]:
    known = (server.fingerprint[:8], server.model, server.url)
    if status is None:
        return (*known, "no answer", "", "", str(server.restarts), "", "", _yes(server.detached))
    return (
        *known,
        status.state,
        status.health,
        duration(status.uptime),
        str(status.restarts),
        f"{status.memory / 2**30:.1f} GiB",
        str(status.holders),
        _yes(status.detached),
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _as_dict(server: RunningServer, status: ServerStatus | None) -> dict[str, Any]:
    found = {"fingerprint": server.fingerprint, "engine": server.engine}
    if status is None:
        known = {"model": server.model, "url": server.url, "pid": server.pid}
        return {**found, **known, "state": "no answer", "log_path": server.log_path}
    return {**found, **msgspec.structs.asdict(status)}


def duration(seconds: float) -> str:
    """A length of time for people, in its two largest units."""
    whole = int(seconds)
    units = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
    for (size, name), (smaller, next_name) in pairwise(units):
        if whole >= size:
            return f"{whole // size}{name} {whole % size // smaller}{next_name}"
    return f"{whole}s"
