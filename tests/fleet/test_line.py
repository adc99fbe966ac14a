"""Who waits for a slot, who is next, and that no slot is lost on the way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_servers import BROKEN, Clock, MakeRig, Rig, settle
from vllm_unified.endpoints.queue import AGEING
from vllm_unified.errors import (
    CircuitOpenError,
    ClientClosedError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    QueueFullError,
    QueueTimeoutError,
    RequestTimeoutError,
)
from vllm_unified.fleet.stream import GenerationStream
from vllm_unified.results import GenerationResult
from vllm_unified.wire.requests import generation_request

ONE = {"max_concurrent_requests": 1}
TWO = {"max_concurrent_requests": 2}
FIRST_FAILURE = {"failure_threshold": 1}
Ask = dict[str, Any]


async def full(rig: Rig) -> Rig:
    """The same, with all of its servers' slots taken by requests that wait for ``finish``."""
    for server, endpoint in zip(rig.servers, rig.endpoints, strict=True):
        server.hold()
        for _ in range(endpoint.capacity):
            rig.start(prompt="first")
    await settle()
    return rig


async def order_of(rig: Rig, *asks: Ask, clock: Clock | None = None) -> list[str]:
    """The prompts of these requests as they reach a server that takes one at a time.

    With a clock, a second passes between two of them.
    """
    (server,) = (await full(rig)).servers
    for ask in asks:
        rig.start(**ask)
        await settle()
        if clock is not None:
            clock.advance(1)
    for _ in asks:
        server.finish()
        await settle()
    return [sent.json["prompt"] for sent in server.requests[1:]]


async def test_as_many_as_the_limit_are_sent_at_once(make_rig: MakeRig) -> None:
    rig = await full(make_rig("a", endpoint=TWO))

    third = rig.start()
    await settle()

    assert (rig.sent(), rig.fleet.waiting) == ([2], 1)
    rig.servers[0].finish()
    await settle()
    assert (rig.sent(), rig.fleet.waiting) == ([3], 0)
    rig.servers[0].finish(2)
    await third
    assert rig.endpoints[0].in_flight == 0


async def test_first_come_first_served(make_rig: MakeRig) -> None:
    rig = make_rig("a", endpoint=ONE)

    order = await order_of(rig, *({"prompt": str(number)} for number in range(4)))

    assert order == ["0", "1", "2", "3"]


async def test_whoever_has_room_first_serves_the_next(make_rig: MakeRig) -> None:
    rig = await full(make_rig("a", "b", endpoint=ONE))
    rig.start(prompt="next")
    await settle()

    rig.servers[1].finish()
    await settle()

    assert [sent.json["prompt"] for sent in rig.servers[1].requests] == ["first", "next"]
    assert rig.sent() == [1, 2]


async def test_one_more_than_the_line_holds_is_turned_away_at_once(make_rig: MakeRig) -> None:
    rig = await full(make_rig("a", endpoint=TWO, queue_size=1))
    rig.start()
    await settle()

    with pytest.raises(QueueFullError) as caught:
        await rig.ask(priority="low")

    message = str(caught.value)
    assert "the queue is full: 1 waiting (normal 1), the oldest for" in message
    assert "2 in flight of 2 that are let through" in message
    assert (caught.value.attempts, rig.sent()) == ((), [2])


async def test_who_is_more_urgent_takes_the_last_place_of_a_full_line(make_rig: MakeRig) -> None:
    rig = await full(make_rig("a", endpoint=ONE, queue_size=2))
    rig.start(prompt="early", priority="low")
    late = rig.start(prompt="late", priority="low")
    await settle()

    rig.start(prompt="urgent", priority="high")
    await settle()

    with pytest.raises(QueueFullError, match="2 waiting"):
        await late
    for _ in range(3):
        rig.servers[0].finish()
        await settle()
    sent = [request.json["prompt"] for request in rig.servers[0].requests]
    assert sent == ["first", "urgent", "early"]


async def test_a_full_line_is_told(make_rig: MakeRig) -> None:
    rig = await full(make_rig("a", endpoint=ONE, queue_size=0))
    rig.listen("queue_full")

    with pytest.raises(QueueFullError) as caught:
        await rig.ask()

    (event,) = rig.told
    assert event.error is caught.value
    assert event.request_id == caught.value.request_id


async def test_a_full_line_is_told_of_a_stream_too(make_rig: MakeRig) -> None:
    rig = await full(make_rig("a", endpoint=ONE, queue_size=0))
    rig.listen("queue_full")
    request = generation_request({"prompt": "a"}, stream=True)
    stream: GenerationStream[GenerationResult] = GenerationStream(rig.fleet, request, rig.settings)

    with pytest.raises(QueueFullError) as caught:
        await stream.collect()

    assert [event.error for event in rig.told] == [caught.value]


async def test_who_is_turned_away_is_not_tried_again(make_rig: MakeRig) -> None:
    rig = await full(make_rig("a", endpoint=ONE, queue_size=0))
    rig.listen("retry")

    with pytest.raises(QueueFullError):
        await rig.ask(settings={"max_retries": 5})

    assert rig.told == []


async def test_no_line_at_all(make_rig: MakeRig) -> None:
    rig = await full(make_rig("a", endpoint=ONE, queue_size=0))

    with pytest.raises(QueueFullError):
        await rig.ask()

    rig.servers[0].heal()
    await settle()
    assert (await rig.ask()).text == "a"


async def test_who_leaves_the_line_is_not_served(make_rig: MakeRig) -> None:
    rig = await full(make_rig("a", endpoint=ONE))
    leaving = rig.start(prompt="leaving")
    rig.start(prompt="staying")
    await settle()

    leaving.cancel()
    await settle()
    assert rig.fleet.waiting == 1
    rig.servers[0].finish()
    await settle()

    assert [sent.json["prompt"] for sent in rig.servers[0].requests] == ["first", "staying"]
    assert rig.endpoints[0].in_flight == 1


async def test_cancelled_just_before_the_slot_is_handed_over(make_rig: MakeRig) -> None:
    """The line still has the one that was cancelled in this turn of the loop."""
    rig = await full(make_rig("a", endpoint=ONE))
    leaving, staying = rig.start(prompt="leaving"), rig.start(prompt="staying")
    await settle()

    leaving.cancel()
    rig.tasks[0].cancel()
    await settle()
    rig.servers[0].finish()

    assert (await staying).text == "a"
    assert (rig.endpoints[0].in_flight, rig.fleet.waiting) == (0, 0)


async def test_cancelled_just_after_the_slot_was_handed_over(make_rig: MakeRig) -> None:
    rig = await full(make_rig("a", endpoint=ONE))
    leaving, staying = rig.start(prompt="leaving"), rig.start(prompt="staying")
    await settle()

    # Two callbacks of one turn: the slot is given back, and then its next holder leaves.
    rig.tasks[0].cancel()
    asyncio.get_running_loop().call_soon(leaving.cancel)
    await settle()
    rig.servers[0].finish()

    assert (await staying).text == "a"
    assert [sent.json["prompt"] for sent in rig.servers[0].requests] == ["first", "staying"]
    assert (rig.endpoints[0].in_flight, rig.fleet.waiting) == (0, 0)


@given(
    st.lists(
        st.sampled_from(["ask", "finish", "cancel", "cancel first", "break", "turn"]), max_size=60
    )
)
def test_no_slot_is_ever_lost_or_doubled(steps: list[str]) -> None:
    async def play() -> None:
        rig = Rig("a", endpoint=TWO, settings={"queue_size": 3})
        (server,), (endpoint,) = rig.servers, rig.endpoints
        server.hold()
        for step in steps:
            under_way = [task for task in rig.tasks if not task.done()]
            if step == "ask":
                rig.start()
            elif step in ("finish", "break"):
                server.reply(BROKEN) if step == "break" else None
                server.finish(min(1, server.held))
            elif step.startswith("cancel") and under_way:
                under_way[0 if step == "cancel first" else -1].cancel()
            else:
                await asyncio.sleep(0)
            assert 0 <= endpoint.in_flight <= 2
            assert 0 <= rig.fleet.waiting <= 3
        await settle()
        open_tasks = sum(not task.done() for task in rig.tasks)
        assert endpoint.in_flight == server.held
        assert endpoint.in_flight + rig.fleet.waiting == open_tasks
        assert rig.fleet.waiting == 0 or endpoint.in_flight == 2
        server.heal()
        await asyncio.gather(*rig.tasks, return_exceptions=True)
        assert (endpoint.in_flight, rig.fleet.waiting) == (0, 0)
        await rig.close()

    asyncio.run(play())


class TestPriorities:
    async def test_names_in_their_order(self, make_rig: MakeRig) -> None:
        asks = [{"prompt": name, "priority": name} for name in ("low", "normal", "high")]

        assert await order_of(make_rig("a", endpoint=ONE), *asks) == ["high", "normal", "low"]

    async def test_numbers_among_names(self, make_rig: MakeRig) -> None:
        numbers = (11, "low", 9, 0, -11, "high")
        asks = [{"prompt": str(number), "priority": number} for number in numbers]

        order = await order_of(make_rig("a", endpoint=ONE), *asks)

        assert order == ["-11", "high", "0", "9", "low", "11"]

    async def test_the_priority_goes_to_the_server_as_its_number(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")

        await rig.ask(priority="high")
        await rig.ask(priority=3)
        await rig.ask()

        sent = [each.json.get("priority") for each in rig.servers[0].requests]
        assert sent == [-10, 3, None]

    async def test_who_waits_grows_old(self, make_rig: MakeRig, clock: Clock) -> None:
        rig = await full(make_rig("a", endpoint=ONE))
        rig.start(prompt="old", priority="low")
        await settle()
        clock.advance(10 * AGEING + 1)
        rig.start(prompt="young", priority="normal")
        await settle()

        rig.servers[0].finish()
        await settle()

        assert rig.servers[0].requests[-1].json["prompt"] == "old"

    async def test_who_waits_grows_old_slowly(self, make_rig: MakeRig, clock: Clock) -> None:
        rig = await full(make_rig("a", endpoint=ONE))
        rig.start(prompt="old", priority="low")
        await settle()
        clock.advance(10 * AGEING - 1)
        rig.start(prompt="young", priority="normal")
        await settle()

        rig.servers[0].finish()
        await settle()

        assert rig.servers[0].requests[-1].json["prompt"] == "young"

    async def test_callers_of_one_priority_take_turns(
        self, make_rig: MakeRig, clock: Clock
    ) -> None:
        asks: list[Ask] = [
            {"prompt": f"{caller}{number}", "settings": {"caller": caller}}
            for caller, numbers in (("many", range(3)), ("few", range(1)), ("some", range(2)))
            for number in numbers
        ]

        order = await order_of(make_rig("a", endpoint=ONE), *asks, clock=clock)

        assert order == ["many0", "few0", "some0", "many1", "some1", "many2"]


class TestModels:
    async def test_who_wants_a_model_that_is_free_does_not_wait_for_another(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a", "b", endpoint=ONE)
        rig.serve("x", "y")
        rig.servers[0].hold()
        for _ in range(2):
            rig.start(model="x")
        await settle()

        assert (await rig.ask(model="y")).text == "a"
        assert (rig.sent(), rig.fleet.waiting) == ([1, 1], 1)

    async def test_who_waits_for_one_model_takes_no_place_from_another(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a", "b", endpoint=ONE, queue_size=1)
        rig.serve("x", "y")
        rig.servers[0].hold()
        for _ in range(2):
            rig.start(model="x")
        await settle()

        assert (await rig.ask(model="y")).text == "a"


class TestTime:
    async def test_in_line_for_queue_timeout_at_most(self, make_rig: MakeRig) -> None:
        rig = await full(make_rig("a", endpoint=ONE))

        with pytest.raises(QueueTimeoutError) as caught:
            await rig.ask(settings={"queue_timeout": 0.01})

        message = str(caught.value)
        assert "no slot came free within 0.01 s" in message
        assert "1 in flight of 1 that are let through" in message
        assert (rig.fleet.waiting, rig.sent()) == (0, [1])

    async def test_who_waited_in_vain_is_not_tried_again(self, make_rig: MakeRig) -> None:
        rig = await full(make_rig("a", endpoint=ONE))
        rig.listen("retry")

        with pytest.raises(QueueTimeoutError):
            await rig.ask(settings={"queue_timeout": 0.01, "max_retries": 5})

        assert rig.told == []

    async def test_the_time_in_line_is_not_that_of_the_answer(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint=ONE)
        rig.servers[0].hold()
        answer = rig.start(settings={"queue_timeout": 0.01})
        outcome = rig.start(settings={"queue_timeout": 0.02})

        with pytest.raises(QueueTimeoutError):
            await outcome

        rig.servers[0].finish()
        assert (await answer).text == "a"

    async def test_a_call_whose_time_ends_in_line_says_so(self, make_rig: MakeRig) -> None:
        rig = await full(make_rig("a", endpoint=ONE))

        with pytest.raises(QueueTimeoutError, match=r"no slot came free within 0\.01 s"):
            await rig.ask(settings={"timeout": 0.01})

    async def test_a_call_whose_time_ends_at_a_server_does_not(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint=ONE)
        rig.servers[0].hold()

        with pytest.raises(RequestTimeoutError) as caught:
            await rig.ask(settings={"timeout": 0.01})

        assert type(caught.value) is RequestTimeoutError

    @pytest.mark.usefixtures("no_pauses")
    async def test_who_was_in_line_before_it_was_sent_does_not_either(
        self, make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("vllm_unified.fleet.router._TRIAL_SECONDS", 0.001)
        rig = await full(make_rig("a", endpoint={**TWO, "circuit_breaker": FIRST_FAILURE}))
        rig.start()
        late = rig.start(settings={"timeout": 0.3, "max_retries": 5})
        await settle()
        rig.servers[0].always(BROKEN)
        rig.servers[0].finish()
        rig.tasks[1].cancel()

        with pytest.raises(RequestTimeoutError) as caught:
            await late

        assert type(caught.value) is RequestTimeoutError

    async def test_the_time_in_line_is_counted(self, make_rig: MakeRig, clock: Clock) -> None:
        rig = await full(make_rig("a", endpoint=ONE))
        second = rig.start()
        await settle()
        clock.advance(5)
        rig.servers[0].heal()
        await second

        wait = rig.stats().queue_wait

        assert wait is not None
        assert (wait.count, wait.max) == (2, 5.0)


class TestChanges:
    async def test_a_server_that_is_added_serves_the_line_at_once(self, make_rig: MakeRig) -> None:
        rig = await full(make_rig("a", endpoint=ONE))
        waiting = rig.start()
        await settle()

        rig.fleet.add(rig.directory.create_endpoint("http://b", {}))

        assert (await waiting).metadata.endpoint == "http://b"

    async def test_with_the_last_server_goes_the_line(self, make_rig: MakeRig) -> None:
        rig = await full(make_rig("a", endpoint=ONE))
        waiting = rig.start()
        await settle()

        rig.fleet.remove(rig.endpoints[0])

        with pytest.raises(ConfigurationError, match="no endpoint"):
            await waiting

    async def test_closing_turns_the_line_away(self, make_rig: MakeRig) -> None:
        rig = await full(make_rig("a", endpoint=ONE))
        waiting = rig.start()
        await settle()

        await rig.fleet.close()

        with pytest.raises(ClientClosedError):
            await waiting

    async def test_a_limit_that_shrinks_lets_nobody_in_before_its_time(
        self, make_rig: MakeRig
    ) -> None:
        rig = await full(make_rig("a", endpoint=TWO))
        rig.start()
        await settle()
        rig.endpoints[0].limit.on_overload(in_flight=2)

        rig.servers[0].finish()
        await settle()
        assert rig.sent() == [2]
        rig.servers[0].finish()
        await settle()
        assert rig.sent() == [3]

    async def test_when_the_last_server_is_shut_out_the_line_is_told(
        self, make_rig: MakeRig
    ) -> None:
        rig = await full(make_rig("a", endpoint={**ONE, "circuit_breaker": FIRST_FAILURE}))
        waiting = [rig.start() for _ in range(3)]
        await settle()
        rig.servers[0].always(BROKEN)

        rig.servers[0].finish()
        await settle()

        # One of them is the trial.
        turned_away = [task for task in waiting if task.done()]
        assert len(turned_away) == 2
        assert all(isinstance(task.exception(), CircuitOpenError) for task in turned_away)

    async def test_a_server_whose_time_has_come_again_serves_the_line(
        self, make_rig: MakeRig
    ) -> None:
        breaker = {"failure_threshold": 1, "reset_timeout": 20}
        rig = make_rig("a", "b", endpoint={**ONE, "circuit_breaker": breaker})
        rig.servers[0].hold()
        rig.servers[1].reply(BROKEN)
        while rig.sent() != [1, 1]:
            rig.start()
            await settle()

        assert (await rig.ask(settings={"timeout": 1})).metadata.endpoint == "http://b"


class TestQuota:
    async def test_who_is_beyond_the_quota_waits_for_the_next_minute(
        self, make_rig: MakeRig, clock: Clock
    ) -> None:
        rig = make_rig("a", endpoint={"requests_per_minute": 2})
        await rig.ask()
        await rig.ask()
        third = rig.start()
        await settle()
        assert (rig.sent(), rig.fleet.waiting) == ([2], 1)

        clock.advance(60)
        fourth = rig.start()  # coming wakes the line as well as the alarm would

        await asyncio.gather(third, fourth)
        assert rig.sent() == [4]

    async def test_the_alarm_wakes_the_line(
        self, make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("vllm_unified.endpoints.quota.WINDOW", 0.02)
        rig = make_rig("a", endpoint={"requests_per_minute": 1})
        await rig.ask()

        assert (await rig.ask()).text == "a"

    async def test_who_needs_more_than_is_left_waits_for_its_time(
        self, make_rig: MakeRig, clock: Clock
    ) -> None:
        rig = make_rig("a", endpoint={"tokens_per_minute": 100})
        await rig.ask()
        large = rig.start(max_tokens=90)
        await settle()
        assert (rig.sent(), rig.fleet.waiting) == ([1], 1)

        clock.advance(60)
        rig.start()  # coming wakes the line as well as the alarm would

        assert (await large).text == "a"

    async def test_the_alarm_wakes_who_needs_more_than_is_left(
        self, make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("vllm_unified.endpoints.quota.WINDOW", 0.02)
        rig = make_rig("a", endpoint={"tokens_per_minute": 100})
        await rig.ask()

        assert (await rig.ask(max_tokens=90)).text == "a"

    async def test_who_fits_in_goes_when_the_one_before_that_does_not_leaves(
        self, make_rig: MakeRig, clock: Clock
    ) -> None:
        rig = make_rig("a", endpoint={"tokens_per_minute": 100})
        await rig.ask()
        large, small = rig.start(max_tokens=90), rig.start()
        await settle()
        assert rig.fleet.waiting == 2

        large.cancel()

        assert (await small).text == "a"

    async def test_a_connection_that_was_refused_takes_nothing_of_it(
        self, make_rig: MakeRig, clock: Clock
    ) -> None:
        rig = make_rig("a", endpoint={"requests_per_minute": 1})
        rig.servers[0].reply(ConnectError)
        await rig.fail()

        assert (await rig.ask()).text == "a"

    async def test_a_connection_that_was_lost_does(self, make_rig: MakeRig, clock: Clock) -> None:
        rig = make_rig("a", endpoint={"requests_per_minute": 1})
        rig.servers[0].reply(ConnectionLostError)
        await rig.fail()
        rig.start()

        await settle()

        assert (rig.sent(), rig.fleet.waiting) == ([1], 1)

    async def test_a_line_that_no_quota_helps_is_not_looked_at_again_and_again(
        self, make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rig = make_rig("a", "b", endpoint={**ONE, "requests_per_minute": 100})
        rig.serve("x", "y")
        rig.servers[0].hold()
        for _ in range(2):
            rig.start(model="x")
        alarms: list[float] = []
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "call_later", lambda seconds, *_: alarms.append(seconds))
        await settle()

        assert rig.fleet.waiting == 1
        assert [seconds for seconds in alarms if seconds < 0.1] == []


class TestTwoFleets:
    async def test_with_one_endpoint_are_served_in_turn(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint=ONE)
        other = rig.directory.create_fleet(rig.endpoints, {})
        await full(rig)
        for fleet, name in ((rig.fleet, "one"), (other, "two")):
            for _ in range(3):
                rig.start(fleet=fleet, prompt=name)
            await settle()

        for _ in range(6):
            rig.servers[0].finish()
            await settle()

        served = [sent.json["prompt"] for sent in rig.servers[0].requests[1:]]
        assert [set(served[turn : turn + 2]) for turn in (0, 2, 4)] == [{"one", "two"}] * 3

    async def test_a_call_to_the_endpoint_alone_is_served_beside_a_fleets(
        self, make_rig: MakeRig
    ) -> None:
        rig = await full(make_rig("a", endpoint=ONE))
        for _ in range(5):
            rig.start(prompt="fleet")
        await settle()
        alone = rig.start(fleet=rig.directory.route(rig.endpoints[0]), prompt="alone")
        await settle()

        for _ in range(2):
            rig.servers[0].finish()
            await settle()

        assert "alone" in [sent.json["prompt"] for sent in rig.servers[0].requests]
        alone.cancel()

    async def test_one_that_is_closed_leaves_its_turn_to_the_other(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint=ONE)
        other = rig.directory.create_fleet(rig.endpoints, {})
        await full(rig)
        waiting = rig.start()
        rig.start(fleet=other)
        await settle()

        await rig.directory.close_fleet(other)
        rig.servers[0].heal()

        assert (await waiting).text == "a"
        assert rig.endpoints[0].in_flight == 0


class TestStrategies:
    async def test_a_strategy_that_raises_fails_the_call_that_it_was_asked_for(
        self, make_rig: MakeRig
    ) -> None:
        broken = False

        def choose(candidates: Any, route: Any) -> Any:
            if broken:
                raise ValueError("no idea")
            return candidates[0]

        rig = await full(make_rig("a", "b", endpoint=ONE, strategy=choose))
        waiting = rig.start()
        await settle()
        broken = True

        rig.servers[0].finish()

        assert (await rig.tasks[0]).text == "a"
        with pytest.raises(ConfigurationError, match="no idea"):
            await asyncio.wait_for(waiting, 20)
