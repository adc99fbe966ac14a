"""What the servers' counters add up to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import msgspec

from vllm_unified.errors import NotFoundError
from vllm_unified.models.metrics import Histogram, Scrape, merged

# The newest name first; a server has one of them, or both while the older one is deprecated.
_KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_HITS = ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total")
_QUERIES = ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total")
_HIT_RATE = "vllm:gpu_prefix_cache_hit_rate"
_GENERATED = "vllm:generation_tokens_total"
_PROMPT = "vllm:prompt_tokens_total"
_FINISHED = "vllm:request_success_total"
_HISTOGRAMS: Mapping[str, tuple[str, ...]] = {
    "ttft": ("vllm:time_to_first_token_seconds",),
    "inter_token_latency": (
        "vllm:inter_token_latency_seconds",
        "vllm:time_per_output_token_seconds",
    ),
    "queue_time": ("vllm:request_queue_time_seconds", "vllm:time_in_queue_requests"),
    "e2e": ("vllm:e2e_request_latency_seconds",),
    "tokens": ("vllm:request_generation_tokens",),
}
_CLOCK_STEP = 0.5
"""Seconds that a process's start may seem to move by without a restart."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """A histogram of the server, in seconds; ``None`` where nothing was observed.

    The percentiles are as exact as vLLM's buckets are wide: linear within a bucket, as Prometheus'
    ``histogram_quantile`` has it. The highest bucket is open, and counts as its lower edge.
    """

    count: int
    mean: float | None
    """Exact: sum over count."""
    p50: float | None
    p90: float | None
    p99: float | None


class ServerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a server did, for everybody: since its start, or in a window.

    Over all of its engines (data parallel ranks). An average of nothing is ``None``.
    """

    requests_processed: int
    """That ended, however: ``vllm:request_success``. Not those whose client left."""
    tokens_generated: int
    """``vllm:generation_tokens``, of requests that still run too."""
    prompt_tokens: int
    """``vllm:prompt_tokens``, those from the prefix cache included."""
    avg_tokens_per_request: float | None
    """Generated tokens: the mean of ``vllm:request_generation_tokens``."""
    avg_generation_time: float | None
    """Seconds from arrival to the last token: the mean of ``vllm:e2e_request_latency_seconds``."""
    throughput: float | None
    """Generated tokens per second in the window; without one, since this client asked this server
    last, and the first time since its start. Of several servers, the sum."""
    errors: int
    """Answers 4xx and 5xx at routes that there are (``http_requests_total``), and requests that the
    engine ended with an error (``vllm:request_success``), which is in both if it was not streamed.
    Wrong keys are not counted by vLLM."""
    uptime: float | None
    """Seconds, by this machine's clock: since ``process_start_time_seconds``. The youngest's, of
    several. ``None`` with several processes for HTTP."""
    running: int
    """Requests in the batch now: ``vllm:num_requests_running``."""
    waiting: int
    """Requests in the server's line now: ``vllm:num_requests_waiting``."""
    kv_cache_usage: float | None
    """0 to 1, now: ``vllm:kv_cache_usage_perc``; the mean over the engines."""
    prefix_cache_hit_rate: float | None
    """0 to 1: the share of prompt tokens that were found, ``vllm:prefix_cache_hits`` over
    ``_queries``. vLLM 0.6 and 0.7 say only a share of their own."""
    preemptions: int
    """Requests that gave up their KV blocks to others: ``vllm:num_preemptions``."""
    ttft: Latency
    """To the first token, from arrival: ``vllm:time_to_first_token_seconds``."""
    inter_token_latency: Latency
    """From one output to the next: ``vllm:inter_token_latency_seconds``."""
    queue_time: Latency
    """In the server's line: ``vllm:request_queue_time_seconds``."""
    e2e: Latency
    """From arrival to the end: ``vllm:e2e_request_latency_seconds``."""


class ModelStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of a model at a server, or at all servers of a fleet together."""

    model: str
    """The base model's name: vLLM does not tell its adapters apart."""
    endpoint: str
    """Address of the server; of several, with commas between."""
    statistics: ServerStatistics
    interval: float | None
    """Seconds that ``throughput`` is over; the longest of several."""
    restarted: bool
    """Whether a server was started anew since it was asked last; its counters began at 0."""
    endpoints: dict[str, ServerStatistics]
    """Of each server alone, by the id of its endpoint."""
    unavailable: dict[str, str]
    """Endpoints that did not answer, or do not serve the model, and why; they are in no sum."""


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of one server, before they are divided by anything."""

    counts: Mapping[str, float]
    histograms: Mapping[str, Histogram]
    gauges: Mapping[str, Sequence[float]]
    """One of each engine."""
    uptime: float | None
    interval: float | None
    """Seconds in which ``generated`` tokens came."""
    generated: float


def check_series(scrape: Scrape) -> None:
    """Raises NotFoundError for a page without the engine's series."""
    if scrape.total(_GENERATED) is None and scrape.total("vllm:num_requests_running") is None:
        raise NotFoundError(
            "/metrics has none of vLLM's series",
            hint="The server runs with --disable-log-stats: start it without. Or is this the "
            "address of something else?",
        )


def was_restarted(before: Scrape, now: Scrape) -> bool:
    """Whether another process answers, or counters fell."""
    starts = [each.started for each in (before, now) if each.started is not None]
    if len(starts) == 2 and abs(starts[1] - starts[0]) > _CLOCK_STEP:
        return True
    pairs = ((now.total(name), before.total(name)) for name in (_GENERATED, _PROMPT, _FINISHED))
    return any((new or 0) < (old or 0) for new, old in pairs)


def tally(now: Scrape, *, since: Scrape | None = None, last: Scrape | None = None) -> Tally:
    """The numbers of one model at one server.

    Args:
        since: Count from there; ``None``: from the server's start.
        last: The throughput is from there; ``None``: from the server's start.
    """
    if since is not None and was_restarted(since, now):
        since = None
    uptime = None if now.started is None else max(0.0, now.unix - now.started)
    interval = uptime
    if last is not None:
        interval = now.clock - last.clock
        if was_restarted(last, now):
            last = None
            interval = interval if uptime is None else min(interval, uptime)
    before = {} if since is None else _counts(since)
    earlier = (None if last is None else last.total(_GENERATED)) or 0.0
    return Tally(
        counts={name: value - before.get(name, 0.0) for name, value in _counts(now).items()},
        histograms=_histograms(now, since),
        gauges=_gauges(now),
        uptime=uptime,
        interval=interval,
        generated=(now.total(_GENERATED) or 0.0) - earlier,
    )


def statistics_of(tallies: Sequence[Tally]) -> ServerStatistics:
    """What they add up to."""

    def count(name: str) -> int:
        return round(sum(each.counts.get(name, 0.0) for each in tallies))

    def histogram(name: str) -> Histogram | None:
        return merged(each.histograms[name] for each in tallies if name in each.histograms)

    def gauges(name: str) -> list[float]:
        return [value for each in tallies for value in each.gauges[name]]

    tokens, e2e = histogram("tokens"), histogram("e2e")
    uptimes = [each.uptime for each in tallies if each.uptime is not None]
    rates = [each.generated / each.interval for each in tallies if each.interval]
    hits, queries = count("hits"), count("queries")
    return ServerStatistics(
        requests_processed=count("finished"),
        tokens_generated=count("generated"),
        prompt_tokens=count("prompt"),
        avg_tokens_per_request=None if tokens is None else tokens.mean,
        avg_generation_time=None if e2e is None else e2e.mean,
        throughput=sum(rates) if rates else None,
        errors=count("errors"),
        uptime=min(uptimes, default=None),
        running=round(sum(gauges("running"))),
        waiting=round(sum(gauges("waiting"))),
        kv_cache_usage=_mean(gauges("kv_usage")),
        prefix_cache_hit_rate=hits / queries if queries else _mean(gauges("hit_rate")),
        preemptions=count("preemptions"),
        ttft=_latency(histogram("ttft")),
        inter_token_latency=_latency(histogram("inter_token_latency")),
        queue_time=_latency(histogram("queue_time")),
        e2e=_latency(e2e),
    )


def _counts(scrape: Scrape) -> dict[str, float]:
    return {
        "finished": scrape.total(_FINISHED) or 0.0,
        "generated": scrape.total(_GENERATED) or 0.0,
        "prompt": scrape.total(_PROMPT) or 0.0,
        "preemptions": scrape.total("vllm:num_preemptions_total") or 0.0,
        "hits": scrape.total(*_HITS) or 0.0,
        "queries": scrape.total(*_QUERIES) or 0.0,
        "errors": _errors(scrape),
    }


def _errors(scrape: Scrape) -> float:
    """A request that admission control refused has its 503 among the answers."""
    answers = scrape.find("http_requests_total")
    refused = sum(
        value
        for labels, value in answers
        if labels.get("status", "")[:1] in ("4", "5") and labels.get("handler") != "none"
    )
    if not answers:
        refused = scrape.total("vllm:admission_rejections_total") or 0.0
    finished = scrape.find(_FINISHED)
    return refused + sum(
        value for labels, value in finished if labels.get("finished_reason") == "error"
    )


def _histograms(now: Scrape, since: Scrape | None) -> dict[str, Histogram]:
    found = {}
    for name, series in _HISTOGRAMS.items():
        histogram = now.histogram(*series)
        if histogram is not None:
            before = None if since is None else since.histogram(*series)
            found[name] = histogram.since(before)
    return found


def _gauges(scrape: Scrape) -> dict[str, list[float]]:
    names = {
        "running": ("vllm:num_requests_running",),
        "waiting": ("vllm:num_requests_waiting",),
        "kv_usage": _KV_USAGE,
        "hit_rate": (_HIT_RATE,),
    }
    # vLLM 0.6 has a share of -1 where the cache is off.
    return {
        name: [value for _, value in scrape.find(*series) if value >= 0]
        for name, series in names.items()
    }


def _latency(histogram: Histogram | None) -> Latency:
    if histogram is None:
        return Latency(count=0, mean=None, p50=None, p90=None, p99=None)
    return Latency(
        count=histogram.count,
        mean=histogram.mean,
        p50=histogram.quantile(0.5),
        p90=histogram.quantile(0.9),
        p99=histogram.quantile(0.99),
    )


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return fmean(values) if values else None
