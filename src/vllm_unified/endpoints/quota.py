"""Requests and tokens per minute, of a server or gateway that has a quota. Pure.

A log of the last minute, and not a token bucket: a bucket that starts full lets twice its size
through in the first minute.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from vllm_unified.errors import ConfigurationError

WINDOW = 60.0
"""Seconds that a quota is for. A request counts for so long, and no more at the very end of it."""


class QuotaTicket:
    """A request that was counted."""

    __slots__ = ("at", "tokens")

    def __init__(self, at: float, tokens: int) -> None:
        self.at = at
        self.tokens = tokens


class Quota:
    """What may be sent so that no window of 60 s, wherever it begins, has more than the quota.

    Three things go beyond it: what is taken before :meth:`ready_at` says so; answers longer than
    they were thought to be, for which the next request waits; and a request that is larger than
    the whole quota of tokens, which goes when nothing else is in the window. Times are those of
    sending, in monotonic seconds; they must not decrease.

    It remembers a minute of requests: as many as the quota has requests or, without those, tokens.

    Args:
        requests_per_minute: At least 1; ``None`` for any number.
        tokens_per_minute: Of prompts and answers, at least 1; ``None`` for any number.

    Raises:
        ConfigurationError: a quota is no such number.
    """

    __slots__ = ("_log", "_requests", "_tokens", "_used")

    def __init__(self, *, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self._requests = _checked("requests_per_minute", requests_per_minute)
        self._tokens = _checked("tokens_per_minute", tokens_per_minute)
        # By identity and in order of time: one of them can be taken out of the middle at once.
        self._log: OrderedDict[QuotaTicket, None] = OrderedDict()
        self._used = 0

    def ready_at(self, now: float, tokens: int = 0) -> float:
        """When a request may be sent; at most ``now`` where that is at once.

        Args:
            tokens: How many it will take, prompt and answer, as far as one can know. It counts as 1
                at least, so that it waits where the tokens of the minute are used up.
        """
        self._expire(now)
        ready = now
        if self._requests is not None and len(self._log) >= self._requests:
            ready = self._room_for_request()
        if self._tokens is not None and self._used:
            missing = self._used + max(tokens, 1) - self._tokens
            if missing > 0:
                ready = max(ready, self._room_for_tokens(missing))
        return ready

    def take(self, now: float, tokens: int = 0) -> QuotaTicket:
        """Count a request that is sent now, of about so many tokens (at least 1)."""
        self._expire(now)
        ticket = QuotaTicket(now, max(tokens, 1))
        if self._requests is not None or self._tokens is not None:
            self._log[ticket] = None
            self._used += ticket.tokens
        return ticket

    def settle(self, ticket: QuotaTicket, tokens: int) -> None:
        """Count the tokens that the request really took, at the time when it was sent.

        It stays a request where it took none; one older than the window changes nothing.
        """
        if ticket not in self._log:
            return
        self._used += tokens - ticket.tokens
        ticket.tokens = tokens
        if tokens == 0 and self._requests is None:
            del self._log[ticket]

    def refund(self, ticket: QuotaTicket) -> None:
        """Count the request no more: nothing was sent."""
        if ticket in self._log:
            del self._log[ticket]
            self._used -= ticket.tokens

    def __repr__(self) -> str:
        return (
            f"<Quota {len(self._log)}/{_shown(self._requests)} requests, "
            f"{self._used}/{_shown(self._tokens)} tokens>"
        )

    def _expire(self, now: float) -> None:
        log = self._log
        while log:
            oldest = next(iter(log))
            if oldest.at + WINDOW > now:
                return
            del log[oldest]
            self._used -= oldest.tokens

    def _room_for_request(self) -> float:
        """When there are fewer requests in the window than the quota has."""
        assert self._requests is not None
        surplus = len(self._log) - self._requests
        return next(islice(self._log, surplus, None)).at + WINDOW

    def _room_for_tokens(self, missing: int) -> float:
        """When so many tokens, or all there are, have left the window."""
        missing = min(missing, self._used)
        freed = 0
        for ticket in self._log:
            freed += ticket.tokens
            if freed >= missing:
                break
        return ticket.at + WINDOW


def _checked(name: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigurationError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def _shown(quota: int | None) -> str:
    return "any" if quota is None else str(quota)
