"""Samples and histograms out of ``/metrics``."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models.recorded import METRICS, V0_11
from vllm_unified import ProtocolError
from vllm_unified.models.metrics import Histogram, Scrape, merged, read_metrics

INF = math.inf


def scrape(text: str, *, clock: float = 0.0, unix: float = 0.0) -> Scrape:
    return read_metrics(text, clock=clock, unix=unix)


def test_counters_have_their_suffix_and_histograms_their_parts() -> None:
    found = scrape(METRICS)
    assert found.total("vllm:generation_tokens_total") == 361
    assert found.total("vllm:generation_tokens") is None
    first = found.histogram("vllm:time_to_first_token_seconds")
    assert first is not None
    assert (first.count, first.bounds[-1]) == (13, INF)
    assert first.sum == pytest.approx(1.9054815769)


def test_a_histogram_may_be_named_total() -> None:
    steps = scrape(METRICS).histogram("vllm:iteration_tokens_total")
    assert steps is not None
    assert (steps.count, steps.sum) == (361, 1254)


def test_the_first_name_that_there_is_counts() -> None:
    found = scrape(METRICS)
    assert found.total("vllm:no_such_thing", "vllm:prefix_cache_hits_total") == 1280
    assert found.find("vllm:no_such_thing") == []
    assert found.histogram("vllm:no_such_thing") is None


def test_engines_are_added_up() -> None:
    found = scrape(V0_11)
    assert found.total("vllm:num_requests_running") == 4
    latency = found.histogram("vllm:inter_token_latency_seconds")
    assert latency is not None
    assert (latency.bounds, latency.counts) == ((0.01, 0.02, INF), (4, 7, 8))
    assert latency.sum == pytest.approx(0.12)


def test_series_of_one_model_and_those_of_none() -> None:
    text = (
        'vllm:generation_tokens_total{model_name="a"} 1\n'
        'vllm:generation_tokens_total{model_name="b"} 2\n'
        'http_requests_total{handler="/v1/completions",status="2xx"} 3\n'
    )
    found = scrape(text)
    assert found.models == ["a", "b"]
    assert found.of("b").total("vllm:generation_tokens_total") == 2
    assert found.of("b").total("http_requests_total") == 3


def test_when_the_server_started() -> None:
    assert scrape(METRICS).started == pytest.approx(1.79538432177e9)
    created = "# TYPE vllm:generation_tokens_created gauge\nvllm:generation_tokens_created 1.5e+09"
    assert scrape(created).started == 1.5e9
    assert scrape(V0_11).started is None


def test_labels_are_unescaped() -> None:
    line = 'vllm:x{model_name="C:\\\\m\\"q\\"",le="1"} 1\n'
    assert scrape(line).models == ['C:\\m"q"']


@pytest.mark.parametrize("value", ["NaN", "+Inf"])
def test_what_is_no_number_is_not_there(value: str) -> None:
    assert scrape(f"vllm:num_requests_running {value}\n").total("vllm:num_requests_running") is None


@pytest.mark.parametrize(
    "text",
    [
        "<html><body>Bad gateway</body></html>",
        '{"error": "no"}',
        'vllm:x{model_name="a} 1',
        "vllm:x many",
        'vllm:x_bucket{model_name="a"} 1',
        'vllm:x_bucket{le="wide"} 1',
    ],
)
def test_what_is_no_exposition_is_told(text: str) -> None:
    with pytest.raises(ProtocolError, match="/metrics is not in Prometheus' format"):
        scrape(text)


@given(st.text())
def test_any_text_is_read_or_told(text: str) -> None:
    try:
        found = scrape("vllm:" + text)
    except ProtocolError:
        return
    assert isinstance(found, Scrape)


# Quantiles


def test_quantiles_are_linear_in_their_bucket() -> None:
    histogram = Histogram((1.0, 2.0, 4.0, INF), (2, 6, 10, 10), 20.0)
    assert histogram.quantile(0.1) == 0.5
    assert histogram.quantile(0.2) == 1.0
    assert histogram.quantile(0.4) == 1.5
    assert histogram.quantile(0.8) == 3.0
    assert histogram.quantile(1) == 4.0
    assert histogram.mean == 2.0


def test_the_open_bucket_counts_as_its_lower_edge() -> None:
    assert Histogram((1.0, INF), (1, 10), 99.0).quantile(0.99) == 1.0


def test_of_nothing_there_is_no_quantile() -> None:
    empty = Histogram((1.0, INF), (0, 0), 0.0)
    assert (empty.quantile(0.5), empty.mean, empty.count) == (None, None, 0)


def test_a_quantile_is_in_the_bucket_of_the_true_one() -> None:
    chance = random.Random(7)
    values = sorted(chance.expovariate(10) for _ in range(1000))
    bounds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, INF)
    counts = tuple(float(sum(value <= bound for value in values)) for bound in bounds)
    histogram = Histogram(bounds, counts, sum(values))
    for q in (0.5, 0.9, 0.99):
        true = values[math.ceil(q * 1000) - 1]
        found = histogram.quantile(q)
        assert found is not None
        upper = next(bound for bound in bounds if true <= bound)
        lower = max((bound for bound in bounds if bound < true), default=0.0)
        assert lower <= found <= upper


def test_what_came_since() -> None:
    before = Histogram((1.0, INF), (3, 4), 5.0)
    now = Histogram((1.0, INF), (3, 9), 25.0)
    assert now.since(before) == Histogram((1.0, INF), (0, 5), 20.0)
    assert now.since(None) is now


def test_histograms_with_other_buckets_are_merged_where_they_agree() -> None:
    fine = Histogram((0.5, 1.0, 2.0, INF), (1, 2, 3, 4), 1.0)
    coarse = Histogram((1.0, INF), (5, 6), 2.0)
    assert merged([fine, coarse]) == Histogram((1.0, INF), (7, 10), 3.0)
    assert merged([]) is None
