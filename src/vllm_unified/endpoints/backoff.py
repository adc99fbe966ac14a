"""How long a server that refuses even a single request is left alone. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

SHORTEST, LONGEST = 0.05, 1.0
"""Seconds. The first pause is as long as a short answer takes; the longest costs little when the
server has room again, and one refused attempt a second costs nothing."""


class Backoff:
    """Pauses of a server whose limit is one request at a time already, and refuses that.

    A refusal takes no time. So in the eyes of a strategy a server that refuses has the least load,
    and would get request after request, with all of the fleet's retries. Exponential, with jitter
    over half of the pause, so that many clients do not keep step. Times are monotonic seconds.
    """

    __slots__ = ("_pause", "is_on", "ready_at")

    def __init__(self) -> None:
        self._pause = 0.0
        self.is_on = False
        """Whether the server refused, and has answered nothing since."""
        self.ready_at = -math.inf
        """When the next request may be sent; minus infinity while the server refuses none."""

    def refuse(self, now: float, random: Callable[[], float]) -> None:
        """The server refused the only request that was there.

        ``random`` is uniform in [0, 1).
        """
        self.is_on = True
        self._pause = min(max(2 * self._pause, SHORTEST), LONGEST)
        self.ready_at = now + self._pause * (0.5 + 0.5 * random())

    def end(self) -> None:
        """The server answered."""
        self.is_on = False
        self._pause = 0.0
        self.ready_at = -math.inf

    def __repr__(self) -> str:
        return f"<Backoff of {self._pause:g} s>"
