"""A second attempt beside a slow first one: whose answer counts, and that nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import answers
from tests.support.fake_servers import BROKEN, Clock, MakeRig, Rig, error, in_turn, settle
from tests.support.fleets import directory
from tests.support.scripted import STALL, ScriptedServer
from tests.support.waiting import eventually
from vllm_unified.errors import (
    AttemptTimeoutError,
    BadRequestError,
    ConnectionLostError,
    EngineDeadError,
    RequestTimeoutError,
    VllmError,
)
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.fleet.hedge import first_answer
from vllm_unified.fleet.stream import GenerationStream
from vllm_unified.results import GenerationResult
from vllm_unified.settings import Settings
from vllm_unified.wire.requests import generation_request, get_request
from vllm_unified.wire.responses import generation_decoder

HEDGE = {"hedge_after": 0.001}
FIRST_FAILURE = {"circuit_breaker": {"failure_threshold": 1}}
Calling = asyncio.Task[GenerationResult]
PassTime = Callable[[float], None]


async def hedged(rig: Rig, **settings: Any) -> Calling:
    """A call that is at two servers, neither of which has answered."""
    for server in rig.servers:
        server.hold()
    call = rig.start(settings={**HEDGE, **settings})
    await eventually(lambda: sum(server.held for server in rig.servers) == 2)
    return call


async def hedge_was_due(make_rig: MakeRig) -> None:
    """Return when any call that was under way has been hedged, if it ever is.

    Timers go off in their order, so that a call that begins now is hedged later.
    """
    await settle()
    other = make_rig("x", "y")
    await hedged(other)
    await settle()


@pytest.fixture
def pass_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> PassTime:
    """Lets so many seconds pass at once, for the event loop too."""

    def pass_time(seconds: float) -> None:
        loop = asyncio.get_running_loop()
        time = loop.time
        clock.advance(seconds)
        monkeypatch.setattr(loop, "time", lambda: time() + seconds)

    return pass_time


@contextlib.asynccontextmanager
async def over_sockets(*servers: ScriptedServer) -> AsyncIterator[Fleet]:
    """A fleet of these, which are asked in turn."""
    here = directory(Settings(timeout=3, max_retries=0, hedge_after=0.001))
    try:
        yield here.create_fleet([server.url for server in servers], {"strategy": in_turn()})
    finally:
        await here.close()


def nothing_is_left(rig: Rig) -> bool:
    in_flight = sum(endpoint.in_flight for endpoint in rig.endpoints)
    return in_flight == sum(server.held for server in rig.servers) == rig.fleet.waiting == 0


class TestTheSecondIsFaster:
    async def test_its_answer_is_taken(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        call = await hedged(rig)

        rig.servers[1].finish()

        assert (await call).metadata.endpoint == "http://b"

    async def test_the_first_is_cancelled_and_both_slots_are_given_back(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a", "b")
        call = await hedged(rig)
        assert [endpoint.in_flight for endpoint in rig.endpoints] == [1, 1]

        rig.servers[1].finish()
        await call

        assert nothing_is_left(rig)

    async def test_the_connection_of_the_first_is_closed(self, server: ScriptedServer) -> None:
        server.always(STALL)
        request = generation_request({"prompt": "a"})
        with ScriptedServer().always(answers.completion("b")) as fast:
            async with over_sockets(server, fast) as fleet:
                result = await fleet.send(request, fleet.settings, generation_decoder(request))

                assert result.text == "b"
                await eventually(lambda: (len(server.requests), server.open_connections) == (1, 0))

    async def test_the_call_is_counted_there_and_each_attempt_where_it_was_made(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a", "b")
        call = await hedged(rig)

        rig.servers[1].finish()
        await call

        a, b = rig.stats(0), rig.stats(1)
        assert (a.requests, a.attempts, a.hedged, a.failed_attempts) == (0, 1, 0, {})
        assert (b.requests, b.success, b.attempts, b.hedged, b.retries) == (1, 1, 1, 1, 0)
        assert (b.prompt_tokens, b.completion_tokens) == (5, 2)

    async def test_both_attempts_are_told_of_at_the_end(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.listen("request_end", "retry")
        call = await hedged(rig)

        rig.servers[1].finish()
        await call

        (end,) = rig.told
        assert (end.endpoint, end.attempts, end.error) == ("b", 2, None)

    async def test_the_slow_one_is_not_said_to_have_failed(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", endpoint=FIRST_FAILURE)
        call = await hedged(rig)

        rig.servers[1].finish()
        await call

        assert (rig.endpoints[0].state, rig.endpoints[0].error) == ("closed", None)

    async def test_it_costs_budget_as_a_retry_does(self, make_rig: MakeRig, clock: Clock) -> None:
        rig = make_rig("a", "b")
        before = rig.fleet.budget.remaining(clock.now)

        await hedged(rig)

        assert rig.fleet.budget.remaining(clock.now) == before - 1

    async def test_both_get_the_same_request(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        call = await hedged(rig)

        rig.servers[1].finish()
        result = await call

        (first,), (second,) = (server.requests for server in rig.servers)
        assert first.body == second.body
        ids = {sent.headers["X-Request-Id"] for sent in (first, second)}
        assert ids == {result.metadata.request_id}


class TestTheFirstIsFaster:
    async def test_its_answer_is_taken(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        call = await hedged(rig)

        rig.servers[0].finish()

        assert (await call).metadata.endpoint == "http://a"

    async def test_the_second_is_cancelled_and_both_slots_are_given_back(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a", "b", endpoint=FIRST_FAILURE)
        call = await hedged(rig)

        rig.servers[0].finish()
        await call

        assert nothing_is_left(rig)
        assert rig.endpoints[1].state == "closed"

    async def test_the_call_is_counted_there(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        call = await hedged(rig)

        rig.servers[0].finish()
        await call

        a, b = rig.stats(0), rig.stats(1)
        assert (a.requests, a.success, a.attempts, a.hedged) == (1, 1, 1, 0)
        assert (b.requests, b.attempts, b.hedged, b.failed_attempts) == (0, 1, 1, {})

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    async def test_of_two_answers_in_one_moment_the_call_is_counted_where_its_own_is_from(
        self, make_rig: MakeRig, order: tuple[int, int]
    ) -> None:
        rig = make_rig("a", "b")
        call = await hedged(rig)

        for place in order:
            rig.servers[place].finish()
        result = await call

        counted = {f"http://{id}": stats.requests for id, stats in by_id(rig).items()}
        assert counted.pop(result.metadata.endpoint) == 1
        assert list(counted.values()) == [0]
        assert nothing_is_left(rig)


def by_id(rig: Rig) -> dict[str, Any]:
    return {endpoint.id: rig.stats(place) for place, endpoint in enumerate(rig.endpoints)}


class TestFailures:
    async def test_of_the_first_leaves_the_answer_to_the_second(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.listen("retry")
        rig.servers[0].reply(BROKEN)
        call = await hedged(rig)

        rig.servers[0].finish()
        await settle()
        rig.servers[1].finish()

        assert (await call).metadata.endpoint == "http://b"
        assert rig.told == []
        assert nothing_is_left(rig)

    async def test_of_the_first_is_counted_at_once(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", endpoint=FIRST_FAILURE)
        rig.servers[0].reply(BROKEN)
        await hedged(rig)

        rig.servers[0].finish()
        await settle()

        assert rig.stats(0).failed_attempts == {"EngineDeadError": 1}
        assert (rig.endpoints[0].state, rig.endpoints[0].in_flight) == ("open", 0)

    async def test_of_the_second_leaves_the_answer_to_the_first(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.servers[1].reply(BROKEN)
        call = await hedged(rig)

        rig.servers[1].finish()
        await settle()
        assert rig.stats(1).failed_attempts == {"EngineDeadError": 1}
        rig.servers[0].finish()

        assert (await call).metadata.endpoint == "http://a"
        assert nothing_is_left(rig)

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    async def test_of_both_raise_that_of_the_first(
        self, make_rig: MakeRig, order: tuple[int, int]
    ) -> None:
        rig = make_rig("a", "b")
        rig.servers[0].reply(BROKEN)
        rig.servers[1].reply(ConnectionLostError)
        call = await hedged(rig)

        for place in order:
            rig.servers[place].finish()
            await settle()

        with pytest.raises(EngineDeadError) as caught:
            await call
        assert caught.value.endpoint == "http://a"
        assert len(caught.value.attempts) == 2
        assert nothing_is_left(rig)

    async def test_of_both_are_followed_by_an_attempt_elsewhere(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", "c")
        rig.listen("retry")
        call = await hedged(rig, max_retries=1)
        for server in rig.servers[:2]:
            server.always(BROKEN)
            server.finish()
        rig.servers[2].heal()

        result = await call

        assert result.metadata.endpoint == "http://c"
        assert [(event.endpoint, event.pause) for event in rig.told] == [("a", 0.0)]
        assert [rig.stats(place).retries for place in (0, 1, 2)] == [0, 0, 1]

    async def test_that_no_retry_would_help_are_raised(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        call = await hedged(rig, max_retries=3)
        for server in rig.servers:
            server.always(error(400, "no"))
            server.finish()

        with pytest.raises(BadRequestError):
            await call

        assert rig.sent() == [1, 1]

    @pytest.mark.parametrize("broken", [0, 1])
    async def test_that_are_foreign_give_both_slots_back(
        self, make_rig: MakeRig, broken: int
    ) -> None:
        rig = make_rig("a", "b")
        rig.servers[broken].reply(Foreign)  # type: ignore[arg-type]
        call = await hedged(rig)

        rig.servers[broken].finish()
        await settle()
        rig.servers[1 - broken].finish()

        assert (await call).metadata.endpoint == rig.endpoints[1 - broken].url
        assert nothing_is_left(rig)

    async def test_that_are_foreign_at_both_are_raised(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        for server in rig.servers:
            server.reply(Foreign)  # type: ignore[arg-type]
        call = await hedged(rig)

        for server in rig.servers:
            server.finish()

        with pytest.raises(Foreign):
            await call
        assert nothing_is_left(rig)


class Foreign(Exception):
    """An exception that is not of this library's tree."""


class TestAttempts:
    async def test_a_result_has_those_that_had_ended(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        call = await hedged(rig)

        rig.servers[1].finish()
        metadata = (await call).metadata

        assert [(each.endpoint, each.error) for each in metadata.attempts] == [("http://b", None)]

    async def test_a_failed_one_is_among_them(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.servers[0].reply(ConnectionLostError)
        call = await hedged(rig)

        rig.servers[0].finish()
        await settle()
        rig.servers[1].finish()
        metadata = (await call).metadata

        assert [(each.endpoint, each.error) for each in metadata.attempts] == [
            ("http://a", "ConnectionLostError: it is broken"),
            ("http://b", None),
        ]


class TestNoSecond:
    async def test_where_the_first_answers_in_time(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")

        await rig.ask(settings={"hedge_after": 3600.0})

        assert rig.sent() == [1, 0]

    async def test_where_the_first_fails_in_time(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.servers[0].reply(BROKEN)

        await rig.ask(settings={"hedge_after": 3600.0, "max_retries": 1})

        assert (rig.stats(1).hedged, rig.stats(1).retries) == (0, 1)

    async def test_where_it_was_not_asked_for(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.servers[0].hold()
        rig.start()

        await hedge_was_due(make_rig)

        assert rig.sent() == [1, 0]

    async def test_where_the_budget_is_spent(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", endpoint={"requests_per_minute": 1})
        while rig.fleet.budget.withdraw(asyncio.get_running_loop().time()):
            pass
        rig.servers[0].hold()
        rig.start(settings=HEDGE)

        await hedge_was_due(make_rig)

        assert rig.sent() == [1, 0]
        assert (await rig.ask()).metadata.endpoint == "http://b"  # its quota is untouched

    async def test_where_there_is_no_other_server(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        rig.servers[0].hold()
        rig.start(settings=HEDGE)

        await hedge_was_due(make_rig)

        assert (rig.sent(), rig.endpoints[0].in_flight) == ([1], 1)

    async def test_where_the_other_servers_are_full(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", endpoint={"max_concurrent_requests": 1})
        for server in rig.servers:
            server.hold()
            rig.start(settings=HEDGE)

        await hedge_was_due(make_rig)

        assert (rig.sent(), rig.fleet.waiting) == ([1, 1], 0)

    async def test_where_the_other_server_is_shut_out(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.endpoints[1].shut_out(EngineDeadError("dead"))
        rig.servers[0].hold()
        rig.start(settings=HEDGE)

        await hedge_was_due(make_rig)

        assert rig.sent() == [1, 0]

    async def test_where_the_other_server_has_another_model(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        rig.serve("x", "y")
        rig.servers[0].hold()
        rig.start(settings=HEDGE, model="x")

        await hedge_was_due(make_rig)

        assert rig.sent() == [1, 0]

    async def test_that_costs_budget_where_there_is_nobody_to_send_it_to(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a")
        rig.servers[0].hold()
        rig.start(settings=HEDGE)
        await settle()
        left = rig.fleet.budget.remaining(0.0)

        await hedge_was_due(make_rig)

        assert rig.fleet.budget.remaining(0.0) == left

    @pytest.mark.parametrize("leave", [False, True])
    async def test_where_all_servers_are_leaving_and_the_first_goes_on(
        self, make_rig: MakeRig, pass_time: PassTime, leave: bool
    ) -> None:
        rig = make_rig("a", "b")
        rig.servers[0].hold()
        call = rig.start(settings={"hedge_after": 1})
        await settle()
        for endpoint in rig.endpoints:
            rig.fleet.remove(endpoint) if leave else endpoint.drain()

        pass_time(1.1)
        await settle()
        rig.servers[0].finish()

        assert (await call).metadata.endpoint == "http://a"

    async def test_for_a_stream(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", settings=HEDGE)
        rig.servers[0].hold()
        request = generation_request({"prompt": "a"}, stream=True)
        stream: GenerationStream[GenerationResult] = GenerationStream(
            rig.fleet, request, rig.settings
        )
        reading = asyncio.create_task(stream.collect())

        await hedge_was_due(make_rig)

        assert rig.sent() == [1, 0]
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    async def test_for_a_question_that_generates_nothing(
        self, make_rig: MakeRig, server: ScriptedServer
    ) -> None:
        server.always(STALL)
        with ScriptedServer() as other:
            async with over_sockets(server, other) as fleet:
                asking = asyncio.create_task(
                    fleet.send(get_request("/v1/models"), fleet.settings, lambda body, _: body)
                )
                await eventually(lambda: len(server.requests) == 1)

                await hedge_was_due(make_rig)

                assert other.connections == 0
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)


class TestTheEnd:
    async def test_a_caller_that_leaves_leaves_nothing(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b", endpoint=FIRST_FAILURE)
        call = await hedged(rig)

        call.cancel()
        await settle()

        assert call.cancelled()
        assert nothing_is_left(rig)
        assert [endpoint.state for endpoint in rig.endpoints] == ["closed", "closed"]
        assert (rig.stats(0).cancelled, rig.stats(1).cancelled) == (1, 0)

    async def test_the_time_of_the_call_ends_both(
        self, make_rig: MakeRig, pass_time: PassTime
    ) -> None:
        rig = make_rig("a", "b")
        call = await hedged(rig, timeout=60.0)

        pass_time(60)
        with pytest.raises(RequestTimeoutError) as caught:
            await call

        assert nothing_is_left(rig)
        assert {each.endpoint for each in caught.value.attempts} == {"http://a", "http://b"}

    async def test_who_had_most_of_the_time_of_the_call_has_failed(
        self, make_rig: MakeRig, pass_time: PassTime
    ) -> None:
        rig = make_rig("a", "b", endpoint=FIRST_FAILURE)
        call = await hedged(rig, timeout=60.0)

        pass_time(60)
        with pytest.raises(RequestTimeoutError):
            await call

        assert [endpoint.state for endpoint in rig.endpoints] == ["open", "open"]

    async def test_the_time_of_an_attempt_ends_both_and_the_first_has_failed(
        self, make_rig: MakeRig, pass_time: PassTime
    ) -> None:
        rig = make_rig("a", "b", endpoint=FIRST_FAILURE, settings={"timeout": 90.0})
        call = await hedged(rig, attempt_timeout=60.0)

        pass_time(60)
        with pytest.raises(AttemptTimeoutError):
            await call

        assert nothing_is_left(rig)
        assert rig.stats(0).failed_attempts == {"AttemptTimeoutError": 1}
        assert [endpoint.state for endpoint in rig.endpoints] == ["open", "closed"]

    async def test_a_server_that_hangs_alone_is_shut_out(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint=FIRST_FAILURE)
        rig.servers[0].hold()

        with pytest.raises(AttemptTimeoutError):
            await rig.ask(settings={**HEDGE, "attempt_timeout": 0.01})

        assert rig.endpoints[0].state == "open"


STEPS = ["finish a", "finish b", "break a", "break b", "cancel", "turn"]


@given(st.lists(st.sampled_from(STEPS), max_size=12))
def test_however_it_ends_no_slot_is_lost_and_the_call_is_counted_once(steps: list[str]) -> None:
    async def play() -> None:
        rig = Rig("a", "b", settings={"hedge_after": 1e-9})
        for server in rig.servers:
            server.hold()
        call = rig.start()
        for step in steps:
            what, _, name = step.partition(" ")
            await asyncio.sleep(0)
            if what == "cancel":
                call.cancel()
            elif name:
                server = rig.transport.server(name)
                server.always(BROKEN) if what == "break" else None
                server.finish()
        for server in rig.servers:
            server.heal()
        (outcome,) = await asyncio.gather(call, return_exceptions=True)
        assert isinstance(outcome, GenerationResult | VllmError | asyncio.CancelledError)
        await settle()
        assert nothing_is_left(rig)
        assert rig.statistics().overall.requests == 1
        await rig.close()

    asyncio.run(play())


class TestFirstAnswer:
    """The race itself, without servers."""

    async def test_the_loser_has_ended_when_the_answer_is_there(self) -> None:
        ended: list[str] = []

        assert await first_answer(never(ended), 0.001, lambda: answer("fast")) == "fast"
        assert ended == ["slow"]

    async def test_a_second_that_cannot_be_made_ends_the_first(self) -> None:
        ended: list[str] = []

        with pytest.raises(ZeroDivisionError):
            await first_answer(never(ended), 0.001, failing)
        assert ended == ["slow"]

    async def test_the_answer_is_waited_for_where_there_is_no_second(self) -> None:
        gate = asyncio.Event()

        assert await first_answer(answer("slow", after=gate), 0.001, gate.set) == "slow"


async def answer(text: str, *, after: asyncio.Event | None = None) -> str:
    if after is not None:
        await after.wait()
    return text


async def never(ended: list[str]) -> str:
    try:
        return await answer("slow", after=asyncio.Event())
    finally:
        ended.append("slow")


def failing() -> Any:
    raise ZeroDivisionError
