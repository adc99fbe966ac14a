"""What a failed prompt says: whether it is tried again, and when all of it is given up. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from vllm_unified.endpoints.verdict import verdict_of
from vllm_unified.errors import (
    AuthenticationError,
    CircuitOpenError,
    ConfigurationError,
    ConnectError,
    EngineDeadError,
    ModelNotFoundError,
    NotFoundError,
    PermissionDeniedError,
    QueueFullError,
    QueueTimeoutError,
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
PROOF = 30.0
"""Seconds for which a look at the servers counts."""
OF_A_REFUSAL = 1 / 8
"""Strikes. Nothing was generated, and many may be refused while a limit is found."""
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


def was_refused(error: VllmError) -> bool:
    """Whether no server took the prompt."""
    kinds = (CircuitOpenError, ConnectError, QueueFullError, QueueTimeoutError)
    return isinstance(error, kinds) or verdict_of(error) == "overloaded"


class Patience:
    """Whether a batch whose prompts fail goes on.

    Trouble begins with a failure that is not a prompt's own, and ends with the next success. A
    batch is given up when trouble has lasted too long; the caller then lets what is under way end,
    as a success there ends the trouble. Times are monotonic seconds.
    """

    __slots__ = ("_last_success", "_proved", "_seconds", "_setup", "trouble")

    def __init__(self, seconds: float | None = None) -> None:
        """``seconds`` of trouble; ``None``: ``PATIENCE``, or ``FIRST_PATIENCE`` before the first
        success."""
        self._seconds = seconds
        self._last_success = -math.inf
        self._proved = -math.inf
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

    def proved(self, now: float) -> None:
        """The servers are well, as they show otherwise; it begins anew."""
        self._proved = now
        self.trouble = None

    def calm(self) -> None:
        """There is nothing more to be tried again."""
        self.trouble = None

    @property
    def is_hopeless(self) -> bool:
        """Whether address, key or model were wrong from the beginning, by the last failure."""
        return self._setup and self._last_success == -math.inf

    def is_over(self, now: float) -> bool:
        """Whether to begin nothing more: trouble lasts too long, or it is hopeless."""
        if self.trouble is None:
            return False
        return self.is_hopeless or now - self.trouble >= self.seconds

    def strikes(self, error: VllmError, *, began: float) -> float:
        """How much this failure of a try, which began then, tells of the prompt rather than of the
        server: something if others succeeded meanwhile, if the servers had just been well, or if
        the server answered that it failed; little if the prompt was not even taken."""
        proved = 0 <= began - self._proved <= PROOF
        others = proved or self._last_success > began
        if was_refused(error):
            return OF_A_REFUSAL if others else 0.0
        if others:
            return 1.0
        if isinstance(error, EngineDeadError) or not isinstance(error, ServerError):
            return 0.0
        return float(error.status_code is not None and error.status_code not in _GATEWAYS)

    def pause(self, tries: int, error: VllmError, random: Callable[[], float]) -> float:
        """Seconds until the next try, after so many; ``random`` is uniform in [0, 1)."""
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(tries - 1, 16))
        return max(random() * longest, min(error.retry_after or 0.0, LONGEST_PAUSE))
