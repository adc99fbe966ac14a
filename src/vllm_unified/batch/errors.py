"""How a batch fails."""

from __future__ import annotations

from typing import Generic, TypeVar

from vllm_unified.errors import VllmError

T = TypeVar("T")


class BatchStoppedError(VllmError):
    """A batch ended before its end: nothing succeeded any more. The answers that there were have
    been delivered; ``__cause__`` is what failed last."""

    def __init__(
        self,
        message: str,
        *,
        pending: dict[int, VllmError] | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.pending = pending or {}
        """The prompts that were tried in vain, by their position, and why. They have no answer;
        those that come after all of these were not sent."""
        if self.pending:
            last = next(reversed(self.pending.values()))
            self.is_transient_error = last.is_transient_error
            _describe(self, last)


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
        _describe(self, first)
        self.hint = first.hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.results, self.errors)


def _rebuild(
    kind: type[BatchError[T]], message: str, results: list[T | None], errors: dict[int, VllmError]
) -> BatchError[T]:
    return kind(message, results=results, errors=errors)


def _describe(error: VllmError, like: VllmError) -> None:
    """Where and with what it failed, as another error says."""
    error.status_code, error.endpoint = like.status_code, like.endpoint
    error.request_id, error.model = like.request_id, like.model
    error.attempts = like.attempts
