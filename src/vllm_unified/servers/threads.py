"""Blocking work of an event loop, which can be cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(
    work: Callable[[threading.Event], T], *, discard: Callable[[T], object] | None = None
) -> T:
    """Run blocking ``work`` in a thread. When cancelled, its event is set, and its end awaited.

    A result that comes too late is given to ``discard``.
    """
    cancel = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, cancel))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        cancel.set()
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None and discard:
            discard(task.result())
        raise
