"""Simulators on an event loop of their own, in a thread: for tests that have none, or block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from vllm_unified.simulator.config import SimulatorConfig
from vllm_unified.simulator.faults import FaultKind, FaultPlan
from vllm_unified.simulator.server import Recorded, Simulator

T = TypeVar("T")


class Loop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vllm-simulator", daemon=True
        )
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Stop the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BackgroundSimulator:
    """A :class:`Simulator` whose every method may be called from any thread, without ``await``."""

    def __init__(self, loop: Loop, config: SimulatorConfig | None = None, **options: Any) -> None:
        self._loop = loop
        self._simulator = loop.call(_make(config, options))
        self.faults: FaultPlan = self._simulator.faults
        """Faults in force."""
        self.requests: list[Recorded] = self._simulator.requests
        """What arrived, in order."""

    def __repr__(self) -> str:
        return repr(self._simulator)

    @property
    def config(self) -> SimulatorConfig:
        """What it is."""
        return self._simulator.config

    @property
    def url(self) -> str:
        """Address, without a trailing slash."""
        return self._simulator.url

    @property
    def running(self) -> bool:
        """Whether connections are accepted."""
        return self._simulator.running

    def fail_next(self, kind: FaultKind, times: int = 1, **options: Any) -> None:
        """As :meth:`Simulator.fail_next`."""
        self._simulator.fail_next(kind, times, **options)

    def start(self) -> None:
        """Listen, after :meth:`refuse` or :meth:`kill`."""
        self._loop.call(self._simulator.start())

    def stop(self) -> None:
        """Close everything and give the port back."""
        self._loop.call(self._simulator.stop())

    def restart(self, downtime: float = 0.0) -> None:
        """As :meth:`Simulator.restart`, with ``downtime`` in seconds."""
        self._loop.call(self._simulator.restart(downtime))

    def kill(self) -> None:
        """As :meth:`Simulator.kill`."""
        self._loop.call(_call(self._simulator.kill))

    def refuse(self) -> None:
        """As :meth:`Simulator.refuse`."""
        self._loop.call(_call(self._simulator.refuse))

    def hang(self) -> None:
        """As :meth:`Simulator.hang`."""
        self._loop.call(_call(self._simulator.hang))

    def slow_down(self, factor: float = 10.0) -> None:
        """As :meth:`Simulator.slow_down`."""
        self._loop.call(_call(lambda: self._simulator.slow_down(factor)))

    def kill_engine(self) -> None:
        """As :meth:`Simulator.kill_engine`."""
        self._loop.call(_call(self._simulator.kill_engine))

    def heal(self) -> None:
        """As :meth:`Simulator.heal`."""
        self._loop.call(_call(self._simulator.heal))


class Fleet:
    """Several simulators in one thread, all stopped together.

    Example::

        with Fleet() as fleet:
            servers = [fleet.add(model="sim") for _ in range(3)]
    """

    def __init__(self) -> None:
        self._loop: Loop | None = None
        self.servers: list[BackgroundSimulator] = []

    def __iter__(self) -> Iterator[BackgroundSimulator]:
        return iter(self.servers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def urls(self) -> list[str]:
        """Addresses, in the order of adding."""
        return [server.url for server in self.servers]

    def add(self, config: SimulatorConfig | None = None, **options: Any) -> BackgroundSimulator:
        """Start one more server; options are fields of :class:`SimulatorConfig`."""
        if self._loop is None:
            self._loop = Loop()
        server = BackgroundSimulator(self._loop, config, **options)
        server.start()
        self.servers.append(server)
        return server

    def close(self) -> None:
        """Stop all servers and the thread."""
        for server in self.servers:
            server.stop()
        if self._loop is not None:
            self._loop.close()
            self._loop = None


async def _make(config: SimulatorConfig | None, options: dict[str, Any]) -> Simulator:
    return Simulator(config, **options)


async def _call(action: Any) -> None:
    action()
