"""Simulators in a process of their own, so that client and servers share no event loop."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from vllm_unified.simulator import Fleet, SimulatorConfig


class Servers:
    """Simulated servers, for as long as the block runs.

    ::

        with Servers([SimulatorConfig()] * 8) as servers:
            servers.tell(0, "kill")
    """

    def __init__(self, configs: Sequence[SimulatorConfig]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, list(configs)), daemon=True)
        self._process.start()
        theirs.close()
        self.urls: list[str] = self._pipe.recv()
        """Their addresses, in the order of the configurations."""

    def tell(self, server: int, method: str, *args: Any, **options: Any) -> None:
        """Call a method of ``BackgroundSimulator`` there, and do not wait for it."""
        self._pipe.send((server, method, args, options))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, configs: Sequence[SimulatorConfig]) -> None:
    with Fleet() as fleet, contextlib.suppress(EOFError):
        for config in configs:
            fleet.add(config)
        pipe.send(fleet.urls)
        while True:
            server, method, args, options = pipe.recv()
            getattr(fleet.servers[server], method)(*args, **options)
