"""Many requests, several at a time, answered in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from vllm_unified.batch.errors import BatchError
from vllm_unified.errors import VllmError

Item = TypeVar("Item")
T = TypeVar("T")


async def answer_all(
    items: Sequence[Item],
    answer: Callable[[Item], Awaitable[T]],
    *,
    at_once: Callable[[], int],
    on_progress: Callable[[int], None] | None = None,
) -> list[T]:
    """The answers, in the order of the items.

    An item that fails harms no other.

    Args:
        at_once: How many items may be under way now; asked whenever one is done.
        on_progress: Called with the number of items that are done, after each.

    Raises:
        BatchError: at least one item failed; has the answers of the others.
    """
    waiting = enumerate(items)
    results: dict[int, T] = {}
    errors: dict[int, VllmError] = {}
    under_way = 0

    def begin(group: asyncio.TaskGroup) -> None:
        nonlocal under_way
        while under_way < at_once() and (taken := next(waiting, None)) is not None:
            under_way += 1
            group.create_task(work(group, *taken))

    async def work(group: asyncio.TaskGroup, index: int, item: Item) -> None:
        nonlocal under_way
        try:
            results[index] = await answer(item)
        except VllmError as error:
            errors[index] = error
        under_way -= 1
        if on_progress is not None:
            on_progress(len(results) + len(errors))
        begin(group)

    try:
        async with asyncio.TaskGroup() as group:
            begin(group)
    except BaseExceptionGroup as failed:
        # on_progress raised, or a backend something that is not of our tree.
        first_raised = failed.exceptions[0]
        raise first_raised from first_raised.__cause__
    if not errors:
        return [results[index] for index in range(len(items))]
    first = min(errors)
    raise BatchError(
        f"{len(errors)} of {len(items)} requests failed; the first is request {first}: "
        f"{errors[first].message}",
        results=[results.get(index) for index in range(len(items))],
        errors=dict(sorted(errors.items())),
    ) from errors[first]
