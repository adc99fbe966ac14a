"""``vllm-unified stop``"""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from vllm_unified.cli.terminal import err, progress_lines
from vllm_unified.errors import ConfigurationError, ServerError
from vllm_unified.servers import LocalServer, RunningServer, find_server, running_servers

Where = Annotated[
    str | None,
    typer.Argument(
        metavar="[WHERE]",
        help="Address, model, process id, or the id that `ps` shows; not needed if one runs.",
        show_default=False,
    ),
]


def stop(
    where: Where = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every server of this library, whoever uses it.")
    ] = False,
) -> None:
    """End a server that runs on this machine, for all who use it."""
    if where is not None and everything:
        raise ConfigurationError("a server and --all are both given: keep one of them")
    servers = running_servers() if everything else [find_server(where)]
    if not servers:
        err.print("No server runs here.", style="dim")
        return
    asyncio.run(_stop(servers))


async def _stop(servers: list[RunningServer]) -> None:
    with progress_lines() as say:
        for server in servers:
            say(f"Stopping {server.model} at {server.url} ...")
        ends = await asyncio.gather(*map(_end, servers), return_exceptions=True)
    failures = [end for end in ends if isinstance(end, BaseException)]
    for server, end in zip(servers, ends, strict=True):
        if end is None:
            err.print(f"Stopped {server.model} at {server.url}", markup=False)
    if failures:
        raise failures[0]


async def _end(server: RunningServer) -> None:
    async with await LocalServer.attach(server.fingerprint) as attached:
        try:
            await attached.end()
        except ServerError as error:
            raise ServerError(f"{server.model} at {server.url}: {error.message}") from error
