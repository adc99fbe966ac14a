"""An endpoint: what its slots say of it, that none is lost, and what it serves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import answers
from tests.support.fake_servers import FakeTransport
from vllm_unified.endpoints.breaker import BreakerConfig
from vllm_unified.endpoints.config import EndpointConfig
from vllm_unified.endpoints.endpoint import Endpoint, Slot
from vllm_unified.errors import (
    BadRequestError,
    ConfigurationError,
    ConnectError,
    EngineDeadError,
    OverloadedError,
    RequestTimeoutError,
    VllmError,
)
from vllm_unified.events import Events
from vllm_unified.results import ModelCard
from vllm_unified.settings import Settings

NOW = 1000.0
BREAKER = BreakerConfig(failure_threshold=2, reset_timeout=10.0, half_open_successful_calls=2)


def made(*, limit: int = 8, **config: Any) -> Endpoint:
    settings = Settings(api_url="http://a", max_concurrent_requests=limit)
    given = EndpointConfig(settings=settings, **{"circuit_breaker": BREAKER, **config})
    return Endpoint("a", given, FakeTransport(), Events())


def wrong() -> VllmError:
    return BadRequestError("no", status_code=400)


def busy() -> VllmError:
    return OverloadedError(answers.BUSY, status_code=503)


def shut(endpoint: Endpoint, now: float = NOW) -> Endpoint:
    """The same, after as many failures as open its breaker."""
    for _ in range(BREAKER.failure_threshold):
        Slot(endpoint, now).fail(EngineDeadError("dead"), now)
    assert endpoint.breaker.state == "open"
    return endpoint


class TestSlots:
    def test_one_is_in_flight_until_it_is_given_back(self) -> None:
        endpoint = made()
        slot = Slot(endpoint, NOW)
        assert (endpoint.in_flight, slot.held) == (1, True)

        slot.succeed(NOW + 1, tokens=5)

        assert (endpoint.in_flight, slot.held) == (0, False)

    @given(
        st.lists(
            st.sampled_from(["succeed", "fail", "busy", "wrong", "prove", "leave"]), max_size=8
        )
    )
    def test_however_it_is_ended_it_is_given_back_once(self, endings: list[str]) -> None:
        endpoint = made()
        other, slot = Slot(endpoint, NOW), Slot(endpoint, NOW)
        for ending in [*endings, "leave"]:
            end(slot, ending)

        assert (endpoint.in_flight, slot.held, other.held) == (1, False, True)

    @given(
        st.lists(
            st.tuples(
                st.integers(0, 5),
                st.sampled_from(["begin", "succeed", "fail", "busy", "wrong", "prove", "leave"]),
            ),
            max_size=60,
        )
    )
    def test_what_is_in_flight_is_what_is_held(self, steps: list[tuple[int, str]]) -> None:
        endpoint = made(requests_per_minute=1000)
        slots: list[Slot] = []
        for place, step in steps:
            if step == "begin":
                slots.append(Slot(endpoint, NOW))
            elif slots:
                end(slots[place % len(slots)], step)
            assert endpoint.in_flight == sum(slot.held for slot in slots)
            assert 1 <= endpoint.capacity <= 8

    @given(st.lists(st.sampled_from(["fail", "busy", "wrong", "leave", "prove"]), max_size=20))
    def test_trials_that_say_nothing_leave_room_for_others(self, endings: list[str]) -> None:
        """However trials end, one that is due can always begin, and successes close it."""
        endpoint, now = shut(made()), NOW
        for ending in endings:
            now += 100
            if endpoint.is_open(now):
                slot = Slot(endpoint, now)
                end(slot, ending, now)
                slot.leave()
        for _ in range(BREAKER.half_open_successful_calls):
            now += 100
            assert endpoint.is_open(now)
            Slot(endpoint, now).succeed(now, tokens=1)

        assert endpoint.state == "closed"

    def test_who_watches_is_told_of_each_that_is_given_back(self) -> None:
        endpoint, told = made(), []
        endpoint.watchers.append(lambda given: told.append(given.in_flight))
        slots = [Slot(endpoint, NOW) for _ in range(2)]

        for slot in slots:
            slot.leave()

        assert told == [1, 0]

    def test_its_repr_says_how_it_stands(self) -> None:
        endpoint = made()
        slot = Slot(endpoint, NOW)
        assert repr(slot) == "<Slot at a>"
        assert repr(endpoint) == "<Endpoint a closed, 1/8 in flight>"

        slot.leave()

        assert repr(slot) == "<Slot at a, given back>"


def end(slot: Slot, how: str, now: float = NOW) -> None:
    if how == "succeed":
        slot.succeed(now, tokens=1)
    elif how == "prove":
        if slot.held:
            slot.prove(now)
    elif how == "leave":
        slot.leave()
    else:
        slot.fail({"fail": EngineDeadError("dead"), "busy": busy(), "wrong": wrong()}[how], now)


class TestVerdicts:
    @pytest.mark.parametrize("kind", [EngineDeadError, ConnectError, RequestTimeoutError])
    def test_a_failure(self, kind: type[VllmError]) -> None:
        endpoint, error = made(), kind("broken")

        Slot(endpoint, NOW).fail(error, NOW + 1)

        assert (endpoint.error, endpoint.failed_at) == (error, NOW + 1)

    def test_failures_in_a_row_shut_it_out(self) -> None:
        endpoint = shut(made())

        assert not endpoint.is_open(NOW)
        assert endpoint.is_open(NOW + 10)

    def test_a_failure_after_the_first_token_counts_too(self) -> None:
        endpoint = made(circuit_breaker=BreakerConfig(failure_threshold=1))
        slot = Slot(endpoint, NOW)
        slot.prove(NOW)

        slot.fail(EngineDeadError("dead"), NOW)

        assert endpoint.state == "open"

    def test_overload_lowers_the_limit_and_is_no_failure(self) -> None:
        endpoint = made()
        slots = [Slot(endpoint, NOW) for _ in range(8)]

        slots[0].fail(busy(), NOW)

        assert endpoint.capacity < 8
        assert (endpoint.error, endpoint.state) == (None, "closed")

    def test_a_wrong_request_is_an_answer(self) -> None:
        endpoint = made()
        Slot(endpoint, NOW).fail(EngineDeadError("dead"), NOW)
        Slot(endpoint, NOW).fail(wrong(), NOW)
        Slot(endpoint, NOW).fail(EngineDeadError("dead"), NOW)

        assert endpoint.state == "closed"

    def test_what_was_found_here_says_nothing(self) -> None:
        endpoint = made()
        Slot(endpoint, NOW).fail(EngineDeadError("dead"), NOW)
        Slot(endpoint, NOW).fail(ConfigurationError("no"), NOW)
        Slot(endpoint, NOW).fail(EngineDeadError("dead"), NOW)

        assert endpoint.state == "open"

    def test_a_success_ends_what_was_held_against_it(self) -> None:
        endpoint = made()
        Slot(endpoint, NOW).fail(EngineDeadError("dead"), NOW)

        Slot(endpoint, NOW).succeed(NOW, tokens=1)

        assert endpoint.error is None
        Slot(endpoint, NOW).fail(EngineDeadError("dead"), NOW)
        assert endpoint.state == "closed"

    def test_a_verdict_of_before_it_was_shut_out_closes_nothing(self) -> None:
        endpoint = made()
        late = Slot(endpoint, NOW)
        shut(endpoint)

        late.succeed(NOW + 1, tokens=1)

        assert endpoint.state == "open"


class TestProof:
    def test_the_first_token_is_one(self) -> None:
        endpoint = made()
        Slot(endpoint, NOW).fail(EngineDeadError("dead"), NOW)
        slot = Slot(endpoint, NOW)

        slot.prove(NOW + 2)

        assert (endpoint.succeeded_at, endpoint.error) == (NOW + 2, None)
        assert (slot.held, endpoint.in_flight) == (True, 1)

    def test_the_end_of_a_stream_is_no_second_one(self) -> None:
        endpoint = shut(made())
        assert endpoint.is_open(NOW + 10)
        slot = Slot(endpoint, NOW + 10)

        slot.prove(NOW + 11)
        slot.succeed(NOW + 12, tokens=100)

        assert endpoint.state == "half_open"

    def test_a_server_that_dies_after_every_first_token_is_shut_out(self) -> None:
        endpoint = made()
        for _ in range(BREAKER.failure_threshold):
            assert endpoint.state == "closed"
            slot = Slot(endpoint, NOW)
            slot.prove(NOW)
            slot.fail(EngineDeadError("dead"), NOW)

        assert endpoint.state == "open"

    def test_the_end_of_a_stream_ends_what_was_held_against_it(self) -> None:
        endpoint = made()
        Slot(endpoint, NOW).fail(EngineDeadError("dead"), NOW)
        slot = Slot(endpoint, NOW)
        slot.prove(NOW)

        slot.succeed(NOW, tokens=1)

        Slot(endpoint, NOW).fail(EngineDeadError("dead"), NOW)
        assert endpoint.state == "closed"

    def test_the_first_tokens_of_trials_let_it_in_while_their_streams_go_on(self) -> None:
        endpoint = shut(made())
        trials = []
        for _ in range(BREAKER.half_open_successful_calls):
            assert endpoint.is_open(NOW + 10)
            trials.append(Slot(endpoint, NOW + 10))

        for trial in trials:
            trial.prove(NOW + 11)

        assert (endpoint.state, endpoint.in_flight) == ("closed", len(trials))

    def test_a_trial_that_dies_after_its_first_token_shuts_it_out_again(self) -> None:
        endpoint = shut(made())
        assert endpoint.is_open(NOW + 10)
        trial = Slot(endpoint, NOW + 10)
        trial.prove(NOW + 11)

        trial.fail(EngineDeadError("dead"), NOW + 12)

        assert endpoint.state == "open"

    def test_a_stream_of_before_that_goes_on_lets_nothing_in(self) -> None:
        endpoint = made()
        late = Slot(endpoint, NOW)
        shut(endpoint)
        assert endpoint.is_open(NOW + 10)

        late.prove(NOW + 11)
        late.succeed(NOW + 12, tokens=1)

        assert endpoint.state == "half_open"

    def test_latency_is_a_running_mean_until_the_first_token(self) -> None:
        endpoint = made()
        slot = Slot(endpoint, NOW)
        slot.prove(NOW + 1)
        slot.succeed(NOW + 50, tokens=1)
        first = endpoint.latency
        Slot(endpoint, NOW).succeed(NOW + 2, tokens=1)

        assert first == 1.0
        assert endpoint.latency is not None
        assert 1.0 < endpoint.latency < 2.0

    def test_back_from_an_outage_it_begins_slowly(self) -> None:
        endpoint = shut(made())
        for _ in range(BREAKER.half_open_successful_calls):
            assert endpoint.is_open(NOW + 10)
            Slot(endpoint, NOW + 10).succeed(NOW + 11, tokens=1)

        assert endpoint.state == "closed"
        assert endpoint.capacity < 8

    def test_what_was_found_to_work_is_open_at_once(self) -> None:
        endpoint = shut(made())

        endpoint.recover()

        assert (endpoint.state, endpoint.error) == ("closed", None)
        assert endpoint.capacity < 8

    def test_to_recover_changes_nothing_where_it_is_well(self) -> None:
        endpoint = made()

        endpoint.recover()

        assert endpoint.capacity == 8


class TestRoom:
    def test_as_many_as_its_limit(self) -> None:
        endpoint = made(limit=2)
        slots = [Slot(endpoint, NOW) for _ in range(2)]
        assert not endpoint.has_room(NOW)

        slots[0].leave()

        assert endpoint.has_room(NOW)

    def test_as_many_in_a_minute_as_its_quota(self) -> None:
        endpoint = made(requests_per_minute=2)
        for _ in range(2):
            Slot(endpoint, NOW).succeed(NOW, tokens=1)

        assert not endpoint.has_room(NOW + 59)
        assert endpoint.ready_at(NOW + 59) == NOW + 60
        assert endpoint.has_room(NOW + 60)

    def test_tokens_are_estimated_first_and_counted_then(self) -> None:
        endpoint = made(tokens_per_minute=100)
        slot = Slot(endpoint, NOW, tokens=100)
        assert not endpoint.has_room(NOW)

        slot.succeed(NOW, tokens=20, prompt_tokens=10)

        assert endpoint.has_room(NOW)
        Slot(endpoint, NOW, tokens=70).succeed(NOW, tokens=60, prompt_tokens=10)
        assert not endpoint.has_room(NOW)

    def test_a_request_needs_room_for_its_own_tokens(self) -> None:
        endpoint = made(tokens_per_minute=100)
        Slot(endpoint, NOW, tokens=60)

        assert endpoint.has_room(NOW, 40)
        assert not endpoint.has_room(NOW, 41)

    def test_a_large_request_is_ready_later_than_a_small_one(self) -> None:
        endpoint = made(tokens_per_minute=100)
        Slot(endpoint, NOW, tokens=30)
        Slot(endpoint, NOW + 20, tokens=30)

        ready = [endpoint.ready_at(NOW + 30, tokens) for tokens in (40, 70, 100)]

        assert ready == [NOW + 30, NOW + 60, NOW + 80]

    def test_what_was_never_sent_is_given_back(self) -> None:
        endpoint = made(requests_per_minute=1, tokens_per_minute=100)

        Slot(endpoint, NOW, tokens=100).fail(ConnectError("refused"), NOW)

        assert endpoint.has_room(NOW, 100)

    def test_what_was_never_sent_is_there_for_who_waits(self) -> None:
        endpoint, room = made(requests_per_minute=1), []
        slot = Slot(endpoint, NOW)
        endpoint.watchers.append(lambda given: room.append(given.has_room(NOW)))

        slot.fail(ConnectError("refused"), NOW)

        assert room == [True]

    @pytest.mark.parametrize("ending", ["fail", "busy", "wrong", "leave"])
    def test_what_was_sent_counts_as_it_was_estimated(self, ending: str) -> None:
        endpoint = made(tokens_per_minute=100)

        end(Slot(endpoint, NOW, tokens=60), ending)

        assert endpoint.quota is not None
        assert endpoint.quota.ready_at(NOW, 40) == NOW
        assert endpoint.quota.ready_at(NOW, 41) == NOW + 60

    def test_who_got_a_place_is_last_in_turn_for_the_next(self) -> None:
        endpoint, served = made(limit=1), []

        def waiter(name: str) -> Callable[[Endpoint], None]:
            def serve(given: Endpoint) -> None:
                if given.has_room(NOW):
                    served.append((name, Slot(endpoint, NOW)))

            return serve

        endpoint.watchers += [lambda given: None, waiter("x"), waiter("y")]
        endpoint.watch()
        for _ in range(5):
            served[-1][1].leave()

        assert [name for name, _ in served] == ["x", "y", "x", "y", "x", "y"]

    def test_a_draining_one_gets_nothing_new(self) -> None:
        endpoint, told = made(), []
        endpoint.watchers.append(lambda given: told.append(given.state))

        endpoint.drain()

        assert not endpoint.is_open(NOW)
        assert told == ["draining"]


class TestModels:
    def test_every_model_where_nothing_is_known(self) -> None:
        assert made().serves("x", NOW)

    def test_those_that_it_says(self) -> None:
        endpoint = made()
        endpoint.serve([ModelCard(id="x", max_model_len=100), ModelCard(id="sql", parent="x")])

        assert [endpoint.serves(model, NOW) for model in ("x", "sql", "y", None)] == [
            True,
            True,
            False,
            True,
        ]
        assert endpoint.models == {"x": 100, "sql": 100}

    def test_one_that_it_refused_is_asked_for_again_after_a_while(self) -> None:
        endpoint = made()

        endpoint.lacks("x", NOW)

        assert not endpoint.serves("x", NOW + 29)
        assert endpoint.serves("x", NOW + 30)
        assert endpoint.serves("y", NOW)

    def test_after_that_nothing_but_capacity_decides_again(self) -> None:
        endpoint = made()
        endpoint.lacks("x", NOW)
        before = endpoint.is_plain

        endpoint.serves("x", NOW + 30)

        assert not before
        assert endpoint.is_plain

    def test_one_that_it_says_it_serves_by_now_is_asked_for_at_once(self) -> None:
        endpoint = made()
        endpoint.lacks("x", NOW)

        endpoint.serve([ModelCard(id="x")])

        assert endpoint.serves("x", NOW)

    def test_names_that_callers_invent_take_no_memory_for_ever(self) -> None:
        endpoint = made()
        for number in range(2000):
            endpoint.lacks(str(number), NOW + number)

        assert len(endpoint._lacking) <= 1001


class TestLoad:
    def test_what_the_server_said(self) -> None:
        endpoint = made()
        Slot(endpoint, NOW)

        endpoint.polled(running=3.0, waiting=1.0)

        assert (endpoint.server_running, endpoint.server_waiting) == (3.0, 1.0)
        assert endpoint.polled_in_flight == 1

    def test_what_is_too_old(self) -> None:
        endpoint = made()
        endpoint.polled(running=3.0, waiting=1.0)

        endpoint.forget_load()

        assert math.isnan(endpoint.server_running)
        assert math.isnan(endpoint.server_waiting)
