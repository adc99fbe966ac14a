"""What a server says at ``/metrics``: samples, and histograms of them. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping

import msgspec

from vllm_unified.errors import ProtocolError

Sample = tuple[Mapping[str, str], float]
"""Labels, and the value."""

_OWN_NAMES = "vllm:"
_OTHER_NAMES = {"process_start_time_seconds", "http_requests_total"}


class Histogram(msgspec.Struct, frozen=True):
    """Observations in buckets, as Prometheus counts them."""

    bounds: tuple[float, ...]
    """Upper edges of the buckets, ascending; the last one is infinite."""
    counts: tuple[float, ...]
    """How many were at most the bound: those of lower buckets are in those of higher ones."""
    sum: float

    @property
    def count(self) -> int:
        """All of them."""
        return int(self.counts[-1])

    @property
    def mean(self) -> float | None:
        """``None`` where nothing was observed."""
        return self.sum / self.count if self.count else None

    def quantile(self, q: float) -> float | None:
        """As Prometheus' ``histogram_quantile``: linear within the bucket where the rank falls.

        So it is as exact as that bucket is wide. The highest bucket is open; what falls in there
        counts as its lower edge. ``None`` where nothing was observed.
        """
        if not self.count:
            return None
        rank = q * self.counts[-1]
        bucket = min(bisect_left(self.counts, rank), len(self.bounds) - 1)
        low = self.bounds[bucket - 1] if bucket else 0.0
        below = self.counts[bucket - 1] if bucket else 0.0
        if math.isinf(self.bounds[bucket]):
            return low
        inside = self.counts[bucket] - below
        share = (rank - below) / inside if inside else 1.0
        return low + (self.bounds[bucket] - low) * share

    def since(self, before: Histogram | None) -> Histogram:
        """What came after ``before``."""
        if before is None:
            return self
        earlier = dict(zip(before.bounds, before.counts, strict=True))
        shared = [
            (bound, max(0.0, count - earlier[bound]))
            for bound, count in zip(self.bounds, self.counts, strict=True)
            if bound in earlier
        ]
        bounds, counts = zip(*shared, strict=True)
        return Histogram(bounds, counts, max(0.0, self.sum - before.sum))


def merged(histograms: Iterable[Histogram]) -> Histogram | None:
    """All observations together; in the buckets that all have, if they differ."""
    given = list(histograms)
    if not given:
        return None
    tables = [dict(zip(each.bounds, each.counts, strict=True)) for each in given]
    bounds = sorted(set.intersection(*map(set, tables)))
    counts = [sum(table[bound] for table in tables) for bound in bounds]
    return Histogram(tuple(bounds), tuple(counts), sum(each.sum for each in given))


class Scrape(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the samples of a server."""

    clock: float
    """When it was, in monotonic seconds."""
    unix: float
    """The same, in seconds since the Unix epoch."""
    samples: Mapping[str, list[Sample]]
    """By name."""

    @property
    def models(self) -> list[str]:
        """The names that its series have as ``model_name``, in their order."""
        found: dict[str, None] = {}
        for samples in self.samples.values():
            found |= {labels["model_name"]: None for labels, _ in samples if "model_name" in labels}
        return list(found)

    @property
    def started(self) -> float | None:
        """When the server started, in seconds since the Unix epoch.

        Of its process, else when its counters were made. Servers with several processes for HTTP
        (``--api-server-count``) say neither.
        """
        names = ("process_start_time_seconds", "vllm:generation_tokens_created")
        values = [value for name in names for _, value in self.samples.get(name, ())]
        return values[0] if values else None

    def of(self, model: str) -> Scrape:
        """The series of this model, and those that are of none."""
        kept = {
            name: [each for each in samples if each[0].get("model_name", model) == model]
            for name, samples in self.samples.items()
        }
        return msgspec.structs.replace(self, samples=kept)

    def find(self, *names: str) -> list[Sample]:
        """The samples of the first of these names that there is."""
        return next((self.samples[name] for name in names if self.samples.get(name)), [])

    def total(self, *names: str) -> float | None:
        """Their sum over all engines; ``None`` where there are none."""
        samples = self.find(*names)
        return sum(value for _, value in samples) if samples else None

    def histogram(self, *names: str) -> Histogram | None:
        """The first of these histograms that there is, over all engines."""
        for name in names:
            buckets = self.samples.get(f"{name}_bucket")
            if buckets:
                sums = sum(value for _, value in self.samples.get(f"{name}_sum", ()))
                return _histogram(buckets, sums)
        return None


def _histogram(buckets: Iterable[Sample], sum: float) -> Histogram | None:
    series: dict[tuple[tuple[str, str], ...], dict[float, float]] = {}
    for labels, value in buckets:
        bound = float(labels["le"])
        key = tuple(sorted(pair for pair in labels.items() if pair[0] != "le"))
        series.setdefault(key, {})[bound] = value
    engines = []
    for table in series.values():
        table.setdefault(math.inf, max(table.values()))
        bounds = tuple(sorted(table))
        engines.append(Histogram(bounds, tuple(table[bound] for bound in bounds), 0.0))
    found = merged(engines)
    return None if found is None else msgspec.structs.replace(found, sum=sum)


def read_metrics(text: str, *, clock: float, unix: float) -> Scrape:
    """The samples that say something about vLLM; a counter has ``_total`` in its name.

    It takes about 8 ms for what one engine of vLLM 0.32 says.

    Raises:
        ProtocolError: it is not Prometheus' text format.
    """
    # Slow to import, and only needed here.
    from prometheus_client.parser import text_string_to_metric_families

    samples: dict[str, list[Sample]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if _is_wanted(sample.name) and math.isfinite(sample.value):
                    samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        _check_bounds(samples)
    except (ValueError, LookupError) as error:
        raise ProtocolError(
            f"/metrics is not in Prometheus' format: {error}; it begins {text[:120]!r}"
        ) from error
    return Scrape(clock=clock, unix=unix, samples=samples)


def _is_wanted(name: str) -> bool:
    return name.startswith(_OWN_NAMES) or name in _OTHER_NAMES


def _check_bounds(samples: Mapping[str, list[Sample]]) -> None:
    for name, found in samples.items():
        if name.endswith("_bucket"):
            for labels, _ in found:
                float(labels["le"])
