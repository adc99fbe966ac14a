"""Two attempts at one time, of which the first answer counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def first_answer(
    first: Coroutine[Any, Any, T],
    after: float,
    second: Callable[[], Coroutine[Any, Any, T] | None],
) -> T:
    """What the first of two gives; the other is cancelled, and has ended when this returns.

    "Hedged requests" in Dean and Barroso, "The Tail at Scale", 2013.

    Args:
        after: Seconds that ``first`` has before ``second`` is begun.
        second: Makes the other; ``None`` where there can be none.

    Raises:
        Exception: that of ``first``, if neither succeeds.
    """
    tasks = [asyncio.ensure_future(first)]
    try:
        await asyncio.wait(tasks, timeout=after)
        other = None if tasks[0].done() else second()
        if other is not None:
            tasks.append(asyncio.ensure_future(other))
            await _until_one_succeeds(tasks)
        winner = next((task for task in tasks if _succeeded(task)), tasks[0])
        return await winner
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_one_succeeds(tasks: Sequence[asyncio.Future[T]]) -> None:
    pending = set(tasks)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if any(_succeeded(task) for task in done):
            return


def _succeeded(task: asyncio.Future[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
