"""Serving until told to stop: what the command line calls."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterable

from vllm_unified.simulator.config import SimulatorConfig
from vllm_unified.simulator.faults import Fault
from vllm_unified.simulator.server import Simulator


def run(config: SimulatorConfig | None = None, *, faults: Iterable[Fault] = ()) -> int:
    """Serve until SIGINT or SIGTERM, or until a simulated engine dies; print the address.

    Args:
        config: what to serve; ``None`` for the defaults.
        faults: faults in force from the start; see ``parse_fault`` for their text form.

    Returns:
        The exit code: 0, which is also what vLLM exits with when its engine died.

    Raises:
        OSError: the address is taken.
    """
    main = _serve(config or SimulatorConfig(), list(faults))
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)
    return 0


async def _serve(config: SimulatorConfig, faults: list[Fault]) -> None:
    loop = asyncio.get_running_loop()
    async with Simulator(config) as server:
        for fault in faults:
            server.faults.add(fault)
        sys.stdout.write(f"{config.names[0]} at {server.url}\n")
        sys.stdout.flush()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, server.kill)
        await server.wait_stopped()
