"""How a job does, and how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from vllm_unified.errors import VllmError

if TYPE_CHECKING:
    from vllm_unified.batch.jobs.ledger import Counts


class BatchProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is."""

    rows: int
    """Done, in this run and before."""
    failed: int
    """Among them, without an answer."""
    total: int | None
    """Rows of the input; an estimate until the input has been read to its end, ``None`` where
    there is not even that."""
    total_is_exact: bool
    new_rows: int
    """Done in this run."""
    completion_tokens: int
    """Generated in this run."""
    seconds: float
    """Since this run began."""
    trouble: VllmError | None = None
    """Why rows fail at this moment, while none succeeds; they are tried again."""

    @property
    def rows_per_second(self) -> float:
        """Of this run."""
        return self.new_rows / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens, of this run."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds until the end, if it goes on like this."""
        if self.total is None or not self.rows_per_second:
            return None
        return max(0.0, (self.total - self.rows) / self.rows_per_second)


class BatchSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a job came to."""

    output: str
    rows: int
    """Rows of the input that are done; at the end, all of them, and as many are in the output."""
    failed: int
    """Among them, without an answer; the output says why, ``retry_failed`` asks them again."""
    unasked: int
    """Among those, rows that were not sent: they cannot be read, or have not what is asked."""
    cut: int
    """Answers that ended at their token limit (``finish_reason`` is ``length``)."""
    resumed: int
    """Rows that were done before this run."""
    prompt_tokens: int
    completion_tokens: int
    """Tokens of all rows, this run's and earlier ones'."""
    seconds: float
    """What this run took."""
    ledger: str | None
    """The file that knows which rows are done; ``None`` where there is none to go on with."""

    @property
    def answered(self) -> int:
        """Rows with an answer."""
        return self.rows - self.failed


def summary_of(
    counts: Counts, *, output: str, resumed: int, seconds: float, ledger: str | None
) -> BatchSummary:
    """What rows add up to, as the summary of a run."""
    return BatchSummary(
        output=output,
        rows=counts.rows,
        failed=counts.failed,
        unasked=counts.unasked,
        cut=counts.cut,
        resumed=resumed,
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        seconds=seconds,
        ledger=ledger,
    )


class JobStoppedError(VllmError):
    """A job with files ended before all of its rows were done; ``__cause__`` is why.

    What was done is in the ledger, and the same call goes on after it."""

    def __init__(
        self,
        message: str,
        *,
        summary: BatchSummary,
        hint: str | None = None,
        like: VllmError | None = None,
    ) -> None:
        """``like`` says where it failed, and whether it may succeed later."""
        super().__init__(message, hint=hint)
        self.summary = summary
        """How far it came."""
        if like is not None:
            self.is_transient_error = like.is_transient_error
            self.status_code, self.endpoint = like.status_code, like.endpoint
            self.request_id, self.model = like.request_id, like.model
            self.attempts = like.attempts

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.message, self.summary, self.hint, self.__cause__)


def _rebuild(
    message: str, summary: BatchSummary, hint: str | None, cause: BaseException | None
) -> JobStoppedError:
    like = cause if isinstance(cause, VllmError) else None
    error = JobStoppedError(message, summary=summary, hint=hint, like=like)
    error.__cause__ = cause
    return error
