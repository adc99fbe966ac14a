"""The one place where errors become exit codes."""

from __future__ import annotations

from vllm_unified.batch.errors import BatchStoppedError
from vllm_unified.batch.jobs.summary import JobStoppedError
from vllm_unified.cli.terminal import complain
from vllm_unified.errors import (
    BadRequestError,
    CircuitOpenError,
    ConfigurationError,
    ConnectError,
    NoSuchServerError,
    VllmError,
)

_OUTER = (JobStoppedError, BatchStoppedError, CircuitOpenError)
"""Errors that say less than their cause."""


def ending(error: Exception) -> int | None:
    """Say what went wrong; what the command ends with. ``None``: not an error for the user."""
    if not isinstance(error, VllmError):
        return None
    complain(str(error))
    return exit_code(error)


def exit_code(error: VllmError) -> int:
    """What the command ends with for this error."""
    cause = error.__cause__
    if isinstance(error, _OUTER) and isinstance(cause, VllmError):
        return exit_code(cause)
    if isinstance(error, ConfigurationError | BadRequestError) and error.status_code is None:
        return 2
    return 3 if isinstance(error, ConnectError | NoSuchServerError) else 1
