"""Whether a server that fails is left alone, and when it is tried again. Pure.

The circuit breaker of Nygard, "Release It!". Requests overlap here, so that verdicts come late and
in any order: one counts only if the breaker has not changed its state since the request began.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import msgspec

from vllm_unified.errors import ConfigurationError

State = Literal["closed", "open", "half_open"]

LONGEST_RESET = 8
"""Failed trials double the time until the next up to so many times the configured one."""


class BreakerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """When a breaker opens and closes.

    vllm-router has 10 failures, 60 s and 3 successes, for requests of many clients. One client sees
    fewer requests, so less has to do; and a client that also checks health learns of a recovery
    before the time is over.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    failure_threshold: int = 5
    """Failures in a row that open it. One or two are a restart of a proxy, or bad luck."""
    reset_timeout: float = 10.0
    """Seconds until a server is tried again. A server that restarts takes longer, but a network
    that was down, or a proxy, is back sooner; the doubling spares the former."""
    half_open_successful_calls: int = 2
    """Successful trials that close it, and how many may be under way at once. One success may be a
    server that answers just before it falls over again."""

    def __post_init__(self) -> None:
        for name in ("failure_threshold", "half_open_successful_calls"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(
                    f"{name} must be a whole number of at least 1, not {value!r}"
                )
        seconds = self.reset_timeout
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise ConfigurationError(f"reset_timeout must be a number of seconds, not {seconds!r}")
        if not 0 < seconds < math.inf:
            raise ConfigurationError(
                f"reset_timeout must be a positive, finite number of seconds, not {seconds!r}"
            )


class CircuitBreaker:
    """The breaker of one server.

    Every request that goes through is begun with :meth:`begin`, whose token goes with its verdict:
    :meth:`succeed`, :meth:`fail`, or :meth:`forget` where it says nothing about the server. Each
    begun request needs exactly one of them, or a trial stays counted. Times are monotonic seconds.

    Args:
        changed: Called with the new state after each change of it.
    """

    __slots__ = (
        "_changed",
        "_failures",
        "_generation",
        "_reset_timeout",
        "_successes",
        "_trials",
        "config",
        "opened_at",
        "ready_at",
        "shut",
        "state",
    )

    def __init__(
        self, config: BreakerConfig, *, changed: Callable[[State], None] | None = None
    ) -> None:
        self.config = config
        self.state: State = "closed"
        self.shut = False
        """Whether the state is not ``closed``, so that :meth:`allows` must be asked."""
        self.opened_at: float | None = None
        """When it last opened; ``None`` where it is closed."""
        self.ready_at = -math.inf
        """From when on it may be tried; minus infinity where it is closed."""
        self._changed = changed
        self._generation = 0
        self._failures = 0
        self._trials = 0
        self._successes = 0
        self._reset_timeout = config.reset_timeout

    def allows(self, now: float) -> bool:
        """Whether a request may go through now.

        Half-open, which it becomes here once its time has come, as many at once as successes are
        missing.
        """
        if not self.shut:
            return True
        if self.state == "open":
            if now < self.ready_at:
                return False
            self._enter("half_open")
        return self._trials + self._successes < self.config.half_open_successful_calls

    def begin(self) -> int:
        """A request goes through; the token for its verdict."""
        if self.shut:
            self._trials += 1
        return self._generation

    def succeed(self, token: int) -> bool:
        """The request that ``token`` is of succeeded; whether that closed it."""
        if token != self._generation:
            return False
        self._failures = 0
        if not self.shut:
            return False
        if self.state == "open":
            self._enter("half_open")  # it was tried before its time: the others were worse
        elif self.state == "half_open":
            self._trials -= 1
        if self.state == "half_open":
            self._successes += 1
            if self._successes >= self.config.half_open_successful_calls:
                self._close()
        return not self.shut

    def fail(self, token: int, now: float) -> None:
        """The request that ``token`` is of failed, by the server's fault."""
        if token != self._generation:
            return
        if self.state == "half_open":
            self._reopen(now)
        elif self.state == "closed":
            self._failures += 1
            if self._failures >= self.config.failure_threshold:
                self._open(now)

    def forget(self, token: int) -> None:
        """The request that ``token`` is of says nothing: cancelled, or wrong in itself."""
        if token == self._generation and self.shut:
            self._trials -= 1

    def trip(self, now: float) -> None:
        """The server was found dead: open, for the whole time from now on."""
        if self.state == "half_open":
            self._reopen(now)
        elif self.state == "closed":
            self._open(now)
        else:
            self.ready_at = now + self._reset_timeout

    def reset(self) -> None:
        """The server was proved to work: closed, with nothing held against it."""
        self._failures = 0
        if self.shut:
            self._close()

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.state}>"

    def _reopen(self, now: float) -> None:
        longest = LONGEST_RESET * self.config.reset_timeout
        self._reset_timeout = min(2 * self._reset_timeout, longest)
        self._open(now)

    def _open(self, now: float) -> None:
        self.opened_at = now
        self.ready_at = now + self._reset_timeout
        self._enter("open")

    def _close(self) -> None:
        self.opened_at = None
        self.ready_at = -math.inf
        self._reset_timeout = self.config.reset_timeout
        self._enter("closed")

    def _enter(self, state: State) -> None:
        self.state = state
        self.shut = state != "closed"
        # A verdict of before is of another generation, and so counts for nothing.
        self._generation += 1
        self._failures = self._trials = self._successes = 0
        if self._changed is not None:
            self._changed(state)
