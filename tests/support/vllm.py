"""Real servers for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vllm_unified.servers import LocalServer, ServerSpec

OWN_SERVERS = pytest.mark.xdist_group("own servers")
"""Live tests that start servers of their own, and spend their time on that. All others share some,
whose requests they count. With ``--dist loadgroup`` each kind has a worker."""


@contextmanager
def all_running(*specs: ServerSpec) -> Iterator[list[LocalServer]]:
    """Servers that start at the same time, which is sooner than one after the other."""

    async def start() -> list[LocalServer]:
        return list(await asyncio.gather(*map(LocalServer.start, specs)))

    async def stop() -> None:
        await asyncio.gather(*(server.stop() for server in servers))

    servers = asyncio.run(start())
    try:
        yield servers
    finally:
        asyncio.run(stop())


@contextmanager
def running(spec: ServerSpec) -> Iterator[LocalServer]:
    """A server for as long as the block runs. Its lease belongs to no event loop."""
    server = asyncio.run(LocalServer.start(spec))
    try:
        yield server
    finally:
        asyncio.run(server.stop())
