"""A server that behaves like vLLM 0.32 and fails like one, for tests, users and benchmarks.

Names are imported when they are first used: pytest loads this package for its plugin in every
run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_unified.simulator.background import BackgroundSimulator, Fleet
    from vllm_unified.simulator.config import SimulatorConfig, Timing
    from vllm_unified.simulator.faults import Fault, FaultKind, FaultPlan, parse_fault
    from vllm_unified.simulator.server import Recorded, Simulator
    from vllm_unified.simulator.serving import run

__all__ = [
    "BackgroundSimulator",
    "Fault",
    "FaultKind",
    "FaultPlan",
    "Fleet",
    "Recorded",
    "Simulator",
    "SimulatorConfig",
    "Timing",
    "parse_fault",
    "run",
]

_HOMES = {
    "background": ("BackgroundSimulator", "Fleet"),
    "config": ("SimulatorConfig", "Timing"),
    "faults": ("Fault", "FaultKind", "FaultPlan", "parse_fault"),
    "serving": ("run",),
    "server": ("Recorded", "Simulator"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
