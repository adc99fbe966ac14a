"""The few figures that a supervisor reads out of vLLM's ``/metrics``."""

from __future__ import annotations

import re

# Of vLLM 0.6 to 0.32. The tokens are counted when a request's prefill is done; while it lasts, over
# many steps, only the use of the KV cache moves.
_MOVING = re.compile(
    rb"^vllm:(?:prompt_tokens_total|generation_tokens_total|kv_cache_usage_perc"
    rb"|gpu_cache_usage_perc)(?:\{[^\n]*\})? ([0-9.eE+-]+)",
    re.MULTILINE,
)
_INSIDE = re.compile(
    rb"^vllm:num_requests_(?:running|waiting|swapped)(?:\{[^\n]*\})? ([0-9.eE+-]+)", re.MULTILINE
)


def work_done(metrics: bytes) -> float | None:
    """A figure that changes when the engine works; ``None`` where the server tells none."""
    return _sum(_MOVING, metrics)


def requests_inside(metrics: bytes) -> float | None:
    """Requests that run or wait; ``None`` where the server tells none."""
    return _sum(_INSIDE, metrics)


def _sum(pattern: re.Pattern[bytes], metrics: bytes) -> float | None:
    found = pattern.findall(metrics)
    return sum(map(float, found)) if found else None
