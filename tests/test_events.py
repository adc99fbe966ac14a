"""Who is told of an event, how often, and what a handler cannot break."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest

from vllm_unified.errors import ConfigurationError, ServerError
from vllm_unified.events import (
    EVENTS,
    CircuitClosedEvent,
    CircuitHalfOpenEvent,
    Event,
    Events,
    RetryEvent,
)

CLOSED = CircuitClosedEvent(endpoint="a")
HALF_OPEN = CircuitHalfOpenEvent(endpoint="a")


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def told() -> list[Event]:
    return []


def test_a_handler_gets_every_event_of_its_name_and_no_other(
    events: Events, told: list[Event]
) -> None:
    events.on("circuit_closed", told.append)

    events.emit(CLOSED)
    events.emit(HALF_OPEN)
    events.emit(CLOSED)

    assert told == [CLOSED, CLOSED]


def test_handlers_are_called_in_the_order_of_their_coming(events: Events) -> None:
    called: list[str] = []
    for name in ("a", "b", "c"):
        events.on("circuit_closed", functools.partial(lambda name, _: called.append(name), name))

    events.emit(CLOSED)

    assert called == ["a", "b", "c"]


def test_once_is_once(events: Events, told: list[Event]) -> None:
    events.once("circuit_closed", told.append)

    events.emit(CLOSED)
    events.emit(CLOSED)

    assert told == [CLOSED]


def test_once_is_once_also_if_its_handler_causes_the_next_event(events: Events) -> None:
    called: list[Event] = []

    def handler(event: Event) -> None:
        called.append(event)
        events.emit(event)

    events.once("circuit_closed", handler)
    events.emit(CLOSED)

    assert called == [CLOSED]


def test_once_takes_no_other_registration_of_its_handler_away(
    events: Events, told: list[Event]
) -> None:
    events.on("circuit_closed", told.append)
    events.once("circuit_closed", told.append)

    events.emit(CLOSED)
    assert len(told) == 2
    events.emit(CLOSED)
    assert len(told) == 3


def test_two_times_once_is_twice_at_one_event(events: Events, told: list[Event]) -> None:
    events.once("circuit_closed", told.append)
    events.once("circuit_closed", told.append)

    events.emit(CLOSED)

    assert len(told) == 2
    assert "circuit_closed" not in events.wanted


@pytest.mark.parametrize("register", ["on", "once"])
def test_off_forgets_a_handler(events: Events, told: list[Event], register: str) -> None:
    others: list[Event] = []
    events.on("circuit_closed", others.append)
    getattr(events, register)("circuit_closed", told.append)

    events.off("circuit_closed", told.append)
    events.emit(CLOSED)

    assert (told, others) == ([], [CLOSED])


def test_off_without_a_handler_forgets_all_of_the_event(events: Events, told: list[Event]) -> None:
    events.on("circuit_closed", told.append)
    events.once("circuit_closed", told.append)
    events.on("circuit_half_open", told.append)

    events.off("circuit_closed")
    events.emit(CLOSED)
    events.emit(HALF_OPEN)

    assert told == [HALF_OPEN]


def test_off_of_a_stranger_changes_nothing(events: Events, told: list[Event]) -> None:
    events.on("circuit_closed", told.append)

    events.off("circuit_closed", print)
    events.off("retry", print)
    events.emit(CLOSED)

    assert told == [CLOSED]


def test_an_event_is_wanted_while_somebody_listens(events: Events) -> None:
    assert "retry" not in events.wanted
    events.on("retry", print)
    assert "retry" in events.wanted
    assert "circuit_open" not in events.wanted
    events.off("retry", print)
    assert "retry" not in events.wanted


def test_a_handler_that_raises_is_logged_and_keeps_nobody_from_the_event(
    events: Events, told: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise ValueError("broken handler")

    events.on("circuit_closed", broken)
    events.on("circuit_closed", told.append)

    with caplog.at_level(logging.ERROR, "vllm_unified"):
        events.emit(CLOSED)

    assert told == [CLOSED]
    assert "circuit_closed" in caplog.text
    assert "broken handler" in caplog.text


def test_handlers_may_come_and_go_while_they_are_called(events: Events, told: list[Event]) -> None:
    def handler(event: Event) -> None:
        events.off("circuit_closed", handler)
        events.on("circuit_closed", told.append)

    events.on("circuit_closed", handler)
    events.emit(CLOSED)
    assert told == []
    events.emit(CLOSED)
    assert told == [CLOSED]


async def a_coroutine_function(event: Event) -> None:
    """It would have to be awaited."""


class AsyncCallable:
    async def __call__(self, event: Event) -> None:
        """It would have to be awaited."""


@pytest.mark.parametrize("register", ["on", "once"])
@pytest.mark.parametrize(
    "handler",
    [None, "print", a_coroutine_function, functools.partial(a_coroutine_function), AsyncCallable()],
)
def test_a_handler_is_an_ordinary_function(events: Events, register: str, handler: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be an ordinary function"):
        getattr(events, register)("retry", handler)

    assert "retry" not in events.wanted


@pytest.mark.parametrize("method", ["on", "once", "off"])
def test_a_name_that_is_none_is_refused_with_those_there_are(events: Events, method: str) -> None:
    with pytest.raises(ConfigurationError, match="no event 'retries'") as caught:
        getattr(events, method)("retries", print)

    assert "request_start" in str(caught.value)


def test_all_events_are_known_by_their_names() -> None:
    assert set(EVENTS) == {
        "circuit_open",
        "circuit_half_open",
        "circuit_closed",
        "endpoint_unhealthy",
        "endpoint_recovered",
        "request_start",
        "request_end",
        "retry",
        "queue_full",
        "stream_continued",
        "adapter_loaded",
        "adapter_unloaded",
        "adapter_lost",
    }
    assert all(event.name == name for name, event in EVENTS.items())


def test_an_event_says_when_it_happened() -> None:
    event = RetryEvent(request_id="r", endpoint="a", error=ServerError("x"), pause=0.0, at=12.0)

    assert event.at == 12.0
    assert CLOSED.at > 1.7e9
