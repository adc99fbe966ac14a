"""How many retries a fleet can afford. Pure.

Each layer that retries multiplies the load of an outage, when there is least room for it; so
retries are a share of the requests ("Addressing Cascading Failures", chapter 22 of Google's "Site
Reliability Engineering"). The share and the window are those of Finagle's ``RetryBudget`` (20 %,
10 s, and 10 retries a second at least), the share also that of Envoy's retry budget (20 %, and 3 at
once at least).
"""

from __future__ import annotations

import math

from vllm_unified.errors import ConfigurationError

_SLOTS = 10
"""Parts of a window that are counted each by itself; a request counts for 9 to 10 of them."""


class RetryBudget:
    """Grants retries as a share of the requests of late.

    At each grant, the retries of the window that ends with it are at most ``floor * window`` and
    ``ratio`` of the requests of that window. In any other window, then, they are at most as many,
    where the requests of the window before count too: a retry comes after its request. What is not
    used is gone after a window. Whole tenths of a window are counted, on the safe side: a request
    for 0.9 to 1 window, a retry for 1 to 1.1.

    Times are monotonic seconds; an earlier one than the last counts as the last.

    Args:
        ratio: Retries for each request, at least 0.
        floor: Retries per second that may be granted on top of that, at least 0, so that a client
            that sends little can retry at all. Finagle's 10 is for servers; a client that has one
            request every few seconds needs one.
        window: Seconds.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    __slots__ = (
        "_ends",
        "_granted",
        "_granted_sum",
        "_requests",
        "_requests_sum",
        "_reserve",
        "_slot",
        "_width",
        "ratio",
    )

    def __init__(self, *, ratio: float = 0.2, floor: float = 1.0, window: float = 10.0) -> None:
        for name, value in (("ratio", ratio), ("floor", floor)):
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"{name} must be a number of at least 0, not {value!r}")
        if not 0 < window < math.inf:
            raise ConfigurationError(
                f"window must be a positive, finite number of seconds, not {window!r}"
            )
        self.ratio = ratio
        self._reserve = floor * window
        self._width = window / _SLOTS
        self._ends = -math.inf
        self._slot = 0
        # Rings; retries have one slot more, so that those of a whole window are always in it.
        self._requests = [0] * _SLOTS
        self._granted = [0] * (_SLOTS + 1)
        self._requests_sum = 0
        self._granted_sum = 0

    def deposit(self, now: float) -> None:
        """A request begins; not for its retries."""
        if now >= self._ends:
            self._advance(now)
        self._requests[self._slot % _SLOTS] += 1
        self._requests_sum += 1

    def withdraw(self, now: float) -> bool:
        """Whether a retry may begin; it counts if so."""
        if self.remaining(now) < 1:
            return False
        self._granted[self._slot % (_SLOTS + 1)] += 1
        self._granted_sum += 1
        return True

    def remaining(self, now: float) -> int:
        """Retries that may begin now."""
        if now >= self._ends:
            self._advance(now)
        return max(int(self.ratio * self._requests_sum + self._reserve) - self._granted_sum, 0)

    def __repr__(self) -> str:
        return (
            f"<RetryBudget {self._granted_sum} retries of {self._requests_sum} requests, "
            f"ratio {self.ratio:g}>"
        )

    def _advance(self, now: float) -> None:
        """Go on to the slot that ``now`` is in, and forget what has left the window."""
        slot = math.floor(now / self._width)
        for each in range(max(self._slot + 1, slot - _SLOTS), slot + 1):
            self._requests_sum -= self._requests[each % _SLOTS]
            self._requests[each % _SLOTS] = 0
            self._granted_sum -= self._granted[each % (_SLOTS + 1)]
            self._granted[each % (_SLOTS + 1)] = 0
        self._slot = slot
        self._ends = (slot + 1) * self._width
