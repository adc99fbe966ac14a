"""Whether, and after what pause, a failed attempt is followed by another. Pure."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from vllm_unified.errors import (
    AttemptTimeoutError,
    QueueFullError,
    RequestTimeoutError,
    VllmError,
)


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Exponential backoff with full jitter. Times are in seconds.

    The pauses are openai-python's; the jitter is over the whole pause ("full jitter" in Brooker,
    "Exponential Backoff And Jitter", 2015), and applied after the clamp, so that callers at the
    cap do not fall into step.
    """

    max_retries: int
    """Attempts after the first."""
    first_pause: float = 0.5
    longest_pause: float = 8.0
    longest_retry_after: float = 60.0
    """A server that asks for more than this is not waited for; the caller gets the error."""


def pause_before_retry(
    policy: RetryPolicy,
    error: VllmError,
    *,
    failed_attempts: int,
    remaining: float,
    elsewhere: bool = False,
    random: Callable[[], float],
) -> float | None:
    """Seconds to wait before the next attempt; ``None`` if there should be none.

    Args:
        failed_attempts: How many attempts have failed, this one included; at least 1.
        remaining: Seconds until the call's deadline. No pause is begun that would outlast it.
        elsewhere: Whether there is another server to try, for which there is no need to wait.
        random: Uniform in [0, 1).
    """
    if not error.is_transient_error or failed_attempts > policy.max_retries:
        return None
    if _is_final(error):
        return None
    if elsewhere:
        return 0.0 if remaining > 0 else None
    doublings = min(failed_attempts - 1, 64)
    longest = min(policy.longest_pause, policy.first_pause * 2**doublings)
    pause = random() * longest
    if error.retry_after is not None:
        if error.retry_after > policy.longest_retry_after:
            return None
        pause = error.retry_after + random() * policy.first_pause
    return pause if pause < remaining else None


def _is_final(error: VllmError) -> bool:
    """Whether the call's own time or the queue's room was used up."""
    return isinstance(error, QueueFullError | RequestTimeoutError) and not isinstance(
        error, AttemptTimeoutError
    )
