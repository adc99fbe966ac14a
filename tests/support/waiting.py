"""Waiting for what happens elsewhere, with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

SECONDS = 30.0


def until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Return as soon as the condition holds; fail after the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


async def eventually(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    """:func:`until`, for coroutines."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.002)
