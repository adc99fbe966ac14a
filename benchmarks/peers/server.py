"""The server of the benchmark: the simulator's fixed answers, on many ports of one process.

    python -m benchmarks.peers.server PORTS

Prints its ports, and runs until its standard input ends. The first port has answers of 100,000
characters, all others short ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from functools import partial

import uvloop

from vllm_unified.simulator.fixed import FixedConnection, stream_answer, whole_answer

CHUNKS = 200
LONG_CHARACTERS = 100_000


class Nobody:
    """Is told of connections, and does not care."""

    def connected(self, connection: FixedConnection) -> None:
        """A connection began."""

    def disconnected(self, connection: FixedConnection) -> None:
        """A connection ended."""


async def serve(count: int) -> None:
    """Serve on so many ports until standard input ends."""
    loop = asyncio.get_running_loop()
    stream = stream_answer(CHUNKS)
    async with contextlib.AsyncExitStack() as servers:
        ports = []
        for number in range(count):
            text = " Hello" if number else "long " * (LONG_CHARACTERS // 5)
            connection = partial(FixedConnection, Nobody(), whole=whole_answer(text), stream=stream)
            server = await loop.create_server(connection, "127.0.0.1", 0, backlog=4096)
            await servers.enter_async_context(server)
            ports.append(server.sockets[0].getsockname()[1])
        print(json.dumps(ports), flush=True)
        await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
