"""All answers of a batch as a list."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Generic, Literal, TypeVar

import msgspec

from vllm_unified.batch.errors import BatchError, BatchStoppedError
from vllm_unified.batch.metrics import BatchMetrics
from vllm_unified.batch.stream import BatchStream
from vllm_unified.errors import ConfigurationError, VllmError

T = TypeVar("T")
OnError = Literal["raise", "return"]


class BatchResult(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """The texts that answer the prompts of a batch, and what they took."""

    texts: list[T]
    """In the order of the prompts; with ``on_error="return"`` errors among them."""
    metrics: BatchMetrics


async def collect_texts(
    stream: BatchStream,
    prompts: object,
    *,
    on_error: OnError,
    on_progress: Callable[[int], object] | None,
) -> list[str | VllmError]:
    """The texts, in the order of the prompts.

    Args:
        on_error: ``raise`` after the rest is done, or ``return`` errors in the place of texts.
        on_progress: Called with the number of prompts that are done, after each.

    Raises:
        BatchError: some failed, or the batch was given up.
    """
    if on_error not in ("raise", "return"):
        raise ConfigurationError(f'on_error must be "raise" or "return", not {on_error!r}')
    texts: list[str | VllmError | None] = (
        [None] * len(prompts) if isinstance(prompts, Sized) else []
    )
    errors: dict[int, VllmError] = {}
    done, stopped = 0, None
    async with stream:
        try:
            while ready := await stream.read_ready():
                for answer in ready:
                    index, done = answer.index, done + 1
                    if index >= len(texts):
                        texts += [None] * (index + 1 - len(texts))
                    if answer.error is not None:
                        errors[index] = answer.error
                    texts[index] = answer.text if answer.error is None else answer.error
                    if on_progress is not None:
                        on_progress(done)
        except BatchStoppedError as given_up:
            stopped = given_up
    if stopped is not None:
        errors |= stopped.pending
    if stopped is not None or (errors and on_error == "raise"):
        raise _failed(texts, dict(sorted(errors.items())), stopped)
    return [text for text in texts if text is not None]


def _failed(
    texts: list[str | VllmError | None],
    errors: dict[int, VllmError],
    stopped: BatchStoppedError | None,
) -> BatchError[str]:
    known = max([len(texts), *(index + 1 for index in errors)])
    results = [text if isinstance(text, str) else None for text in texts]
    results += [None] * (known - len(results))
    if not errors:
        assert stopped is not None
        errors = {len(results): stopped}
    first = min(errors)
    message = (
        f"{len(errors)} of {known} prompts failed; the first is prompt {first}: "
        f"{errors[first].message}"
    )
    error = BatchError(
        message if stopped is None else f"{stopped.message} ({message})",
        results=results,
        errors=errors,
    )
    error.__cause__ = errors[first] if stopped is None else stopped
    return error
