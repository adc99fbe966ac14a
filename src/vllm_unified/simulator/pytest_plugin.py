"""Fixtures for pytest: ``vllm_simulator``, one server, and ``vllm_fleet``, as many as you like.

Both run in a thread of their own on free ports of the loopback, so they serve blocking and async
tests alike, and tests that run in parallel. Configure one server with a marker::

    @pytest.mark.vllm_simulator(max_model_len=128)
    def test_it(vllm_simulator): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vllm_unified.simulator.background import BackgroundSimulator, Fleet


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", "vllm_simulator(**options): fields of SimulatorConfig for the fixture"
    )


@pytest.fixture
def vllm_fleet() -> Iterator[Fleet]:
    """An empty fleet; ``vllm_fleet.add(...)`` starts a server."""
    from vllm_unified.simulator.background import Fleet

    with Fleet() as fleet:
        yield fleet


@pytest.fixture
def vllm_simulator(vllm_fleet: Fleet, request: pytest.FixtureRequest) -> BackgroundSimulator:
    """One running simulator."""
    marker = request.node.get_closest_marker("vllm_simulator")
    return vllm_fleet.add(**(marker.kwargs if marker else {}))
