"""What the engine and the HTTP layer counted, under the names of ``vllm/v1/metrics/loggers.py``."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_unified.simulator.engine import Generation

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
REJECTIONS = ("max_num_queued_reqs", "max_num_queued_tokens")

_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def token_buckets(max_model_len: int) -> tuple[float, ...]:
    """Bounds for numbers of tokens: 1, 2, 5, 10, 20, ... up to the length of the context."""
    bounds = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    return tuple(float(bound) for bound in bounds if bound <= max_model_len)


class Histogram:
    """A Prometheus histogram."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(float(bound) for bound in bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """Values counted."""
        return sum(self.counts)


class EngineMetrics:
    """Counters and histograms of the engine, fed as sequences run and finish."""

    def __init__(self, max_model_len: int) -> None:
        tokens = token_buckets(max_model_len)
        self.created = time.time()
        """When counting began, in seconds since the epoch."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.preemptions = 0
        self.success: Counter[str] = Counter()
        self.rejections: Counter[str] = Counter()
        self.histograms = {
            "request_prompt_tokens": Histogram(tokens),
            "request_generation_tokens": Histogram(tokens),
            "iteration_tokens_total": Histogram(_ITERATION),
            "request_max_num_generation_tokens": Histogram(tokens),
            "request_params_n": Histogram((1, 2, 5, 10, 20)),
            "request_params_max_tokens": Histogram(tokens),
            "time_to_first_token_seconds": Histogram(_FIRST_TOKEN),
            "inter_token_latency_seconds": Histogram(_INTER_TOKEN),
            "request_time_per_output_token_seconds": Histogram(_INTER_TOKEN),
            "e2e_request_latency_seconds": Histogram(_LATENCY),
            "request_queue_time_seconds": Histogram(_LATENCY),
            "request_inference_time_seconds": Histogram(_LATENCY),
            "request_prefill_time_seconds": Histogram(_LATENCY),
            "request_decode_time_seconds": Histogram(_LATENCY),
            "request_num_preemptions": Histogram((0, 1, 2, 4, 8, 16, 32, 64, 128, 256)),
            "request_prefill_kv_computed_tokens": Histogram(tokens),
        }

    def token(self, generation: Generation, now: float) -> None:
        """Count one token of a sequence, at a monotonic time in seconds."""
        self.generation_tokens += 1
        if generation.first_token is None:
            self._first_token(generation, now)
        else:
            previous = generation.last_token or now
            self._observe("inter_token_latency_seconds", now - previous)
            self._observe("iteration_tokens_total", 1)
        generation.last_token = now

    def _first_token(self, generation: Generation, now: float) -> None:
        generation.first_token = now
        prompt = len(generation.job.prompt)
        self.prompt_tokens += prompt
        self.cached_tokens += generation.cached_tokens
        self._observe("time_to_first_token_seconds", now - generation.arrived)
        self._observe("iteration_tokens_total", prompt - generation.cached_tokens + 1)

    def finished(self, generation: Generation) -> None:
        """Count one sequence that is over, whatever its outcome."""
        now = time.monotonic()
        job, produced = generation.job, len(generation.output.tokens)
        self.success[str(generation.finish_reason)] += 1
        self._observe("request_prompt_tokens", len(job.prompt))
        self._observe("request_generation_tokens", produced)
        self._observe("request_max_num_generation_tokens", produced)
        self._observe("request_params_n", job.sampling.n)
        self._observe("request_params_max_tokens", job.sampling.max_tokens)
        self._observe("e2e_request_latency_seconds", now - generation.arrived)
        self._observe("request_num_preemptions", generation.preemptions)
        if generation.scheduled is not None:
            self._phases(generation, generation.scheduled, produced)

    def _phases(self, generation: Generation, scheduled: float, produced: int) -> None:
        self._observe("request_queue_time_seconds", scheduled - generation.arrived)
        computed = len(generation.job.prompt) - generation.cached_tokens
        self._observe("request_prefill_kv_computed_tokens", computed)
        first, last = generation.first_token, generation.last_token
        if first is None or last is None:
            return
        self._observe("request_prefill_time_seconds", first - scheduled)
        self._observe("request_decode_time_seconds", last - first)
        self._observe("request_inference_time_seconds", last - scheduled)
        if produced > 1:
            per_token = (last - first) / (produced - 1)
            self._observe("request_time_per_output_token_seconds", per_token)

    def _observe(self, name: str, value: float) -> None:
        self.histograms[name].observe(value)


_EXCLUDED = ("/metrics", "/health", "/load", "/ping", "/version", "/server_info", "/simulator")
"""Paths that are not counted. vLLM searches them anywhere, so ``/load`` hides
``/v1/load_lora_adapter`` too; ``/simulator`` is this server's own."""


class HttpMetrics:
    """Requests by handler, method and class of status, as prometheus_fastapi_instrumentator."""

    def __init__(self) -> None:
        self.created = time.time()
        self.requests: Counter[tuple[str, str, str]] = Counter()
        self.sizes: dict[str, tuple[int, int, int]] = {}
        """By handler: requests, bytes received, bytes sent."""
        self.durations: dict[tuple[str, str], Histogram] = {}
        """By handler and method, in seconds."""

    def record(
        self, handler: str, method: str, status: int, seconds: float, received: int, sent: int
    ) -> None:
        """Count one request that was answered, or cut."""
        if any(path in handler for path in _EXCLUDED):
            return
        self.requests[handler, method, f"{status // 100}xx"] += 1
        count, bytes_in, bytes_out = self.sizes.get(handler, (0, 0, 0))
        self.sizes[handler] = (count + 1, bytes_in + received, bytes_out + sent)
        histogram = self.durations.setdefault((handler, method), Histogram((0.1, 0.5, 1.0)))
        histogram.observe(seconds)
