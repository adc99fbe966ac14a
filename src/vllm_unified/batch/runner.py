"""Many prompts, several at a time, answered in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sized
from typing import Generic, TypeVar

from vllm_unified.errors import BadRequestError, OutputValidationError, VllmError

Item = TypeVar("Item")
T = TypeVar("T")


class BatchError(VllmError, Generic[T]):
    """Some prompts of a batch have no answer; those of the others are here."""

    def __init__(
        self, message: str, *, results: list[T | None], errors: dict[int, VllmError]
    ) -> None:
        super().__init__(message)
        self.results = results
        """One entry for each prompt, in order; ``None`` where there is no answer. Of prompts
        whose number is not known, only those that were begun."""
        self.errors = errors
        """Why, by the position of the prompt. Prompts in neither were not sent."""
        first = next(iter(errors.values()))
        self.is_transient_error = all(error.is_transient_error for error in errors.values())
        self.status_code, self.endpoint = first.status_code, first.endpoint
        self.request_id, self.model = first.request_id, first.model
        self.attempts, self.hint = first.attempts, first.hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.results, self.errors)


def _rebuild(
    kind: type[BatchError[T]], message: str, results: list[T | None], errors: dict[int, VllmError]
) -> BatchError[T]:
    return kind(message, results=results, errors=errors)


async def run_batch(
    items: Iterable[Item],
    answer: Callable[[Item], Awaitable[T]],
    *,
    at_once: Callable[[], int],
    on_progress: Callable[[int], None] | None = None,
) -> list[T]:
    """The answers, in the order of the items.

    After an error nothing new is begun, unless the error is the item's own fault; what is under
    way runs to its end.

    Args:
        at_once: How many items may be under way now; asked whenever one is done.
        on_progress: Called with the number of items that are done, after each.

    Raises:
        BatchError: at least one item failed.
    """
    waiting = enumerate(items)
    results: dict[int, T] = {}
    errors: dict[int, VllmError] = {}
    stopped = False
    under_way = 0

    def begin(group: asyncio.TaskGroup) -> None:
        nonlocal under_way
        while not stopped and under_way < at_once() and (taken := next(waiting, None)) is not None:
            under_way += 1
            group.create_task(work(group, *taken))

    async def work(group: asyncio.TaskGroup, index: int, item: Item) -> None:
        nonlocal stopped, under_way
        try:
            results[index] = await answer(item)
        except VllmError as error:
            errors[index] = error
            stopped = stopped or not _is_own_fault(error)
        under_way -= 1
        if on_progress is not None:
            on_progress(len(results) + len(errors))
        begin(group)

    try:
        async with asyncio.TaskGroup() as group:
            begin(group)
    except BaseExceptionGroup as failed:
        # The caller's own items or on_progress raised.
        first_raised = failed.exceptions[0]
        raise first_raised from first_raised.__cause__
    if not errors:
        return [results[index] for index in range(len(results))]
    total = len(items) if isinstance(items, Sized) else max(*results, *errors, 0) + 1
    first = min(errors)
    raise BatchError(
        f"{len(errors)} of {total} prompts failed; the first is prompt {first}: "
        f"{errors[first].message}",
        results=[results.get(index) for index in range(total)],
        errors=dict(sorted(errors.items())),
    ) from errors[first]


def _is_own_fault(error: VllmError) -> bool:
    return isinstance(error, BadRequestError | OutputValidationError)
