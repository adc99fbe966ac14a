"""When a vLLM is started again, and what its supervisor reads out of its metrics."""

from __future__ import annotations

import pytest

from vllm_unified.servers.gauges import requests_inside, work_done
from vllm_unified.servers.restarts import Pacing, Restarts

PACING = Pacing()

METRICS = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m {odd}"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 4.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.5e+03
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="m"} 20.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
"""


def pauses(restarts: Restarts, ready_for: float = 0.0) -> list[float]:
    found = []
    while (pause := restarts.ended(ready_for)) is not None:
        found.append(pause)
    return found


def test_each_pause_is_twice_the_one_before_up_to_a_minute() -> None:
    restarts = Restarts(9, PACING, lambda: 1.0)
    assert pauses(restarts) == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert (restarts.total, restarts.in_a_row) == (9, 10)


def test_pauses_differ_also_at_the_longest() -> None:
    assert pauses(Restarts(8, PACING, lambda: 0.0))[-2:] == [45, 45]


def test_a_thousand_restarts_have_a_pause() -> None:
    assert pauses(Restarts(2000, PACING, lambda: 1.0))[-1] == 60


def test_without_restarts_the_first_end_is_the_last() -> None:
    restarts = Restarts(0, PACING, lambda: 1.0)
    assert restarts.ended(1e6) is None
    assert (restarts.total, restarts.in_a_row) == (0, 1)


def test_five_minutes_of_being_ready_begin_a_new_row() -> None:
    restarts = Restarts(1, PACING, lambda: 1.0)
    assert [restarts.ended(ready_for) for ready_for in (0, 300, 300, 299)] == [1, 1, 1, None]
    assert restarts.total == 3


def test_what_moves_and_what_is_inside() -> None:
    assert requests_inside(METRICS) == 7
    assert work_done(METRICS) == 1520.25


@pytest.mark.parametrize("metrics", [b"", b"# nothing\n", b"<html>vllm:num_requests_running 1"])
def test_a_server_that_tells_nothing(metrics: bytes) -> None:
    assert requests_inside(metrics) is None
    assert work_done(metrics) is None


def test_old_servers_have_no_labels() -> None:
    assert requests_inside(b"vllm:num_requests_running 1\nvllm:num_requests_swapped 2.0\n") == 3
