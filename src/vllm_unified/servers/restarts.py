"""When a vLLM that ended is started again, and when it is given up."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

_LEAST_OF_PAUSE = 0.75


class Pacing(msgspec.Struct, frozen=True, kw_only=True):
    """The times of a supervisor's work, in seconds."""

    first_pause: float = 1.0
    """Before the first restart in a row; each further one waits twice as long."""
    longest_pause: float = 60.0
    steady_after: float = 300.0
    """How long a server must have been ready for its ends before that not to count."""
    look_every: float = 10.0
    """From one look at a ready server to the next."""
    hung_after: float = 60.0
    """How long a server may give no sign of life."""
    settled: float = 0.5
    """From one look to the next that must both find no request, for a server to be drained."""
    reaction: float = 5.0
    """How long holders have to go to a successor."""


class Restarts:
    """Counts the ends of one server. Ordered ones are not told to it."""

    def __init__(self, limit: int, pacing: Pacing, random: Callable[[], float]) -> None:
        """
        Args:
            limit: Restarts in a row before the server is given up.
            pacing: The pauses.
            random: Uniform in [0, 1).
        """
        self._limit = limit
        self._pacing = pacing
        self._random = random
        self.total = 0
        """Restarts so far."""
        self.in_a_row = 0
        """Ends so far, since the server was steady."""

    def ended(self, ready_for: float) -> float | None:
        """Note an end, after so many seconds of being ready; the pause before the next start.

        ``None``: there is none, the server is given up.
        """
        if ready_for >= self._pacing.steady_after:
            self.in_a_row = 0
        self.in_a_row += 1
        if self.in_a_row > self._limit:
            return None
        self.total += 1
        # The exponent is bounded because a float's is.
        pause = self._pacing.first_pause * 2.0 ** min(self.in_a_row - 1, 60)
        share = _LEAST_OF_PAUSE + (1 - _LEAST_OF_PAUSE) * self._random()
        return min(pause, self._pacing.longest_pause) * share
