"""The statistics of servers: from their counters, and as both clients ask for them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import msgspec
import pytest

from tests.models.recorded import METRICS, V0_6, V0_9, V0_11
from tests.models.test_metrics import scrape
from tests.support import answers
from tests.support.clients import KINDS, make_client
from tests.support.scripted import STALL, Reply, Request, Responder, ScriptedServer
from vllm_unified import (
    AsyncVllmUnified,
    BadRequestError,
    ConnectError,
    ModelNotFoundError,
    ModelStatistics,
    NotFoundError,
    ProtocolError,
    RequestTimeoutError,
    ServerStatistics,
)
from vllm_unified.models.reader import StatisticsReader
from vllm_unified.models.statistics import statistics_of, tally, was_restarted
from vllm_unified.simulator import BackgroundSimulator, Fleet

# Of what a server says


def totals(text: str, *, unix: float = 0.0) -> ServerStatistics:
    return statistics_of([tally(scrape(text, unix=unix))])


def test_a_real_server_since_its_start() -> None:
    found = totals(METRICS, unix=1795384421.77)
    assert found.requests_processed == 13
    assert (found.tokens_generated, found.prompt_tokens) == (361, 2173)
    assert found.avg_tokens_per_request == pytest.approx(361 / 13)
    assert found.avg_generation_time == pytest.approx(15.35792589187622 / 13)
    assert found.uptime == pytest.approx(100)
    assert found.throughput == pytest.approx(3.61)
    assert found.errors == 1
    assert (found.running, found.waiting, found.preemptions) == (0, 0, 0)
    assert found.kv_cache_usage == 0
    assert found.prefix_cache_hit_rate == pytest.approx(1280 / 2173)
    assert found.ttft.count == found.e2e.count == found.queue_time.count == 13
    assert found.inter_token_latency.count == 348
    latency = found.inter_token_latency
    assert latency.mean == pytest.approx(13.454137807995721 / 348)
    assert latency.p50 is not None
    assert latency.p90 is not None
    assert latency.p99 is not None
    assert 0.025 < latency.p50 < latency.p90 < latency.p99 < 0.1


def test_names_and_labels_of_0_6() -> None:
    found = totals(V0_6, unix=1.72e9 + 25)
    assert (found.requests_processed, found.tokens_generated) == (4, 50)
    assert (found.running, found.waiting, found.preemptions) == (2, 1, 3)
    assert found.kv_cache_usage == 0.25
    assert found.throughput == 2
    assert found.prefix_cache_hit_rate is None, "-1: the cache is off"
    assert found.inter_token_latency.mean == pytest.approx(0.02)
    assert found.queue_time.mean == pytest.approx(0.025)
    assert found.e2e.p50 is found.avg_generation_time is None


def test_names_of_0_9() -> None:
    found = totals(V0_9)
    assert (found.kv_cache_usage, found.prefix_cache_hit_rate) == (0.5, 0.25)
    assert found.queue_time.count == 2
    assert found.throughput is found.uptime is None


def test_where_the_old_name_and_the_new_one_are_there_the_new_one_counts() -> None:
    found = totals(V0_11)
    assert found.kv_cache_usage == pytest.approx(0.4)
    assert (found.running, found.tokens_generated) == (4, 40)
    assert found.inter_token_latency.count == 8
    assert found.inter_token_latency.p50 == pytest.approx(0.01)
    assert found.inter_token_latency.p99 == 0.02


def test_errors_are_of_routes_that_there_are_and_of_the_engine() -> None:
    lines = (
        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 100',
        'http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 2',
        'http_requests_total{handler="/v1/completions",method="POST",status="5xx"} 3',
        'http_requests_total{handler="none",method="GET",status="4xx"} 50',
        'vllm:request_success_total{finished_reason="error"} 4',
        'vllm:request_success_total{finished_reason="stop"} 96',
        'vllm:admission_rejections_total{reason="max_num_queued_reqs"} 3',
    )
    assert totals("\n".join(lines)).errors == 2 + 3 + 4
    assert totals("\n".join(lines[4:])).errors == 4 + 3, "rejections, where no answer is counted"


def page(*, generated: float, started: float | None = 100.0, fast: int = 0, slow: int = 0) -> str:
    """A server that had so many answers within 1 s, and in 1 to 3 s."""
    lines = [
        f'vllm:generation_tokens_total{{model_name="m"}} {generated}',
        f'vllm:request_success_total{{finished_reason="stop",model_name="m"}} {fast + slow}',
        f'vllm:e2e_request_latency_seconds_bucket{{le="1",model_name="m"}} {fast}',
        f'vllm:e2e_request_latency_seconds_bucket{{le="3",model_name="m"}} {fast + slow}',
        f'vllm:e2e_request_latency_seconds_bucket{{le="+Inf",model_name="m"}} {fast + slow}',
        f'vllm:e2e_request_latency_seconds_sum{{model_name="m"}} {fast * 0.5 + slow * 2}',
    ]
    if started is not None:
        lines.append(f"process_start_time_seconds {started}")
    return "\n".join(lines)


def test_a_window_is_the_difference() -> None:
    before = scrape(page(generated=1000, fast=90), clock=10, unix=200)
    now = scrape(page(generated=1040, fast=90, slow=10), clock=14, unix=204)
    found = statistics_of([tally(now, since=before, last=before)])
    assert (found.requests_processed, found.tokens_generated) == (10, 40)
    assert found.throughput == 10
    assert found.avg_generation_time == 2
    assert (found.e2e.count, found.e2e.p50) == (10, 2.0)
    assert found.uptime == 104


def test_without_a_window_only_the_throughput_is_of_late() -> None:
    before = scrape(page(generated=1000, fast=90), clock=10, unix=200)
    now = scrape(page(generated=1040, fast=100), clock=14, unix=204)
    found = statistics_of([tally(now, last=before)])
    assert (found.requests_processed, found.tokens_generated) == (100, 1040)
    assert found.throughput == 10


@pytest.mark.parametrize(
    ("generated", "started", "expected"),
    [(1040, 100.0, False), (1040, 100.3, False), (1040, 150.0, True), (10, None, True)],
    ids=["same", "rounded", "another process", "counters fell"],
)
def test_a_restart_is_noticed(generated: float, started: float | None, expected: bool) -> None:
    now = scrape(page(generated=generated, started=started))
    assert was_restarted(scrape(page(generated=1000)), now) == expected


def test_after_a_restart_the_new_values_count_from_nothing() -> None:
    before = scrape(page(generated=1000, fast=90), clock=10, unix=200)
    now = scrape(page(generated=30, started=202, fast=3), clock=20, unix=210)
    found = statistics_of([tally(now, since=before, last=before)])
    assert (found.requests_processed, found.tokens_generated) == (3, 30)
    assert found.throughput == 30 / 8, "it is only there for 8 s"


def test_servers_are_added_up() -> None:
    one = scrape(page(generated=100, fast=90), unix=200)
    other = scrape(page(generated=50, started=150, slow=10), unix=200)
    found = statistics_of([tally(one), tally(other)])
    assert (found.tokens_generated, found.requests_processed) == (150, 100)
    assert found.throughput == 1 + 1
    assert found.uptime == 50
    assert found.e2e.mean == pytest.approx(0.65)
    assert found.e2e.p90 == 1.0


# As clients ask


@pytest.fixture(params=KINDS)
async def vllm(
    request: pytest.FixtureRequest, vllm_simulator: BackgroundSimulator
) -> AsyncIterator[AsyncVllmUnified]:
    async with make_client(request.param, api_url=vllm_simulator.url) as client:
        yield client


async def test_what_was_sent_is_what_was_counted(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator
) -> None:
    results = [await vllm.generate("Once upon", max_tokens=7, ignore_eos=True) for _ in range(3)]
    found = await vllm.get_model_statistics()
    assert isinstance(found, ModelStatistics)
    assert (found.model, found.endpoint) == ("sim", vllm_simulator.url)
    assert found.statistics.requests_processed == 3
    assert found.statistics.tokens_generated == 21
    assert found.statistics.prompt_tokens == sum(each.usage.prompt_tokens for each in results)
    assert found.statistics.avg_tokens_per_request == 7
    assert found.endpoints == {vllm_simulator.url: found.statistics}
    assert (found.restarted, found.unavailable) == (False, {})


async def test_the_throughput_is_since_this_client_asked_last(vllm: AsyncVllmUnified) -> None:
    await vllm.generate("Hi", max_tokens=50, ignore_eos=True)
    first = await vllm.get_model_statistics()
    second = await vllm.get_model_statistics()
    assert first.statistics.throughput is not None
    assert first.statistics.throughput > 0
    assert first.interval == first.statistics.uptime
    assert second.statistics.throughput == 0
    assert second.interval is not None
    assert second.statistics.tokens_generated == 50


async def test_a_window_counts_what_comes_in_it(vllm: AsyncVllmUnified) -> None:
    await vllm.generate("Hi", max_tokens=50, ignore_eos=True)
    found = await vllm.get_model_statistics(window=0.01)
    assert found.statistics.tokens_generated == found.statistics.requests_processed == 0
    assert found.statistics.ttft.count == 0
    assert found.statistics.ttft.p50 is found.statistics.avg_generation_time is None
    assert found.interval is not None
    assert 0.01 <= found.interval < 10


async def test_a_restart_between_two_looks(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator
) -> None:
    await vllm.generate("Hi", max_tokens=50, ignore_eos=True)
    await vllm.get_model_statistics()
    await asyncio.to_thread(vllm_simulator.restart)
    await vllm.generate("Hi", max_tokens=5, ignore_eos=True)
    found = await vllm.get_model_statistics()
    assert found.restarted
    assert found.statistics.tokens_generated == 5
    assert found.statistics.throughput is not None
    assert found.statistics.throughput > 0


@pytest.mark.parametrize("window", [0, -1, float("inf"), float("nan")])
async def test_a_window_is_a_time(vllm: AsyncVllmUnified, window: float) -> None:
    with pytest.raises(BadRequestError, match="window must be a positive number of seconds"):
        await vllm.get_model_statistics(window=window)


async def test_an_unknown_model(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator
) -> None:
    with pytest.raises(ModelNotFoundError, match="'nope'; it serves sim") as caught:
        await vllm.get_model_statistics(model="nope")
    assert (caught.value.model, caught.value.endpoint) == ("nope", vllm_simulator.url)


async def test_nobody_is_there(vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator) -> None:
    vllm_simulator.kill()
    with pytest.raises(ConnectError):
        await vllm.get_model_statistics()
    with pytest.raises(ConnectError):
        await vllm.get_model_statistics(model="sim")


async def test_a_server_that_hangs(server: ScriptedServer) -> None:
    server.always(STALL)
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        with pytest.raises(RequestTimeoutError, match="no answer to GET /metrics within"):
            await vllm.get_model_statistics(timeout=0.05)


async def test_aliases_and_adapters_have_the_statistics_of_their_base(vllm_fleet: Fleet) -> None:
    server = vllm_fleet.add(model="m", served_model_names=("first", "alias"), enable_lora=True)
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        await vllm.load_lora_adapter(adapter_name="poet", adapter_path="/adapters/poet")
        await vllm.generate("Hi", max_tokens=300, ignore_eos=True)
        for name in (None, "first", "alias", "poet"):
            found = await vllm.get_model_statistics(model=name)
            assert found.model == "first"
            assert found.statistics.tokens_generated >= 300


async def test_a_fleet_is_its_sum_and_each_of_its_servers(vllm_fleet: Fleet) -> None:
    servers = {f"gpu{number}": vllm_fleet.add(model="m").url for number in (1, 2, 3)}
    async with AsyncVllmUnified(resources={"endpoints": servers}) as vllm:
        for url in servers.values():
            await vllm.make_request(url, "Hi", max_tokens=3, ignore_eos=True)
        vllm_fleet.servers[2].kill()
        found = await vllm.get_model_statistics()
    assert found.statistics.tokens_generated == 6
    assert {id: each.tokens_generated for id, each in found.endpoints.items()} == {
        "gpu1": 3,
        "gpu2": 3,
    }
    assert found.unavailable == {"gpu3": "ConnectError: no connection: Connection refused"}
    assert found.endpoint == f"{servers['gpu1']}, {servers['gpu2']}"
    assert msgspec.json.decode(msgspec.json.encode(found), type=ModelStatistics) == found


async def test_a_server_behind_two_endpoints_counts_once(
    vllm_simulator: BackgroundSimulator,
) -> None:
    async with AsyncVllmUnified() as vllm:
        twice = [{"url": vllm_simulator.url, "id": name} for name in ("one", "other")]
        balancer = vllm.create_load_balancer(twice)
        await balancer.generate("Hi", max_tokens=3, ignore_eos=True)
        found = await vllm.get_model_statistics(balancer)
    assert found.statistics.tokens_generated == 3
    assert list(found.endpoints) == ["one"]


async def test_a_server_without_series_says_which_flag_it_has(vllm_fleet: Fleet) -> None:
    server = vllm_fleet.add(disable_log_stats=True)
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        with pytest.raises(NotFoundError, match="--disable-log-stats") as caught:
            await vllm.get_model_statistics()
    assert caught.value.endpoint == server.url


def serving(text: str) -> Responder:
    """Replies of a server with this page, that asks for a key for all else."""

    def respond(request: Request) -> Reply:
        if request.target == "/metrics":
            return [answers.response(text, content_type="text/plain")]
        return [answers.error("401 Unauthorized", "Unauthorized")]

    return respond


async def test_a_page_that_is_none(server: ScriptedServer) -> None:
    server.always(answers.response("<html>", content_type="text/html"))
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        with pytest.raises(ProtocolError, match="<html>") as caught:
            await vllm.get_model_statistics()
    assert caught.value.endpoint == server.url


async def test_without_the_key_the_page_says_what_is_served(server: ScriptedServer) -> None:
    server.respond(serving(V0_6))
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        found = await vllm.get_model_statistics(model="llama")
    assert (found.model, found.statistics.tokens_generated) == ("llama", 50)


async def test_a_page_of_several_models_is_told_apart(server: ScriptedServer) -> None:
    text = V0_6.replace('"llama"', '"other"').replace("50.0", "7.0") + V0_6
    server.respond(serving(text))
    async with AsyncVllmUnified(api_url=server.url) as vllm:
        found = await vllm.get_model_statistics(model="llama")
        assert found.statistics.tokens_generated == 50
        with pytest.raises(ModelNotFoundError, match="only about other, llama"):
            await vllm.get_model_statistics(model="third")


async def test_it_is_in_none_of_the_clients_own_statistics(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator
) -> None:
    await vllm.get_model_statistics()
    assert vllm.get_stats().overall.attempts == 0


async def test_what_was_seen_of_an_endpoint_goes_with_it(
    vllm_simulator: BackgroundSimulator,
) -> None:
    reader = StatisticsReader()
    async with AsyncVllmUnified() as vllm:
        endpoint = vllm.create_endpoint(vllm_simulator.url)
        await reader.read([endpoint], None, window=None, timeout=5)
        assert len(reader._last) == 1
        await vllm.remove_endpoint(endpoint)
    del endpoint, vllm
    gc.collect()
    assert len(reader._last) == 0
