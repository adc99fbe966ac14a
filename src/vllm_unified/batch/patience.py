"""What a failed prompt says: whether it is tried again, and when all of it is given up. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from vllm_unified.errors import (
    AuthenticationError,
    ConfigurationError,
    EngineDeadError,
    ModelNotFoundError,
    NotFoundError,
    PermissionDeniedError,
    ServerError,
    TLSError,
    VllmError,
)

PATIENCE = 60.0
"""Seconds without a success, of a batch that had some."""
FIRST_PATIENCE = 10.0
"""Seconds, of a batch that had none yet: more likely than an outage is a wrong address."""
STRIKES = 4
"""How often a prompt may fail that others, or the server's own words, show to be the reason."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 5.0
"""Seconds; full jitter, as in ``endpoints.retry``."""
_GATEWAYS = (502, 503, 504)

Blame = Literal["prompt", "server", "setup"]


def blame_of(error: VllmError, *, own_model: bool) -> Blame:
    """``prompt``: another try would fail alike, and other prompts need not. ``server``: a matter
    of time. ``setup``: address, key or model are wrong, which concerns all prompts alike.

    Args:
        own_model: Whether the prompt names a model of its own.
    """
    if error.is_transient_error:
        return "server"
    if isinstance(error, ModelNotFoundError) and own_model:
        return "prompt"
    setup = (
        AuthenticationError,
        ConfigurationError,
        NotFoundError,
        PermissionDeniedError,
        TLSError,
    )
    return "setup" if isinstance(error, setup) else "prompt"


class Patience:
    """Whether a batch whose prompts fail goes on.

    Trouble begins with a failure that is not a prompt's own, and ends with the next success. A
    batch is given up when trouble has lasted too long; the caller then lets what is under way end,
    as a success there ends the trouble. Times are monotonic seconds.
    """

    __slots__ = ("_last_success", "_seconds", "_setup", "trouble")

    def __init__(self, seconds: float | None = None) -> None:
        """``seconds`` of trouble; ``None``: ``PATIENCE``, or ``FIRST_PATIENCE`` before the first
        success."""
        self._seconds = seconds
        self._last_success = -math.inf
        self._setup = False
        self.trouble: float | None = None
        """When it began; ``None`` where there is none."""

    @property
    def seconds(self) -> float:
        """How long trouble may last."""
        if self._seconds is not None:
            return self._seconds
        return FIRST_PATIENCE if self._last_success == -math.inf else PATIENCE

    def succeeded(self, now: float) -> float:
        """A prompt was answered; seconds of trouble that this ended."""
        self._last_success = now
        if self.trouble is None:
            return 0.0
        lasted, self.trouble = now - self.trouble, None
        return lasted

    def failed(self, blame: Blame, now: float) -> None:
        """A prompt failed, and is to be tried again."""
        self._setup = blame == "setup"
        if self.trouble is None:
            self.trouble = now

    def calm(self) -> None:
        """There is nothing more to be tried again."""
        self.trouble = None

    def is_over(self, now: float) -> bool:
        """Whether to begin nothing more: trouble lasts too long, or key, model or address were
        wrong from the beginning."""
        if self.trouble is None:
            return False
        if self._setup and self._last_success == -math.inf:
            return True
        return now - self.trouble >= self.seconds

    def is_strike(self, error: VllmError, *, began: float) -> bool:
        """Whether this failure of a try that began then tells of the prompt more than of the
        server: others succeeded meanwhile, or the server itself answered that it failed."""
        if self._last_success > began:
            return True
        if isinstance(error, EngineDeadError) or not isinstance(error, ServerError):
            return False
        return error.status_code is not None and error.status_code not in _GATEWAYS

    def pause(self, tries: int, error: VllmError, random: Callable[[], float]) -> float:
        """Seconds until the next try, after so many; ``random`` is uniform in [0, 1)."""
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(tries - 1, 16))
        return max(random() * longest, min(error.retry_after or 0.0, LONGEST_PAUSE))
