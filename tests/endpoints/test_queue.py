"""Who is next, who is not starved, and what is left behind."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from itertools import cycle, islice
from math import inf
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.endpoints.queue import (
    AGEING,
    RequestQueue,
    Ticket,
)
from vllm_unified.errors import ConfigurationError
from vllm_unified.settings import PRIORITIES, priority_number

MIXED = (-2, 0, 1, 10)
"""Priorities of which some are worth less waiting than there is in these tests, and one more."""


class Waiting(NamedTuple):
    """What the tests know of an item."""

    number: int
    priority: int
    caller: str
    since: float

    @property
    def rank(self) -> float:
        return self.priority * AGEING + self.since


class NaiveClass:
    """One priority, on plain lists: who waits, whose turn is when, and the times of the turns."""

    def __init__(self) -> None:
        self.items: list[Waiting] = []
        self.callers: list[str] = []
        self.times: list[float] = []

    def next_of(self, caller: str) -> Waiting:
        own = [item for item in self.items if item.caller == caller]
        return min(own, key=lambda item: (item.since, item.number))

    def push(self, item: Waiting) -> None:
        if item.caller not in self.callers:
            later = [other for other in self.callers if self.next_of(other).since > item.since]
            at = self.callers.index(later[0]) if later else len(self.callers)
            self.callers.insert(at, item.caller)
        self.items.append(item)
        self.times = sorted([*self.times, item.since])

    def pop(self) -> Waiting:
        caller = self.callers.pop(0)
        item = self.next_of(caller)
        self.callers.append(caller)
        self._take_out(item, self.times[0])
        return item

    def remove(self, item: Waiting) -> None:
        self._take_out(item, min(time for time in self.times if time >= item.since))

    def _take_out(self, item: Waiting, time: float) -> None:
        self.items.remove(item)
        self.times.remove(time)
        self.callers = [name for name in self.callers if name in {i.caller for i in self.items}]


class NaiveQueue:
    """The model that the queue is held against."""

    def __init__(self) -> None:
        self.classes = {priority: NaiveClass() for priority in MIXED}

    def __len__(self) -> int:
        return sum(len(each.items) for each in self.classes.values())

    def turns(self) -> list[tuple[float, int]]:
        """(rank, priority) of the turns that are next, in order."""
        return sorted(
            (number * AGEING + each.times[0], number)
            for number, each in self.classes.items()
            if each.times
        )

    def pop(self) -> Waiting:
        return self.classes[self.turns()[0][1]].pop()


# Whole seconds, so that sums are exact, and moments and ranks coincide.
times = st.integers(0, 12).map(float)
priorities = st.sampled_from(MIXED)
callers = st.sampled_from(["", "a", "b", "c"])
arrivals = st.lists(st.tuples(priorities, callers, times), min_size=1, max_size=60)
pushes = st.tuples(st.just("push"), priorities, callers, times)
actions = st.one_of(
    pushes,
    pushes,
    st.tuples(st.just("pop")),
    st.tuples(st.just("remove"), st.integers(0, 100)),
)


def push(queue: RequestQueue[Waiting], item: Waiting) -> Ticket[Waiting]:
    return queue.push(item, priority=item.priority, caller=item.caller, since=item.since)


def filled(*items: Waiting) -> RequestQueue[Waiting]:
    queue: RequestQueue[Waiting] = RequestQueue()
    for item in items:
        push(queue, item)
    return queue


def drained(queue: RequestQueue[Waiting]) -> list[Waiting]:
    return [queue.pop() for _ in range(len(queue))]


@given(st.lists(actions, max_size=80))
def test_any_sequence_does_what_plain_lists_do(actions: list[tuple[object, ...]]) -> None:
    queue: RequestQueue[Waiting] = RequestQueue()
    model = NaiveQueue()
    tickets: list[Ticket[Waiting]] = []
    there: set[Waiting] = set()

    for number, action in enumerate(actions):
        match action:
            case ("push", int(priority), str(caller), float(since)):
                item = Waiting(number, priority, caller, since)
                tickets.append(push(queue, item))
                model.classes[priority].push(item)
                there.add(item)
            case ("pop",) if there:
                item = queue.pop()
                assert item == model.pop()
                there.remove(item)
            case ("remove", int(index)) if tickets:
                ticket = tickets[index % len(tickets)]
                assert queue.remove(ticket) is (ticket.item in there)
                if ticket.item in there:
                    model.classes[ticket.item.priority].remove(ticket.item)
                    there.remove(ticket.item)
        assert len(queue) == len(model)
        assert set(queue) == there
        assert queue.rank() == (model.turns()[0][0] if there else None)

    assert drained(queue) == [model.pop() for _ in range(len(model))]


@given(arrivals)
def test_the_turns_of_priorities_come_by_rank_whoever_takes_them(
    arrivals: list[tuple[int, str, float]],
) -> None:
    items = [Waiting(number, *arrival) for number, arrival in enumerate(arrivals)]
    by_rank = sorted(items, key=lambda item: (item.rank, item.priority))

    popped = drained(filled(*items))

    assert [item.priority for item in popped] == [item.priority for item in by_rank]


@given(arrivals)
def test_one_caller_is_served_by_rank(arrivals: list[tuple[int, str, float]]) -> None:
    """So nothing starves: what comes late enough comes after, however urgent it is."""
    items = [
        Waiting(number, priority, "", since) for number, (priority, _, since) in enumerate(arrivals)
    ]

    popped = drained(filled(*items))

    assert popped == sorted(items, key=lambda item: (item.rank, item.priority, item.number))


@given(
    st.sampled_from(list(PRIORITIES.values())),
    st.sampled_from(list(PRIORITIES.values())),
    st.integers(1, 5),
)
def test_a_flood_of_others_delays_an_item_by_no_more_than_its_priority_is_worth(
    priority: int, of_the_others: int, rivals: int
) -> None:
    """One comes every second, and one is served: for ever, if waiting were worth nothing."""
    queue = filled(Waiting(0, priority, "me", 100.0))
    worth = max(priority - of_the_others, 0) * AGEING

    def second(waited: int) -> Waiting:
        rival = f"rival {waited % rivals}"
        push(queue, Waiting(waited, of_the_others, rival, 100.0 + waited))
        return queue.pop()

    served = [second(waited).caller for waited in range(1, int(worth) + 2)]

    assert "me" in served


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 20))
def test_callers_get_equal_shares_however_much_each_has_waiting(
    callers: int, rounds: int, before: int
) -> None:
    enough = before + (rounds + 1) * callers
    items = [
        Waiting(number, 0, f"caller {caller}", 0.0)
        for caller in range(callers)
        for number in range(enough * (caller + 1))
    ]
    queue = filled(*items)
    for _ in range(before):
        queue.pop()

    shares = Counter(queue.pop().caller for _ in range(rounds * callers))

    assert shares == {f"caller {caller}": rounds for caller in range(callers)}


def test_a_callers_own_items_keep_their_order_between_those_of_others() -> None:
    queue: RequestQueue[str] = RequestQueue()
    for number in range(3):
        queue.push(f"a{number}", caller="a", since=0)
    queue.push("b0", caller="b", since=1)

    assert [queue.pop() for _ in range(4)] == ["a0", "b0", "a1", "a2"]


def test_a_fresh_item_whose_turn_it_is_does_not_hold_back_its_whole_priority() -> None:
    queue: RequestQueue[str] = RequestQueue()
    for name in ("old 1", "old 2", "old 3"):
        queue.push(name, caller="batch", since=0)
    queue.push("low", priority=10, since=0)
    queue.push("fresh", caller="chat", since=100)

    assert [queue.pop() for _ in range(5)] == ["old 1", "fresh", "old 2", "low", "old 3"]


def test_one_that_comes_back_is_before_its_callers_others() -> None:
    queue: RequestQueue[int] = RequestQueue()
    for since in range(4):
        queue.push(since, since=since)
    first, second = queue.pop(), queue.pop()

    queue.push(second, since=second)
    queue.push(first, since=first)

    assert [queue.pop() for _ in range(4)] == [0, 1, 2, 3]


def test_a_caller_that_comes_back_is_before_the_callers_that_came_later() -> None:
    queue: RequestQueue[int] = RequestQueue()
    for since in range(4):
        queue.push(since, caller=f"caller {since}", since=since)
    first, second = queue.pop(), queue.pop()

    queue.push(first, caller="caller 0", since=first)
    queue.push(second, caller="caller 1", since=second)

    assert [queue.pop() for _ in range(4)] == [0, 1, 2, 3]


def test_a_caller_that_comes_back_is_after_one_that_has_waited_as_long() -> None:
    queue: RequestQueue[str] = RequestQueue()
    queue.push("as long", caller="a", since=0)
    queue.push("later", caller="b", since=1)

    queue.push("back", caller="c", since=0)

    assert [queue.pop() for _ in range(3)] == ["as long", "back", "later"]


def test_coming_back_gives_no_caller_more_than_its_share() -> None:
    queue: RequestQueue[str] = RequestQueue()
    for caller in islice(cycle("ab"), 10):
        queue.push(caller, caller=caller, since=0)
    served = []

    for _ in range(6):
        served.append(queue.pop())
        if served[-1] == "a":
            queue.push("a", caller="a", since=-1)

    assert served == ["a", "b", "a", "b", "a", "b"]


def test_ageing_says_what_waiting_is_worth() -> None:
    queue: RequestQueue[str] = RequestQueue(ageing=0.5)
    queue.push("low", priority=10, since=0)
    queue.push("just sooner", priority=0, since=4.9)
    queue.push("just later", priority=0, since=5.1)

    assert [queue.pop() for _ in range(3)] == ["just sooner", "low", "just later"]


def test_the_rank_is_what_queues_are_compared_by() -> None:
    queue: RequestQueue[str] = RequestQueue(ageing=2.0)
    queue.push("x", priority=3, since=100)

    assert queue.rank() == 106


def test_what_can_be_spared_is_of_the_priority_with_the_last_turn() -> None:
    old_low, normal = Waiting(0, 10, "", 0.0), Waiting(1, 0, "", 19.0)
    queue = filled(old_low, normal)

    assert queue.pop_last() is old_low
    assert queue.pop_last() is normal


def test_who_has_the_most_items_can_spare_its_latest() -> None:
    greedy = [Waiting(number, 0, "greedy", float(number)) for number in range(3)]
    queue = filled(*greedy, Waiting(3, 0, "modest", 9.0))

    assert [queue.pop_last(), queue.pop_last()] == [greedy[2], greedy[1]]


@given(arrivals)
def test_the_last_rank_is_that_of_the_last_turn(arrivals: list[tuple[int, str, float]]) -> None:
    items = [Waiting(number, *arrival) for number, arrival in enumerate(arrivals)]
    queue = filled(*items)

    assert queue.last_rank() == max(
        queue.rank_of(priority=item.priority, since=item.since) for item in items
    )


@given(arrivals)
def test_a_queue_is_empty_once_all_were_spared(arrivals: list[tuple[int, str, float]]) -> None:
    items = [Waiting(number, *arrival) for number, arrival in enumerate(arrivals)]
    queue = filled(*items)

    spared = [queue.pop_last() for _ in items]

    assert (sorted(spared), len(queue), queue.last_rank()) == (items, 0, -inf)


@given(arrivals)
def test_who_is_next_is_seen_before_its_turn_and_waits_on(
    arrivals: list[tuple[int, str, float]],
) -> None:
    items = [Waiting(number, *arrival) for number, arrival in enumerate(arrivals)]
    queue = filled(*items)
    for left in range(len(items), 0, -1):
        seen = queue.peek()

        assert (len(queue), queue.peek()) == (left, seen)
        assert queue.pop() is seen


def test_an_empty_queue_has_no_next() -> None:
    queue: RequestQueue[str] = RequestQueue()

    assert queue.rank() is None
    with pytest.raises(IndexError):
        queue.peek()
    with pytest.raises(IndexError):
        queue.pop()


def test_a_ticket_is_removed_once_and_from_its_own_queue() -> None:
    queue: RequestQueue[str] = RequestQueue()
    other: RequestQueue[str] = RequestQueue()
    ticket = queue.push("x", since=0)
    other.push("y", since=0)

    assert not other.remove(ticket)
    assert queue.remove(ticket)
    assert not queue.remove(ticket)


def test_a_caller_that_left_has_no_turn() -> None:
    queue: RequestQueue[str] = RequestQueue()
    ticket = queue.push("a0", caller="a", since=0)
    queue.push("b0", caller="b", since=1)
    queue.push("b1", caller="b", since=2)

    queue.remove(ticket)

    assert [queue.pop(), queue.pop()] == ["b0", "b1"]


@pytest.mark.parametrize("way", ["pop", "remove"])
def test_nothing_is_kept_of_what_waits_no_more(way: str) -> None:
    class Item:
        pass

    queue: RequestQueue[Item] = RequestQueue()
    empty = len(gc.get_referents(queue))
    items = [Item() for _ in range(100)]
    tickets = [
        queue.push(item, priority=number % 7, caller=str(number), since=-number)
        for number, item in enumerate(items)
    ]
    left = [weakref.ref(item) for item in items]
    del items

    while tickets:
        ticket = tickets.pop()
        if way == "pop":
            queue.pop()
        else:
            queue.remove(ticket)
        del ticket

    assert [ref for ref in left if ref() is not None] == []
    assert len(gc.get_referents(queue)) == empty
    assert not any(referent for referent in gc.get_referents(queue) if isinstance(referent, dict))


def test_the_state_says_who_waits_and_how_long() -> None:
    queue: RequestQueue[int] = RequestQueue()
    for number in range(10):
        queue.push(number, caller=f"caller {number % 2}", since=98)
    queue.push(10, priority=-10, since=96.8)
    queue.push(11, priority=-10, since=97)
    queue.push(12, priority=2.5, since=99)

    state = queue.state(100.0)

    assert state.waiting == 13
    assert state.oldest == pytest.approx(3.2)
    assert list(state.by_priority.items()) == [("high", 2), ("normal", 10), ("2.5", 1)]
    assert state.callers == 3
    assert str(state) == "13 waiting (high 2, normal 10, 2.5 1), the oldest for 3.2 s"


def test_the_state_of_an_empty_queue() -> None:
    state = RequestQueue[int]().state(100.0)

    assert (state.waiting, state.oldest, state.by_priority, state.callers) == (0, 0, {}, 0)
    assert str(state) == "0 waiting"


@pytest.mark.parametrize(
    ("value", "number"), [("high", -10), ("normal", 0), ("low", 10), (7, 7), (-(2**63), -(2**63))]
)
def test_a_priority_is_a_name_or_a_number(value: object, number: int) -> None:
    assert priority_number("priority", value) == number


@pytest.mark.parametrize(
    "value", ["urgent", "High", "", "3", 1.0, True, None, 2**63, -(2**63) - 1, [0]]
)
def test_anything_else_is_no_priority(value: object) -> None:
    with pytest.raises(ConfigurationError) as raised:
        priority_number("priority", value)

    assert repr(value) in str(raised.value)
    assert "'high', 'normal', 'low' or a whole number" in str(raised.value)
