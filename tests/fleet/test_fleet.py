"""A fleet: what is tried again and where, who is shut out, and what is told and counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.answers import sse, text_event
from tests.support.fake_servers import (
    BROKEN,
    BUSY,
    GATEWAY,
    NO_SUCH_MODEL,
    Clock,
    MakeRig,
    Rig,
    error,
    settle,
)
from tests.support.fleets import directory
from tests.support.scripted import RESET, STALL, ScriptedServer
from vllm_unified.errors import (
    AttemptTimeoutError,
    BadRequestError,
    CircuitOpenError,
    ClientClosedError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    EngineDeadError,
    ModelNotFoundError,
    OutputValidationError,
    OverloadedError,
    QueueFullError,
    RequestTimeoutError,
    StreamTruncatedError,
    VllmError,
)
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.fleet.stream import GenerationStream
from vllm_unified.results import GenerationResult
from vllm_unified.settings import Settings
from vllm_unified.wire.requests import generation_request

RETRIES = {"settings": {"max_retries": 3}}
FRAGILE = {"circuit_breaker": {"failure_threshold": 3, "reset_timeout": 10_000}}


def names(rig: Rig) -> list[str]:
    """The names of the events that were told."""
    return [event.name for event in rig.told]


class TestRetries:
    @pytest.mark.parametrize("trouble", [BROKEN, GATEWAY, BUSY, ConnectError, ConnectionLostError])
    async def test_go_elsewhere_at_once(self, make_rig: MakeRig, trouble: Any) -> None:
        rig = make_rig("a", "b", **RETRIES)
        rig.listen("retry")
        rig.servers[0].always(trouble)

        result = await rig.ask()

        assert [attempt.endpoint for attempt in result.metadata.attempts] == [
            "http://a",
            "http://b",
        ]
        assert result.metadata.endpoint == "http://b"
        assert [event.pause for event in rig.told] == [0.0]

    async def test_go_everywhere_before_they_pause(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", "c", **RETRIES)
        rig.listen("retry")
        rig.servers[0].always(BROKEN)
        rig.servers[1].always(BROKEN)

        await rig.ask()

        assert rig.sent() == [1, 1, 1]
        assert [event.pause for event in rig.told] == [0.0, 0.0]

    @pytest.mark.usefixtures("no_pauses")
    async def test_come_back_where_there_is_nowhere_else(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", **RETRIES)
        for server in rig.servers:
            server.reply(BROKEN)

        result = await rig.ask()

        assert len(result.metadata.attempts) == 3

    @pytest.mark.usefixtures("no_pauses")
    async def test_are_as_many_as_max_retries(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", **RETRIES)
        for server in rig.servers:
            server.always(BROKEN)

        with pytest.raises(EngineDeadError) as caught:
            await rig.ask()

        assert len(caught.value.attempts) == sum(rig.sent()) == 4

    @pytest.mark.parametrize("status", [401, 403])
    async def test_a_key_that_one_server_refuses_is_not_that_of_another(
        self, make_rig: MakeRig, status: int
    ) -> None:
        rig = make_rig("a", "b")  # no retries at all
        rig.servers[0].always(error(status, "no"))

        assert (await rig.ask()).metadata.endpoint == "http://b"
        assert rig.sent() == [1, 1]

    @pytest.mark.parametrize("status", [400, 422])
    async def test_are_not_for_what_is_wrong_anywhere(self, make_rig: MakeRig, status: int) -> None:
        rig = make_rig("a", "b", **RETRIES)
        rig.servers[0].always(error(status, "no"))

        with pytest.raises(VllmError):
            await rig.ask()

        assert rig.sent() == [1, 0]

    @pytest.mark.usefixtures("no_pauses")
    async def test_end_with_their_budget(self, make_rig: MakeRig, clock: Clock) -> None:
        sturdy = {"circuit_breaker": {"failure_threshold": 1000}}
        rig = make_rig("a", "b", settings={"max_retries": 1}, endpoint=sturdy)
        for server in rig.servers:
            server.always(BROKEN)
        calls = 100

        await rig.fail(calls)

        retries = sum(rig.sent()) - calls
        assert retries == 10 + 0.2 * calls

    async def test_of_what_was_never_sent_cost_no_budget(
        self, make_rig: MakeRig, clock: Clock
    ) -> None:
        rig = make_rig("a", endpoint=FRAGILE)
        rig.servers[0].always(BROKEN)
        await rig.fail(4)
        before = rig.fleet.budget.remaining(clock.now)
        shut_out = rig.start(settings={"max_retries": 1, "timeout": 0.5})

        with pytest.raises(VllmError):
            await shut_out

        assert rig.fleet.budget.remaining(clock.now) >= before

    async def test_are_made_with_the_same_request(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", **RETRIES)
        rig.servers[0].always(BROKEN)

        await rig.ask()

        (first,), (second,) = (server.requests for server in rig.servers)
        assert first.body == second.body
        assert first.headers["X-Request-Id"] == second.headers["X-Request-Id"]


async def test_an_error_of_what_was_never_sent_names_the_only_server(make_rig: MakeRig) -> None:
    rig = make_rig("a", max_concurrent_requests=1, queue_size=0)
    rig.servers[0].hold()
    first = rig.start()
    await settle()

    with pytest.raises(QueueFullError) as caught:
        await rig.ask()

    assert caught.value.endpoint == "http://a"
    rig.servers[0].finish()
    await first


class TestAttemptTimeout:
    async def test_a_server_that_hangs_is_left_for_another(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", **RETRIES)
        rig.servers[0].hold()

        result = await rig.ask(settings={"attempt_timeout": 0.02})

        first, second = result.metadata.attempts
        assert first.error == "AttemptTimeoutError: no answer within 0.02 s"
        assert (second.endpoint, second.error) == ("http://b", None)
        assert (rig.servers[0].held, rig.endpoints[0].in_flight) == (0, 0)

    async def test_it_counts_as_failure(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint={"circuit_breaker": {"failure_threshold": 1}})
        rig.servers[0].hold()

        with pytest.raises(AttemptTimeoutError):
            await rig.ask(settings={"attempt_timeout": 0.01})

        assert rig.endpoints[0].state == "open"

    async def test_a_call_that_its_caller_leaves_is_no_failure(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint={"circuit_breaker": {"failure_threshold": 1}})
        rig.servers[0].hold()
        call = rig.start()
        await settle()

        call.cancel()
        await settle()

        assert (rig.endpoints[0].state, rig.endpoints[0].in_flight) == ("closed", 0)

    async def test_a_call_whose_time_went_by_there_is_a_failure(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint={"circuit_breaker": {"failure_threshold": 1}})
        rig.servers[0].hold()

        with pytest.raises(RequestTimeoutError):
            await rig.ask(settings={"timeout": 0.02})

        assert rig.endpoints[0].state == "open"

    async def test_a_call_whose_time_went_by_in_line_is_none(
        self, make_rig: MakeRig, clock: Clock
    ) -> None:
        rig = make_rig(
            "a",
            endpoint={"circuit_breaker": {"failure_threshold": 1}, "max_concurrent_requests": 1},
        )
        rig.servers[0].hold()
        rig.start()
        late = rig.start(settings={"timeout": 0.05})
        await settle()
        clock.advance(0.04)
        rig.servers[0].finish()
        await settle()
        clock.advance(0.01)

        with pytest.raises(RequestTimeoutError):
            await late

        assert (rig.sent(), rig.endpoints[0].state) == ([2], "closed")


class TestBreaker:
    async def test_opens_after_so_many_failures_and_the_others_get_the_traffic(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a", "b", endpoint=FRAGILE, **RETRIES)
        rig.servers[0].always(BROKEN)

        for _ in range(20):
            await rig.ask()

        assert rig.sent() == [3, 20]
        assert [endpoint.state for endpoint in rig.endpoints] == ["open", "closed"]

    async def test_a_gateways_503_counts(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint=FRAGILE)
        rig.servers[0].always(GATEWAY)
        capacity = rig.endpoints[0].capacity

        await rig.fail(3)

        assert (rig.endpoints[0].state, rig.endpoints[0].capacity) == ("open", capacity)

    async def test_a_busy_server_is_limited_and_not_shut_out(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint=FRAGILE)
        rig.servers[0].hold()
        calls = [rig.start() for _ in range(10)]
        await settle()
        rig.servers[0].always(BUSY)
        rig.servers[0].finish(5)
        await settle()

        assert [type(call.exception()) for call in calls[:5]] == [OverloadedError] * 5
        assert rig.endpoints[0].state == "closed"
        assert rig.endpoints[0].capacity < 10

    async def test_wrong_requests_open_nothing(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint=FRAGILE)
        rig.servers[0].always(error(400, "no"))

        assert {type(each) for each in await rig.fail(10)} == {BadRequestError}
        assert rig.endpoints[0].state == "closed"

    async def test_after_its_time_trials_close_it(self, make_rig: MakeRig, clock: Clock) -> None:
        rig = make_rig("a", "b", endpoint=FRAGILE, **RETRIES)
        rig.servers[0].always(BROKEN)
        while rig.servers[1].requests[4:] == []:
            await rig.ask()
        rig.listen("circuit_half_open", "circuit_closed")
        rig.servers[0].heal()

        clock.advance(10.1)
        for _ in range(4):
            await rig.ask()

        assert rig.endpoints[0].state == "closed"
        assert names(rig) == ["circuit_half_open", "circuit_closed"]

    async def test_what_opened_it_is_told(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint=FRAGILE)
        rig.listen("circuit_open")
        rig.servers[0].always(BROKEN)

        errors = await rig.fail(3)

        (event,) = rig.told
        assert (event.endpoint, event.error) == ("a", errors[-1])


class TestBreakerOfStreams:
    """Over sockets: a server that says one token, and then something else."""

    FIRST = sse(text_event("a"))

    @pytest.fixture
    async def fleet(self, server: ScriptedServer) -> AsyncIterator[Fleet]:
        here = directory(Settings(timeout=3, max_retries=0))
        yield here.create_fleet([{"url": server.url, **FRAGILE}], {})
        await here.close()

    def stream(self, fleet: Fleet) -> GenerationStream[GenerationResult]:
        request = generation_request({"prompt": "a"}, stream=True)
        return GenerationStream(fleet, request, fleet.settings)

    async def test_a_server_that_dies_after_every_first_token_is_shut_out(
        self, fleet: Fleet, server: ScriptedServer
    ) -> None:
        server.always(self.FIRST, RESET)
        (endpoint,) = fleet.endpoints
        states = []
        for _ in range(3):
            with pytest.raises(StreamTruncatedError):
                await self.stream(fleet).collect()
            states.append(endpoint.state)

        assert states == ["closed", "closed", "open"]

    async def test_trials_let_it_in_with_their_first_tokens(
        self, fleet: Fleet, server: ScriptedServer, clock: Clock
    ) -> None:
        server.always(self.FIRST, STALL)
        (endpoint,) = fleet.endpoints
        endpoint.shut_out(EngineDeadError("dead"))
        clock.advance(10)

        async with self.stream(fleet), self.stream(fleet):
            assert (endpoint.state, endpoint.in_flight) == ("closed", 2)


class TestAllShutOut:
    async def shut_out(self, make_rig: MakeRig, *names: str) -> Rig:
        """A fleet of which every server has just failed too often."""
        rig = make_rig(*names, endpoint=FRAGILE)
        for server in rig.servers:
            server.always(BROKEN)
        while any(endpoint.state == "closed" for endpoint in rig.endpoints):
            await rig.fail()
        return rig

    async def test_trials_are_spaced_and_others_turned_away(
        self, make_rig: MakeRig, clock: Clock
    ) -> None:
        rig = await self.shut_out(make_rig, "a", "b")
        before = sum(rig.sent())

        errors = await rig.fail(10)

        assert [type(each) for each in errors[:2]] == [EngineDeadError] * 2
        assert {type(each) for each in errors[2:]} == {CircuitOpenError}
        assert sum(rig.sent()) - before == 2
        clock.advance(0.4)
        await rig.fail(10)
        assert sum(rig.sent()) - before == 4

    async def test_the_error_says_why_and_until_when(self, make_rig: MakeRig, clock: Clock) -> None:
        rig = await self.shut_out(make_rig, "a", "b")
        last_trial = (await rig.fail(2))[-1]

        (error,) = await rig.fail()

        assert isinstance(error, CircuitOpenError)
        assert "all 2 servers are shut out" in str(error)
        assert "EngineCore encountered an issue" in str(error)
        assert isinstance(error.__cause__, EngineDeadError)
        assert isinstance(last_trial, EngineDeadError)
        assert error.retry_after is not None
        assert 0 < error.retry_after < 0.4
        assert (error.attempts, error.is_transient_error) == ((), True)

    async def test_a_success_lets_it_in_again(self, make_rig: MakeRig, clock: Clock) -> None:
        rig = await self.shut_out(make_rig, "a")
        rig.listen("circuit_half_open", "circuit_closed")
        rig.servers[0].heal()

        await rig.ask()
        assert names(rig) == ["circuit_half_open"]
        await rig.ask()

        assert names(rig) == ["circuit_half_open", "circuit_closed"]
        assert rig.endpoints[0].error is None

    async def test_a_server_that_hangs_keeps_no_trial_from_the_other(
        self, make_rig: MakeRig, clock: Clock
    ) -> None:
        rig = make_rig("a", "b", endpoint={**FRAGILE, "max_concurrent_requests": 1})
        for server in rig.servers:
            server.always(BROKEN)
        while any(endpoint.state == "closed" for endpoint in rig.endpoints):
            await rig.fail()
        rig.servers[0].hold()
        rig.start()
        await settle()
        rig.servers[1].heal()
        await rig.fail()
        clock.advance(1)

        assert (await rig.ask()).metadata.endpoint == "http://b"

    @pytest.mark.usefixtures("no_pauses")
    async def test_who_has_retries_waits_for_the_next_trial(self, make_rig: MakeRig) -> None:
        rig = await self.shut_out(make_rig, "a")
        await rig.fail()
        rig.servers[0].heal()

        result = await rig.ask(settings={"max_retries": 3})

        assert len(result.metadata.attempts) == 1


class TestModels:
    def two_models(self, make_rig: MakeRig, **options: Any) -> Rig:
        """A server for the model x, and one for y."""
        rig = make_rig("a", "b", **options)
        rig.serve("x", "y")
        return rig

    async def test_a_request_goes_where_its_model_is(self, make_rig: MakeRig) -> None:
        rig = self.two_models(make_rig)

        for model in ("x", "y", "y", "y"):
            await rig.ask(model=model)

        assert rig.sent() == [1, 3]

    async def test_without_a_model_anywhere(self, make_rig: MakeRig) -> None:
        rig = self.two_models(make_rig)

        for _ in range(4):
            await rig.ask()

        assert rig.sent() == [2, 2]

    async def test_a_model_that_nobody_names_is_asked_for_all_the_same(
        self, make_rig: MakeRig
    ) -> None:
        rig = self.two_models(make_rig)

        await rig.ask(model="z")

        assert sum(rig.sent()) == 1

    async def test_a_server_without_the_model_is_left_for_another(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")  # no retries at all
        rig.servers[0].always(NO_SUCH_MODEL)

        for _ in range(5):
            assert (await rig.ask(model="x")).metadata.endpoint == "http://b"

        assert rig.sent() == [1, 5]
        assert rig.endpoints[0].state == "closed"

    async def test_a_server_without_one_model_gets_the_others(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.servers[0].reply(NO_SUCH_MODEL)
        await rig.ask(model="x")

        for _ in range(4):
            await rig.ask(model="y")

        assert rig.sent() == [3, 3]

    async def test_it_is_asked_again_after_a_while(self, make_rig: MakeRig, clock: Clock) -> None:
        rig = make_rig("a", "b")
        rig.servers[0].reply(NO_SUCH_MODEL)
        await rig.ask(model="x")

        clock.advance(31)
        for _ in range(4):
            await rig.ask(model="x")

        assert rig.sent() == [3, 3]

    async def test_where_nobody_has_it_the_caller_is_told(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        for server in rig.servers:
            server.always(NO_SUCH_MODEL)

        with pytest.raises(ModelNotFoundError) as caught:
            await rig.ask(model="x")

        assert len(caught.value.attempts) == 2
        assert rig.sent() == [1, 1]

    async def test_also_where_it_named_none(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        for server in rig.servers:
            server.always(NO_SUCH_MODEL)

        with pytest.raises(ModelNotFoundError):
            await rig.ask()

    async def test_another_attempt_after_a_missing_model_is_told(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.listen("retry")
        rig.servers[0].always(NO_SUCH_MODEL)

        await rig.ask(model="x")

        assert [event.endpoint for event in rig.told] == ["a"]


class TestMembers:
    async def test_a_new_one_gets_its_share(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        rig.fleet.add(rig.directory.create_endpoint("http://b", {}))

        for _ in range(4):
            await rig.ask()

        assert len(rig.transport.server("b").requests) == 2

    async def test_one_that_is_taken_out_gets_nothing_new_and_ends_what_it_has(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a", "b")
        rig.servers[0].hold()
        call = rig.start()
        await settle()

        rig.fleet.remove(rig.endpoints[0])
        for _ in range(4):
            await rig.ask()
        rig.servers[0].finish()

        assert (await call).metadata.endpoint == "http://a"
        assert rig.sent() == [1, 4]

    async def test_twice_is_once(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.fleet.add(rig.endpoints[0])
        assert len(rig.fleet.endpoints) == 2

        rig.fleet.remove(rig.endpoints[0])
        rig.fleet.remove(rig.endpoints[0])

        assert [endpoint.id for endpoint in rig.fleet.endpoints] == ["b"]

    async def test_a_draining_one_gets_nothing_new(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.endpoints[0].drain()

        for _ in range(4):
            await rig.ask()

        assert rig.sent() == [0, 4]
        assert rig.endpoints[0].state == "draining"

    async def test_none_is_taken_into_one_that_is_closed(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        await rig.fleet.close()

        with pytest.raises(ClientClosedError, match="this fleet is closed"):
            rig.fleet.add(rig.endpoints[0])

        assert rig.fleet.endpoints == ()

    async def test_the_error_of_a_call_is_its_own_where_all_are_leaving(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a", "b")
        rig.servers[0].reply(BROKEN)
        rig.servers[0].hold()
        call = rig.start()
        await settle()
        for endpoint in rig.endpoints:
            endpoint.drain()

        rig.servers[0].finish()

        with pytest.raises(EngineDeadError):
            await call

    async def test_without_any_it_says_so(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        rig.fleet.remove(rig.endpoints[0])

        with pytest.raises(ConfigurationError, match="no endpoint"):
            await rig.ask()

    async def test_an_endpoint_in_two_fleets_has_one_limit(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint={"max_concurrent_requests": 1})
        other = rig.directory.create_fleet(rig.endpoints, {})
        rig.servers[0].hold()
        rig.start()
        second = rig.start(fleet=other)
        await settle()

        assert (rig.sent(), other.waiting) == ([1], 1)
        rig.servers[0].heal()
        assert (await second).text == "a"


class TestStatistics:
    async def test_a_call_counts_where_it_ended_and_an_attempt_where_it_was_made(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a", "b", **RETRIES)
        rig.servers[0].always(BROKEN)

        await rig.ask(model="m")

        a, b = rig.stats(0), rig.stats(1)
        assert (a.requests, a.attempts, a.retries) == (0, 1, 0)
        assert a.failed_attempts == {"EngineDeadError": 1}
        assert (b.requests, b.success, b.attempts, b.retries) == (1, 1, 1, 1)
        assert (b.prompt_tokens, b.completion_tokens) == (5, 2)

    async def test_errors_by_class(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        rig.servers[0].reply(BROKEN, error(400, "no"), BROKEN)

        await rig.fail(3)

        assert rig.stats().errors_by_class == {"EngineDeadError": 2, "BadRequestError": 1}

    async def test_who_left(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        rig.servers[0].hold()
        call = rig.start()
        await settle()
        assert rig.stats().in_flight == 1

        call.cancel()
        await settle()

        stats = rig.stats()
        assert (stats.cancelled, stats.errors, stats.in_flight) == (1, 0, 0)

    async def test_what_no_endpoint_of_several_got_is_nobodys(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", endpoint={"max_concurrent_requests": 1}, queue_size=0)
        for server in rig.servers:
            server.hold()
            rig.start()
        await settle()

        await rig.fail()

        everything = rig.statistics()
        assert everything.endpoints[""].errors_by_class == {"QueueFullError": 1}

    async def test_an_endpoint_that_is_gone_is_shown_no_more(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        await rig.ask()

        await rig.directory.remove_endpoint(rig.endpoints[0], timeout=None)

        everything = rig.statistics()
        assert list(everything.endpoints) == ["b"]
        assert everything.overall.requests == 1

    async def test_neither_when_its_last_call_ends_later(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.servers[0].hold()
        call = rig.start()
        await settle()
        assert not await rig.directory.remove_endpoint(rig.endpoints[0], timeout=0.001)

        rig.servers[0].finish()
        await call

        everything = rig.statistics()
        assert list(everything.endpoints) == ["b"]
        assert everything.overall.requests == 1


class TestEvents:
    ALL = (
        "request_start request_end retry queue_full circuit_open circuit_half_open circuit_closed"
    ).split()

    async def test_of_a_call_in_their_order(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", endpoint={"circuit_breaker": {"failure_threshold": 1}}, **RETRIES)
        rig.listen(*self.ALL)
        rig.servers[0].always(BROKEN)

        result = await rig.ask(model="m")

        assert names(rig) == ["request_start", "circuit_open", "retry", "request_end"]
        start, opened, retry, end = rig.told
        assert (start.request_id, start.path, start.model) == (
            result.metadata.request_id,
            "/v1/completions",
            "m",
        )
        assert (opened.endpoint, retry.endpoint, end.endpoint) == ("a", "a", "b")
        assert retry.error is opened.error
        assert {each.request_id for each in (start, retry, end)} == {result.metadata.request_id}
        assert (end.attempts, end.error, end.cancelled) == (2, None, False)

    async def test_of_a_call_that_fails(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        rig.listen(*self.ALL)
        rig.servers[0].always(BROKEN)

        (error,) = await rig.fail()

        assert names(rig) == ["request_start", "request_end"]
        assert rig.told[-1].error is error

    async def test_of_a_call_that_is_left(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        rig.listen(*self.ALL)
        rig.servers[0].hold()
        call = rig.start()
        await settle()

        call.cancel()
        await settle()

        assert names(rig) == ["request_start", "request_end"]
        assert (rig.told[-1].cancelled, rig.told[-1].error) == (True, None)

    async def test_a_handler_that_raises_harms_no_call(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        for name in ("request_start", "request_end"):
            rig.directory.events.on(name, lambda event: 1 / 0)

        assert (await rig.ask()).text == "a"

    async def test_no_event_shows_a_key(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", endpoint={"api_key": "geheim"}, **RETRIES)
        rig.listen("retry")
        rig.servers[0].always(error(500, "no upstream for Bearer geheim"))

        await rig.ask()

        assert "geheim" not in str(rig.told[0].error)
        assert [status.error for status in rig.directory.status()] == [
            "no upstream for Bearer ***",
            None,
        ]


class TestAnswers:
    async def test_a_structure_that_is_wrong_is_not_the_servers_fault(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a", endpoint={"circuit_breaker": {"failure_threshold": 1}})

        with pytest.raises(OutputValidationError):
            await rig.fleet.send(*structured(rig))

        assert (rig.endpoints[0].state, rig.endpoints[0].in_flight) == ("closed", 0)

    async def test_calls_at_the_same_time_all_get_their_own(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", "c", endpoint={"max_concurrent_requests": 2})

        results = await asyncio.gather(*(rig.ask() for _ in range(50)))

        assert len({result.metadata.request_id for result in results}) == 50
        assert sum(rig.sent()) == 50
        assert [endpoint.in_flight for endpoint in rig.endpoints] == [0, 0, 0]


def structured(rig: Rig) -> tuple[Any, Any, Any]:
    """A request whose answer is not what it has to be."""

    def decode(body: bytes, metadata: Any) -> Any:
        raise OutputValidationError("not a city", text="a")

    return generation_request({"prompt": "a"}), rig.settings, decode
