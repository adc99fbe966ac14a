"""What the tests of fleets share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.fake_servers import Clock, MakeRig, Rig, stop_time


@pytest.fixture
async def make_rig() -> AsyncIterator[MakeRig]:
    """Makes fleets of fake servers, ``make_rig("a", "b", ...)``, which are closed at the end."""
    rigs: list[Rig] = []

    def make(*names: str, **options: Any) -> Rig:
        rigs.append(Rig(*names, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        await rig.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes only when a test says so."""
    return stop_time(monkeypatch)
