"""What is counted, where it is shown, and what the two texts say of it."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.endpoints.histogram import BUCKET_BOUNDS
from vllm_unified.endpoints.stats import (
    NO_ENDPOINT,
    OTHER_MODELS,
    EndpointStats,
    Statistics,
    StatsCell,
    StatsCollector,
)

A, B = "http://a:8000", "http://b:8000"
COUNTERS = (
    "requests success errors cancelled attempts retries prompt_tokens completion_tokens "
    "continued hedged"
).split()
HISTOGRAMS = "queue_wait time_to_first_token between_tokens duration".split()


def collector(max_models: int = 256) -> StatsCollector:
    return StatsCollector(now_unix=1000.0, max_models=max_models)


def snapshot(stats: StatsCollector, **in_flight: int) -> Statistics:
    return stats.snapshot(in_flight, now_unix=2000.0)


class Call(NamedTuple):
    """A call with one try."""

    endpoint: str
    model: str
    error: str | None
    cancelled: bool
    retry: bool
    tokens: int
    durations: tuple[float, float, float, float]


seconds = st.floats(0, 5000)
calls = st.builds(
    Call,
    endpoint=st.sampled_from([A, B, NO_ENDPOINT]),
    model=st.sampled_from(["m", "n", "o"]),
    error=st.sampled_from([None, "OverloadedError", "ConnectError"]),
    cancelled=st.booleans(),
    retry=st.booleans(),
    tokens=st.integers(0, 100),
    durations=st.tuples(seconds, seconds, seconds, seconds),
)


def record(cell: StatsCell, call: Call) -> None:
    cell.attempt(retry=call.retry)
    if call.error:
        cell.failed_attempt(call.error)
    cell.continued += call.tokens % 2
    cell.hedged += call.tokens % 3
    cell.between_tokens.record(call.durations[3])
    cell.finished(
        error=call.error,
        cancelled=call.cancelled,
        duration=call.durations[0],
        queue_wait=call.durations[1],
        time_to_first_token=call.durations[2],
        prompt_tokens=call.tokens,
        completion_tokens=2 * call.tokens,
    )


def expected(calls: list[Call]) -> dict[str, int]:
    return {
        "requests": len(calls),
        "success": sum(not call.cancelled and not call.error for call in calls),
        "errors": sum(not call.cancelled and bool(call.error) for call in calls),
        "cancelled": sum(call.cancelled for call in calls),
        "attempts": len(calls),
        "retries": sum(call.retry for call in calls),
        "prompt_tokens": sum(call.tokens for call in calls),
        "completion_tokens": sum(2 * call.tokens for call in calls),
        "continued": sum(call.tokens % 2 for call in calls),
        "hedged": sum(call.tokens % 3 for call in calls),
    }


def counters(stats: EndpointStats) -> dict[str, int]:
    return {name: getattr(stats, name) for name in COUNTERS}


def recorded(stats: EndpointStats) -> list[int]:
    """How many durations of each kind."""
    found = [getattr(stats, name) for name in HISTOGRAMS]
    return [0 if distribution is None else distribution.count for distribution in found]


def assert_adds_up(stats: EndpointStats, calls: list[Call]) -> None:
    wanted = expected(calls)
    failed = Counter(call.error for call in calls if call.error and not call.cancelled)
    assert counters(stats) == wanted
    assert stats.errors_by_class == failed
    assert stats.failed_attempts == Counter(call.error for call in calls if call.error)
    assert recorded(stats) == [len(calls)] * 3 + [wanted["success"]]


@given(st.lists(calls, max_size=30))
def test_every_view_adds_up_to_the_calls_of_it(calls: list[Call]) -> None:
    stats = collector()
    for call in calls:
        record(stats.cell(call.endpoint, call.model), call)
    found = snapshot(stats)

    assert_adds_up(found.overall, calls)
    assert set(found.endpoints) == {call.endpoint for call in calls}
    for endpoint, shown in found.endpoints.items():
        assert_adds_up(shown, [call for call in calls if call.endpoint == endpoint])
        assert stats.endpoint(endpoint, in_flight=0) == shown
    assert set(found.models) == {call.model for call in calls}
    for model, shown in found.models.items():
        assert_adds_up(shown, [call for call in calls if call.model == model])


@given(st.lists(calls, max_size=30), st.sets(st.integers(0, 29)), st.sampled_from([A, B]))
def test_forgetting_whenever_changes_nothing_but_the_view_by_endpoint(
    calls: list[Call], moments: set[int], endpoint: str
) -> None:
    """Calls that hold a cell record into it, whether it was forgotten in the meantime or not."""
    stats = collector()
    for number, call in enumerate(calls):
        cell = stats.cell(call.endpoint, call.model)
        if number in moments:
            stats.forget(endpoint)
        record(cell, call)
    stats.forget(endpoint)
    found = snapshot(stats)

    assert_adds_up(found.overall, calls)
    assert endpoint not in found.endpoints
    for model, shown in found.models.items():
        assert_adds_up(shown, [call for call in calls if call.model == model])


def test_quantiles_of_a_sum_are_those_of_all_that_was_recorded() -> None:
    stats = collector()
    for _ in range(90):
        stats.cell(A, "m").finished(duration=1.0)
    for _ in range(10):
        stats.cell(B, "m").finished(duration=100.0)

    duration = snapshot(stats).overall.duration

    assert duration is not None
    assert duration.p50 == pytest.approx(1.0, rel=0.05)
    assert duration.p90 == pytest.approx(1.0, rel=0.05)
    assert duration.p99 == pytest.approx(100.0, rel=0.05)


def test_a_call_that_went_on_elsewhere_is_one_request_where_it_ended() -> None:
    stats = collector()
    first, second = stats.cell(A, "m"), stats.cell(B, "m")
    first.attempt(retry=False)
    first.failed_attempt("OverloadedError")
    second.attempt(retry=True)
    second.finished(duration=1.0)

    found = snapshot(stats)

    assert (found.overall.requests, found.overall.success, found.overall.errors) == (1, 1, 0)
    assert (found.endpoints[A].requests, found.endpoints[B].requests) == (0, 1)
    assert (found.endpoints[A].attempts, found.endpoints[B].attempts) == (1, 1)
    assert (found.endpoints[A].retries, found.endpoints[B].retries) == (0, 1)
    assert found.endpoints[A].failed_attempts == {"OverloadedError": 1}
    assert found.endpoints[B].failed_attempts == {}


def test_fast_errors_do_not_make_the_durations_look_fast() -> None:
    cell = StatsCell()
    cell.finished(duration=0.001, error="OverloadedError")
    cell.finished(duration=0.001, cancelled=True)

    assert cell.stats(in_flight=0).duration is None


def test_what_is_not_known_of_a_call_is_not_recorded() -> None:
    cell = StatsCell()
    cell.finished(duration=0.0, error="QueueFullError")

    assert recorded(cell.stats(in_flight=0)) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("success", "errors", "cancelled", "rate"),
    [(3, 1, 0, 0.75), (3, 1, 6, 0.75), (0, 2, 0, 0.0), (0, 0, 0, None), (0, 0, 5, None)],
)
def test_callers_that_leave_do_not_count_for_the_success_rate(
    success: int, errors: int, cancelled: int, rate: float | None
) -> None:
    cell = StatsCell()
    for _ in range(success):
        cell.finished(duration=1.0)
    for _ in range(errors):
        cell.finished(duration=1.0, error="ServerError")
    for _ in range(cancelled):
        cell.finished(duration=1.0, cancelled=True)

    assert cell.stats(in_flight=0).success_rate == rate


def test_requests_in_flight_are_shown_by_endpoint_and_overall() -> None:
    stats = collector()
    stats.cell("a", "m").finished(duration=1.0)
    stats.cell("c", "m").finished(duration=1.0)

    found = snapshot(stats, a=2, b=3)

    assert {id: shown.in_flight for id, shown in found.endpoints.items()} == {
        "a": 2,
        "b": 3,
        "c": 0,
    }
    assert found.overall.in_flight == 5
    assert found.models["m"].in_flight is None
    assert stats.endpoint("a", in_flight=2).in_flight == 2


def test_an_endpoint_without_requests_has_zeros() -> None:
    stats = collector()

    shown = snapshot(stats, a=0).endpoints["a"]

    assert set(counters(shown).values()) == {0}
    assert stats.endpoint("a", in_flight=0) == shown


def test_a_snapshot_stays_as_it_is() -> None:
    stats = collector()
    cell = stats.cell(A, "m")
    cell.finished(duration=1.0, error="ServerError")
    found = snapshot(stats)
    before = found.to_json(), found.to_prometheus()

    cell.finished(duration=1.0, error="ServerError", queue_wait=1.0)
    cell.failed_attempt("ServerError")
    stats.cell(B, "n")

    assert (found.to_json(), found.to_prometheus()) == before


def test_a_reset_starts_at_zero_and_leaves_what_is_in_flight() -> None:
    stats = collector()
    stats.cell("a", "m").finished(duration=1.0, queue_wait=1.0)
    stats.cell("b", "m").finished(duration=1.0, error="ServerError")
    stats.forget("b")

    stats.reset(now_unix=1500.0)
    found = snapshot(stats, a=4)

    assert (found.since, found.until) == (1500.0, 2000.0)
    assert found.endpoints["a"].in_flight == 4
    for shown in (found.overall, *found.endpoints.values(), *found.models.values()):
        assert set(counters(shown).values()) == {0}
        assert recorded(shown) == [0, 0, 0, 0]
        assert shown.errors_by_class == {}


def test_a_reset_of_one_endpoint_leaves_the_others() -> None:
    stats = collector()
    stats.cell(A, "m").finished(duration=1.0)
    stats.cell(A, "n").finished(duration=1.0)
    stats.cell(B, "m").finished(duration=1.0)

    stats.reset(A, now_unix=1500.0)
    found = snapshot(stats)

    assert {id: shown.requests for id, shown in found.endpoints.items()} == {A: 0, B: 1}
    assert {id: shown.requests for id, shown in found.models.items()} == {"m": 1, "n": 0}
    assert (found.overall.requests, found.since) == (1, 1000.0)


@pytest.mark.parametrize("endpoint", [None, A])
def test_a_call_that_a_reset_falls_into_is_counted_after_it(endpoint: str | None) -> None:
    stats = collector()
    cell = stats.cell(A, "m")

    stats.reset(endpoint, now_unix=1500.0)
    cell.finished(duration=1.0)

    assert stats.endpoint(A, in_flight=0).requests == 1


def test_calls_that_outlive_their_endpoint_are_counted_after_a_reset_too() -> None:
    stats = collector()
    cell = stats.cell(A, "m")
    stats.forget(A)

    stats.reset(now_unix=1500.0)
    cell.finished(duration=1.0)

    assert snapshot(stats).overall.requests == 1


def test_an_endpoint_that_comes_back_begins_anew() -> None:
    stats = collector()
    stats.cell(A, "m").finished(duration=1.0)
    stats.forget(A)

    stats.cell(A, "m").finished(duration=2.0)
    found = snapshot(stats)

    assert found.endpoints[A].requests == 1
    assert found.overall.requests == 2


def test_further_models_share_one_cell_and_none_is_lost() -> None:
    stats = collector(max_models=3)
    for number in range(10):
        stats.cell(A, f"model {number}").finished(duration=1.0)

    requests = {model: shown.requests for model, shown in snapshot(stats).models.items()}

    assert requests == {"model 0": 1, "model 1": 1, "model 2": 1, OTHER_MODELS: 7}


def test_a_model_that_is_known_is_told_apart_on_every_endpoint() -> None:
    stats = collector(max_models=1)
    stats.cell(A, "known").finished(duration=1.0)
    stats.cell(A, "further").finished(duration=1.0)

    stats.cell(B, "known").finished(duration=1.0)
    stats.cell(B, "further").finished(duration=1.0)

    found = snapshot(stats)
    assert {(series.endpoint, series.model) for series in found.series} == {
        (A, "known"),
        (A, OTHER_MODELS),
        (B, "known"),
        (B, OTHER_MODELS),
    }


@pytest.mark.parametrize("model", ["known", "further"])
def test_a_cell_stays_the_same(model: str) -> None:
    stats = collector(max_models=1)
    stats.cell(A, "known")

    assert stats.cell(A, model) is stats.cell(A, model)


def test_forgotten_endpoints_leave_nothing_behind() -> None:
    stats = collector()
    cells = []
    for number in range(20):
        stats.cell(f"endpoint {number}", "m").finished(duration=1.0)
        cells.append(weakref.ref(stats.cell(f"endpoint {number}", "m")))
        stats.forget(f"endpoint {number}")

    assert [cell() for cell in cells] == [None] * 20
    assert snapshot(stats).overall.requests == 20


def test_json_has_the_three_views() -> None:
    stats = collector()
    stats.cell(A, "m").finished(duration=1.5, queue_wait=0.25, error="ServerError")
    stats.cell(B, "n").finished(duration=1.5, queue_wait=0.25)
    found = stats.snapshot({A: 1}, now_unix=2000.0)

    assert set(msgspec.json.decode(found.to_json())) == {
        "since",
        "until",
        "overall",
        "endpoints",
        "models",
    }
    assert msgspec.json.decode(found.to_json(), type=Statistics) == msgspec.structs.replace(
        found, series=()
    )


class Metric(NamedTuple):
    kind: str
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]
    """By name and labels."""


LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\["\\n])*)"'
SAMPLE = re.compile(rf"([a-z_]+)\{{({LABEL}(?:,{LABEL})*)\}} (\S+)")
SUFFIXES = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


def parse(text: str) -> dict[str, Metric]:
    """Text format 0.0.4, without what is optional in it: every metric has help, type and labels,
    and all of its samples follow its type."""
    assert text.endswith("\n")
    metrics: dict[str, Metric] = {}
    helped = current = ""
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            helped, _, words = line.removeprefix("# HELP ").partition(" ")
            assert words
        elif line.startswith("# TYPE "):
            current, kind = line.removeprefix("# TYPE ").split(" ")
            assert current == helped
            assert current not in metrics
            metrics[current] = Metric(kind, {})
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            metric = metrics[current]
            assert match[1] in [current + suffix for suffix in SUFFIXES[metric.kind]]
            pairs = [(name, unescaped(value)) for name, value in re.findall(LABEL, match[2])]
            labels = frozenset(pairs)
            assert len(dict(pairs)) == len(pairs)
            assert (match[1], labels) not in metric.samples
            metric.samples[match[1], labels] = float(match[match.lastindex or 0])
    return metrics


def prometheus(stats: StatsCollector, **in_flight: int) -> dict[str, Metric]:
    return parse(snapshot(stats, **in_flight).to_prometheus())


def total(metric: Metric, only: Callable[[str, dict[str, str]], bool]) -> float:
    return sum(
        value for (name, labels), value in metric.samples.items() if only(name, dict(labels))
    )


@given(st.text(), st.text())
def test_labels_are_read_as_they_were_whatever_they_hold(endpoint: str, model: str) -> None:
    stats = collector()
    stats.cell(endpoint, model).attempt(retry=False)

    metric = prometheus(stats)["vllm_unified_attempts_total"]

    labels = frozenset({"endpoint": endpoint, "model": model}.items())
    assert metric.samples == {("vllm_unified_attempts_total", labels): 1}


def test_labels_are_escaped_as_the_format_says() -> None:
    stats = collector()
    stats.cell('a\\b"c\nd', "m").attempt(retry=False)

    line = 'vllm_unified_attempts_total{endpoint="a\\\\b\\"c\\nd",model="m"} 1'
    assert line in snapshot(stats).to_prometheus().split("\n")


@given(st.lists(calls, max_size=20))
def test_counters_in_prometheus_add_up_to_the_same(calls: list[Call]) -> None:
    stats = collector()
    for call in calls:
        record(stats.cell(call.endpoint, call.model), call)
    metrics = prometheus(stats)
    wanted = expected(calls)

    def sum_of(name: str, **labels: str) -> float:
        return total(
            metrics[f"vllm_unified_{name}_total"], lambda _, found: labels.items() <= found.items()
        )

    assert sum_of("requests") == wanted["requests"]
    assert sum_of("requests", outcome="success") == wanted["success"]
    assert sum_of("requests", outcome="error") == sum_of("errors") == wanted["errors"]
    assert sum_of("requests", outcome="cancelled") == wanted["cancelled"]
    assert sum_of("attempts") == wanted["attempts"]
    assert sum_of("retries") == wanted["retries"]
    assert sum_of("prompt_tokens") == wanted["prompt_tokens"]
    assert sum_of("completion_tokens") == wanted["completion_tokens"]
    assert sum_of("continued_streams") == wanted["continued"]
    assert sum_of("hedged_attempts") == wanted["hedged"]
    for error in ("OverloadedError", "ConnectError"):
        failed = sum(call.error == error for call in calls)
        assert sum_of("failed_attempts", error=error) == failed


@given(st.lists(seconds, min_size=1, max_size=50))
def test_a_histogram_in_prometheus_is_cumulative_and_complete(durations: list[float]) -> None:
    stats = collector()
    for duration in durations:
        stats.cell(A, "m").between_tokens.record(duration)
    metric = prometheus(stats)["vllm_unified_time_between_tokens_seconds"]
    name = "vllm_unified_time_between_tokens_seconds"

    buckets = [
        (dict(labels)["le"], value)
        for (sample, labels), value in metric.samples.items()
        if sample == f"{name}_bucket"
    ]

    assert [float(bound) for bound, _ in buckets] == [*BUCKET_BOUNDS, float("inf")]
    assert buckets[-1][0] == "+Inf"
    for bound, value in buckets:
        assert value == sum(duration <= float(bound) for duration in durations)
    labels = frozenset({"endpoint": A, "model": "m"}.items())
    assert metric.samples[f"{name}_count", labels] == len(durations)
    assert metric.samples[f"{name}_sum", labels] == pytest.approx(sum(durations))


def test_prometheus_metrics_have_units_and_types() -> None:
    stats = collector()
    record(stats.cell("a", "m"), Call("a", "m", None, False, False, 1, (1.0, 2.0, 3.0, 4.0)))
    metrics = prometheus(stats, a=2)

    for name, metric in metrics.items():
        assert name.startswith("vllm_unified_")
        assert name.endswith("_total") is (metric.kind == "counter")
        assert name.endswith("_seconds") is (metric.kind == "histogram")
    sums = {
        name.removeprefix("vllm_unified_"): total(metric, lambda name, _: name.endswith("_sum"))
        for name, metric in metrics.items()
        if metric.kind == "histogram"
    }
    assert sums == {
        "request_duration_seconds": 1.0,
        "queue_wait_seconds": 2.0,
        "time_to_first_token_seconds": 3.0,
        "time_between_tokens_seconds": 4.0,
    }


def test_requests_in_flight_are_a_gauge_by_endpoint() -> None:
    metric = prometheus(collector(), a=2, b=0)["vllm_unified_in_flight_requests"]

    assert metric.kind == "gauge"
    assert metric.samples == {
        ("vllm_unified_in_flight_requests", frozenset({("endpoint", "a")})): 2,
        ("vllm_unified_in_flight_requests", frozenset({("endpoint", "b")})): 0,
    }


def test_series_of_a_forgotten_endpoint_end() -> None:
    stats = collector()
    stats.cell(A, "m").attempt(retry=False)
    stats.cell(B, "m").attempt(retry=False)
    stats.forget(A)

    samples = prometheus(stats)["vllm_unified_attempts_total"].samples

    assert [dict(labels)["endpoint"] for _, labels in samples] == [B]
