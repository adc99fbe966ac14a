"""The text of ``GET /metrics``, in Prometheus' format."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping

from vllm_unified.simulator.config import SimulatorConfig
from vllm_unified.simulator.engine import Engine
from vllm_unified.simulator.metrics import FINISH_REASONS, REJECTIONS, Histogram, HttpMetrics

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
Labels = Mapping[str, str]

_HELP = {
    "num_requests_running": "Number of requests in model execution batches.",
    "num_requests_waiting": "Number of requests waiting to be processed.",
    "num_requests_waiting_by_reason": "Number of waiting requests by reason.",
    "engine_sleep_state": "Engine sleep state; awake = 0 means engine is sleeping; "
    "awake = 1 means engine is awake; weights_offloaded = 1 means sleep level 1; "
    "discard_all = 1 means sleep level 2.",
    "kv_cache_usage_perc": "KV-cache usage. 1 means 100 percent usage.",
    "prefix_cache_queries": "Prefix cache queries, in terms of number of queried tokens.",
    "prefix_cache_hits": "Prefix cache hits, in terms of number of cached tokens.",
    "num_preemptions": "Cumulative number of preemption from the engine.",
    "prompt_tokens": "Number of prefill tokens processed.",
    "prompt_tokens_by_source": "Number of prompt tokens by source.",
    "prompt_tokens_cached": "Number of cached prompt tokens (local + external).",
    "generation_tokens": "Number of generation tokens processed.",
    "request_success": "Count of successfully processed requests.",
    "admission_rejections": "Number of admission attempts rejected by a queue limit, by reason.",
    "iteration_tokens_total": "Histogram of number of tokens per engine_step.",
    "time_to_first_token_seconds": "Histogram of time to first token in seconds.",
    "inter_token_latency_seconds": "Histogram of inter-token latency in seconds.",
    "e2e_request_latency_seconds": "Histogram of e2e request latency in seconds.",
    "lora_requests_info": "Running stats on lora requests.",
    "cache_config_info": "Information of the LLMEngine CacheConfig",
}


class Page:
    """Lines of an exposition, under construction."""

    def __init__(self, created: float) -> None:
        self._created = created
        self._lines: list[str] = []

    def text(self) -> str:
        """All lines so far."""
        return "\n".join(self._lines) + "\n"

    def gauge(self, name: str, samples: Iterable[tuple[Labels, float]]) -> None:
        """A gauge with one sample per set of labels."""
        self._head(name, "gauge")
        self._lines += [_line(name, labels, value) for labels, value in samples]

    def counter(self, name: str, samples: Iterable[tuple[Labels, float]]) -> None:
        """A counter, with the creation time of every sample, as prometheus_client writes it."""
        samples = list(samples)
        self._head(f"{name}_total", "counter", name)
        self._lines += [_line(f"{name}_total", labels, value) for labels, value in samples]
        self._head(f"{name}_created", "gauge", name)
        self._lines += [_line(f"{name}_created", labels, self._created) for labels, _ in samples]

    def histogram(self, name: str, samples: Iterable[tuple[Labels, Histogram]]) -> None:
        """A histogram with cumulative buckets."""
        samples = list(samples)
        self._head(name, "histogram")
        for labels, histogram in samples:
            total = 0
            bounds = [str(bound) for bound in histogram.bounds] + ["+Inf"]
            for bound, count in zip(bounds, histogram.counts, strict=True):
                total += count
                self._lines.append(_line(f"{name}_bucket", {**labels, "le": bound}, total))
            self._lines.append(_line(f"{name}_count", labels, total))
            self._lines.append(_line(f"{name}_sum", labels, histogram.sum))
        self._head(f"{name}_created", "gauge", name)
        self._lines += [_line(f"{name}_created", labels, self._created) for labels, _ in samples]

    def summary(self, name: str, samples: Iterable[tuple[Labels, int, int]]) -> None:
        """A summary without quantiles: labels, count and sum."""
        self._head(name, "summary")
        for labels, count, total in samples:
            self._lines.append(_line(f"{name}_count", labels, count))
            self._lines.append(_line(f"{name}_sum", labels, total))

    def _head(self, name: str, kind: str, documented: str | None = None) -> None:
        text = _HELP.get((documented or name).removeprefix("vllm:"), documented or name)
        self._lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _line(name: str, labels: Labels, value: float) -> str:
    pairs = ",".join(f'{key}="{_escape(labels[key])}"' for key in sorted(labels))
    return f"{name}{{{pairs}}} {float(value)}" if pairs else f"{name} {float(value)}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def render(engine: Engine, http: HttpMetrics, started: float) -> str:
    """The whole page.

    Args:
        engine: whose state and counters.
        http: requests that were answered.
        started: when this server started, in seconds since the epoch.
    """
    page = Page(engine.metrics.created)
    _process(page, started)
    if not engine.config.disable_log_stats:
        labels = {"model_name": engine.config.names[0], "engine": "0"}
        _gauges(page, engine, labels)
        _counters(page, engine, labels)
        for name, histogram in engine.metrics.histograms.items():
            page.histogram(f"vllm:{name}", [(labels, histogram)])
        _info(page, engine)
    _requests(page, http)
    return page.text()


def _process(page: Page, started: float) -> None:
    version = {"major": str(sys.version_info[0]), "minor": str(sys.version_info[1])}
    page.gauge("python_info", [({"implementation": "CPython", **version}, 1)])
    page.gauge("process_start_time_seconds", [({}, started)])
    times = os.times()
    page.counter("process_cpu_seconds", [({}, times.user + times.system)])


def _gauges(page: Page, engine: Engine, labels: dict[str, str]) -> None:
    waiting = engine.waiting
    page.gauge("vllm:num_requests_running", [(labels, len(engine.running))])
    page.gauge("vllm:num_requests_waiting", [(labels, waiting)])
    reasons = [({**labels, "reason": "capacity"}, waiting), ({**labels, "reason": "deferred"}, 0)]
    page.gauge("vllm:num_requests_waiting_by_reason", reasons)
    states = {"awake": engine.sleep_level is None}
    states |= {"weights_offloaded": engine.sleep_level == 1, "discard_all": engine.sleep_level == 2}
    page.gauge(
        "vllm:engine_sleep_state",
        [({**labels, "sleep_state": state}, float(on)) for state, on in states.items()],
    )
    page.gauge("vllm:kv_cache_usage_perc", [(labels, engine.cache.usage)])


def _counters(page: Page, engine: Engine, labels: dict[str, str]) -> None:
    metrics, cache = engine.metrics, engine.cache
    page.counter("vllm:prefix_cache_queries", [(labels, cache.queries)])
    page.counter("vllm:prefix_cache_hits", [(labels, cache.hits)])
    for name in ("external_prefix_cache", "mm_cache"):
        page.counter(f"vllm:{name}_queries", [(labels, 0)])
        page.counter(f"vllm:{name}_hits", [(labels, 0)])
    page.counter("vllm:num_preemptions", [(labels, metrics.preemptions)])
    page.counter("vllm:prompt_tokens", [(labels, metrics.prompt_tokens)])
    sources = {"local_compute": metrics.prompt_tokens - metrics.cached_tokens}
    sources |= {"local_cache_hit": metrics.cached_tokens, "external_kv_transfer": 0}
    by_source = [({**labels, "source": source}, count) for source, count in sources.items()]
    page.counter("vllm:prompt_tokens_by_source", by_source)
    page.counter("vllm:prompt_tokens_cached", [(labels, metrics.cached_tokens)])
    page.counter("vllm:generation_tokens", [(labels, metrics.generation_tokens)])
    page.counter(
        "vllm:request_success",
        [({**labels, "finished_reason": r}, metrics.success[r]) for r in FINISH_REASONS],
    )
    model = {"model_name": labels["model_name"]}
    page.counter(
        "vllm:admission_rejections",
        [({**model, "reason": reason}, metrics.rejections[reason]) for reason in REJECTIONS],
    )


def _info(page: Page, engine: Engine) -> None:
    config = engine.config
    if config.enable_lora:
        adapters = {
            "max_lora": str(config.max_loras),
            "running_lora_adapters": ",".join(engine.running_adapters()),
            "waiting_lora_adapters": ",".join(engine.waiting_adapters()),
        }
        page.gauge("vllm:lora_requests_info", [(adapters, time.time())])
    page.gauge("vllm:cache_config_info", [(_cache_labels(config), 1)])


def _cache_labels(config: SimulatorConfig) -> dict[str, str]:
    return {
        "block_size": str(config.block_size),
        "cache_dtype": "auto",
        "enable_prefix_caching": str(config.enable_prefix_caching),
        "engine": "0",
        "gpu_memory_utilization": "0.92",
        "kv_cache_size_tokens": str(config.num_blocks * config.block_size),
        "num_gpu_blocks": str(config.num_blocks),
        "num_cpu_blocks": "None",
        "prefix_caching_hash_algo": "sha256",
        "sliding_window": "None",
    }


def _requests(page: Page, http: HttpMetrics) -> None:
    page.counter(
        "http_requests",
        [
            ({"handler": handler, "method": method, "status": status}, count)
            for (handler, method, status), count in http.requests.items()
        ],
    )
    sizes = [({"handler": handler}, *size) for handler, size in http.sizes.items()]
    page.summary("http_request_size_bytes", [(lab, n, received) for lab, n, received, _ in sizes])
    page.summary("http_response_size_bytes", [(lab, n, sent) for lab, n, _, sent in sizes])
    page.histogram(
        "http_request_duration_seconds",
        [
            ({"handler": handler, "method": method}, histogram)
            for (handler, method), histogram in http.durations.items()
        ],
    )
