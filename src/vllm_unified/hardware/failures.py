"""What an error of a backend means for the request and for the backend. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from vllm_unified.endpoints.verdict import verdict_of
from vllm_unified.errors import (
    AdapterError,
    Attempt,
    BackendError,
    BadRequestError,
    CircuitOpenError,
    ClientClosedError,
    ConfigurationError,
    ContextLengthError,
    EngineError,
    OutputValidationError,
    QueueFullError,
    QueueTimeoutError,
    ResponseTooLargeError,
    ServerStartError,
    VllmError,
)

Meaning = Literal["failed", "overloaded", "answered"]

# Another backend would say the same.
_CALLERS_OWN = (
    BadRequestError,
    ConfigurationError,
    OutputValidationError,
    ResponseTooLargeError,
    AdapterError,
)
_OWN_BUILTINS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)
_BROKEN = (BackendError, CircuitOpenError, ClientClosedError, EngineError, ServerStartError)


def as_failure(error: Exception, backend: str) -> VllmError:
    """The error of the tree that this is, or stands for."""
    if isinstance(error, VllmError):
        return error
    failure = BackendError(f"the backend {backend} failed: {type(error).__name__}: {error}")
    failure.is_transient_error = not isinstance(error, _OWN_BUILTINS)
    failure.__cause__ = error
    return failure


def may_go_elsewhere(error: VllmError) -> bool:
    """Whether another backend may well succeed.

    Not where the request itself is wrong. A model, a key or an ability that is missing is the
    backend's own lack; a context that is too short is, where another is longer.
    """
    if isinstance(error, BackendError):
        return error.is_transient_error
    return isinstance(error, ContextLengthError) or not isinstance(error, _CALLERS_OWN)


def meaning_of(error: VllmError) -> Meaning:
    """``failed``: the backend is broken. ``overloaded``: it is full. ``answered``: neither."""
    if isinstance(error, QueueFullError | QueueTimeoutError):
        return "overloaded"
    if isinstance(error, _BROKEN):
        return "failed" if may_go_elsewhere(error) else "answered"
    verdict = verdict_of(error)
    return "answered" if verdict == "unknown" else verdict


def attempts_of(
    result: VllmError | Sequence[Attempt], backend: str, started_at: float, duration: float
) -> tuple[Attempt, ...]:
    """The tries that a backend made, in its name; one, where it does not tell.

    Args:
        result: Its error, or the attempts that its result tells.
    """
    error = result if isinstance(result, VllmError) else None
    told = result.attempts if isinstance(result, VllmError) else tuple(result)
    if told:
        return tuple(msgspec.structs.replace(attempt, backend=backend) for attempt in told)
    return (
        Attempt(
            endpoint=backend,
            started_at=started_at,
            duration=duration,
            error=None if error is None else f"{type(error).__name__}: {error.message}",
            status_code=None if error is None else error.status_code,
            backend=backend,
        ),
    )
