"""``vllm-unified restart``"""

from __future__ import annotations

import asyncio

from vllm_unified.cli.stop import Where
from vllm_unified.cli.terminal import err, progress_lines
from vllm_unified.servers import LocalServer, find_server


def restart(where: Where = None) -> None:
    """End a server's vLLM and start it again; those who use it wait.

    Requests that it works on are lost. LoRA adapters that were loaded are loaded again.
    """
    asyncio.run(_restart(find_server(where).fingerprint))


async def _restart(fingerprint: str) -> None:
    async with await LocalServer.attach(fingerprint) as server:
        with progress_lines() as say:
            await server.restart(progress=say)
        err.print(f"{server.model} is served at {server.url} again", markup=False)
