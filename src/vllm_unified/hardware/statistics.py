"""What became of the requests of a hardware layer, by backend. Pure."""

from __future__ import annotations

from collections import Counter

import msgspec

from vllm_unified.endpoints.histogram import Distribution, Histogram


class BackendStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of one backend.

    A request counts at each backend that it was tried at; a batch that one takes at once is one.
    """

    requests: int
    """That ended: ``success`` + ``errors`` + ``cancelled``."""
    success: int
    errors: int
    cancelled: int
    errors_by_class: dict[str, int]
    taken_over: int
    """Of the successes, those that another backend had failed at before."""
    in_flight: int
    """Now."""
    duration: Distribution | None
    """Of the successes, in seconds, from the choice to the whole answer; ``None`` without any."""


class LayerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a hardware layer."""

    requests: int
    """Calls that ended, whatever they tried."""
    success: int
    errors: int
    cancelled: int
    failovers: int
    """Times that a request went on at another backend."""
    backends: dict[str, BackendStatistics]


class Tally:
    """Counts the ends of one backend's requests."""

    __slots__ = ("_durations", "_errors", "cancelled", "in_flight", "success", "taken_over")

    def __init__(self) -> None:
        self.in_flight = 0
        self.success = 0
        self.cancelled = 0
        self.taken_over = 0
        self._errors: Counter[str] = Counter()
        self._durations = Histogram()

    def succeeded(self, seconds: float, *, taken_over: bool) -> None:
        """A request was answered."""
        self.success += 1
        self.taken_over += taken_over
        self._durations.record(max(0.0, seconds))

    def failed(self, error: Exception) -> None:
        """A request was not."""
        self._errors[type(error).__name__] += 1

    def snapshot(self) -> BackendStatistics:
        """The numbers now."""
        errors = self._errors.total()
        return BackendStatistics(
            requests=self.success + errors + self.cancelled,
            success=self.success,
            errors=errors,
            cancelled=self.cancelled,
            errors_by_class=dict(self._errors),
            taken_over=self.taken_over,
            in_flight=self.in_flight,
            duration=self._durations.distribution(),
        )
