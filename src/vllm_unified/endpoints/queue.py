"""Who waits for a slot, and in which order. Pure.

Two decisions, one after the other. Which priority has the next turn: the one with the lowest rank,
``priority * ageing + since``, of the times at which its callers came. All ranks grow old alike, so
they never change, and nothing starves. Who takes that turn: the callers of one priority, round
robin, so that one with a thousand requests delays another by one, and not by a thousand.

A turn is ranked by the oldest time in its priority that no turn was given for yet, not by who takes
it. Otherwise one caller's fresh request, when it is next, would hold its whole priority back behind
everything older in the others.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import count, takewhile
from operator import attrgetter
from typing import Generic, TypeVar

import msgspec

from vllm_unified.settings import PRIORITIES

T = TypeVar("T")

AGEING = 2.0
"""Seconds of waiting that are worth one step of priority: ``high`` goes before what came up to 20 s
earlier as ``normal``."""

_NAMES = {number: name for name, number in PRIORITIES.items()}
_place = attrgetter("place")


class QueueState(msgspec.Struct, frozen=True, kw_only=True):
    """A queue at one moment."""

    waiting: int
    oldest: float
    """Seconds that the longest waiting has waited; 0 where nobody waits."""
    by_priority: dict[str, int]
    """How many wait with which priority, by name or number, the most urgent first."""
    callers: int
    """Different callers among them."""

    def __str__(self) -> str:
        if not self.waiting:
            return "0 waiting"
        parts = ", ".join(f"{name} {number}" for name, number in self.by_priority.items())
        return f"{self.waiting} waiting ({parts}), the oldest for {self.oldest:.1f} s"


class Ticket(Generic[T]):
    """A place in a queue; :meth:`RequestQueue.remove` takes it."""

    __slots__ = ("caller", "item", "place", "priority", "since")

    def __init__(self, item: T, priority: float, caller: str, since: float, number: int) -> None:
        self.item = item
        self.priority = priority
        self.caller = caller
        self.since = since
        self.place = (since, number)
        """Orders the tickets of one caller, those of the same moment too."""


class _PriorityClass(Generic[T]):
    """All that wait with one priority."""

    __slots__ = ("handicap", "lines", "priority", "turns")

    def __init__(self, priority: float, *, ageing: float) -> None:
        self.priority = priority
        self.handicap = priority * ageing
        self.lines: OrderedDict[str, deque[Ticket[T]]] = OrderedDict()
        """By caller, the one whose turn is next first; nobody is here with an empty line."""
        self.turns: deque[float] = deque()
        """As many times as there are tickets, ascending. None is before the ticket of the same
        place in order of time, so every ticket has a turn that is not before its own time."""

    def push(self, ticket: Ticket[T]) -> None:
        line = self.lines.get(ticket.caller)
        if line is None:
            line = self.lines[ticket.caller] = deque()
        if self.turns and ticket.since < self.turns[-1]:
            self._push_back(ticket, line)
        else:
            line.append(ticket)
            self.turns.append(ticket.since)

    def _push_back(self, ticket: Ticket[T], line: deque[Ticket[T]]) -> None:
        """One that comes back: among others that came later than it did."""
        insort(line, ticket, key=_place)
        insort(self.turns, ticket.since)
        if len(line) == 1:
            self._sort_in(ticket.caller, ticket.since)

    def _sort_in(self, caller: str, since: float) -> None:
        """Have a caller that joins stand before the first whose next ticket is of later."""
        lines = self.lines
        ahead = list(takewhile(lambda other: lines[other][0].since <= since, lines))
        lines.move_to_end(caller, last=False)
        for other in reversed(ahead):
            lines.move_to_end(other, last=False)

    def pop(self) -> Ticket[T]:
        lines = self.lines
        caller = next(iter(lines))
        line = lines[caller]
        ticket = line.popleft()
        if line:
            lines.move_to_end(caller)
        else:
            del lines[caller]
        self.turns.popleft()
        return ticket

    def last(self) -> Ticket[T]:
        """The latest ticket of the caller with the longest line."""
        return max(self.lines.values(), key=len)[-1]

    def remove(self, ticket: Ticket[T]) -> bool:
        line = self.lines.get(ticket.caller, ())
        index = bisect_left(line, ticket.place, key=_place)
        if index == len(line) or line[index] is not ticket:
            return False
        del self.lines[ticket.caller][index]
        if not line:
            del self.lines[ticket.caller]
        # Its own time, or where another took that turn, the next: there is always one.
        del self.turns[bisect_left(self.turns, ticket.since)]
        return True


class RequestQueue(Generic[T]):
    """Items that wait. The costs do not grow with their number, but for one that comes back
    (logarithmic, and linear in the callers) and one that is removed (logarithmic).

    Args:
        ageing: Seconds of waiting that are worth one step of priority.
    """

    __slots__ = ("_ageing", "_classes", "_numbers", "_waiting")

    def __init__(self, *, ageing: float = AGEING) -> None:
        self._ageing = ageing
        self._classes: dict[float, _PriorityClass[T]] = {}
        self._numbers = count()
        self._waiting = 0

    def push(self, item: T, *, priority: float = 0, caller: str = "", since: float) -> Ticket[T]:
        """Let an item wait.

        Args:
            priority: Lower goes first.
            caller: Whose it is; the callers of one priority take turns.
            since: When it began to wait, in monotonic seconds. One that comes back with its old
                time has its old place before its caller's others; and if the caller has no others,
                before the callers that came later.
        """
        ticket = Ticket(item, priority, caller, since, next(self._numbers))
        priority_class = self._classes.get(priority)
        if priority_class is None:
            priority_class = _PriorityClass(priority, ageing=self._ageing)
            self._classes[priority] = priority_class
        priority_class.push(ticket)
        self._waiting += 1
        return ticket

    def rank(self) -> float | None:
        """Rank of the next turn, in seconds; of several queues, the one with the lowest is next.
        ``None`` where nobody waits."""
        first = self._first()
        return None if first is None else first.handicap + first.turns[0]

    def peek(self) -> T:
        """The item that is next; it waits on.

        Raises:
            IndexError: nobody waits.
        """
        first = self._first()
        if first is None:
            raise IndexError("peek into an empty queue")
        return next(iter(first.lines.values()))[0].item

    def pop(self) -> T:
        """The item that is next; it waits no more.

        Raises:
            IndexError: nobody waits.
        """
        first = self._first()
        if first is None:
            raise IndexError("pop from an empty queue")
        ticket = first.pop()
        self._drop(first)
        return ticket.item

    def last_rank(self) -> float:
        """Rank of the last turn, in seconds; minus infinity where nobody waits."""
        return max((self._last_rank(each) for each in self._classes.values()), default=-math.inf)

    def rank_of(self, *, priority: float, since: float) -> float:
        """The rank, in seconds, that the turn of such an item would have."""
        return priority * self._ageing + since

    def pop_last(self) -> T:
        """The item that can be spared most; it waits no more. Linear in the callers.

        It is of the priority that has the last turn, and there of the caller with the most
        items: that is how fair queueing makes room ("Longest Queue Drop" in Suter et al., 1999).

        Raises:
            IndexError: nobody waits.
        """
        if not self._classes:
            raise IndexError("pop from an empty queue")
        last = max(self._classes.values(), key=self._last_rank)
        ticket = last.last()
        last.remove(ticket)
        self._drop(last)
        return ticket.item

    def remove(self, ticket: Ticket[T]) -> bool:
        """Take out one that waits no longer; whether it was still there."""
        priority_class = self._classes.get(ticket.priority)
        if priority_class is None or not priority_class.remove(ticket):
            return False
        self._drop(priority_class)
        return True

    def state(self, now: float) -> QueueState:
        """What waits, and for how long. Linear in the number of callers."""
        classes = [self._classes[priority] for priority in sorted(self._classes)]
        heads = [line[0] for each in classes for line in each.lines.values()]
        return QueueState(
            waiting=self._waiting,
            oldest=max(now - min(ticket.since for ticket in heads), 0.0) if heads else 0.0,
            by_priority={_priority_name(each.priority): len(each.turns) for each in classes},
            callers=len({ticket.caller for ticket in heads}),
        )

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[T]:
        """The items, caller by caller and not in the order of their turns."""
        for priority_class in self._classes.values():
            for line in priority_class.lines.values():
                for ticket in line:
                    yield ticket.item

    def __repr__(self) -> str:
        return f"<RequestQueue {self._waiting} waiting>"

    def _first(self) -> _PriorityClass[T] | None:
        if len(self._classes) == 1:
            return next(iter(self._classes.values()))
        first, lowest = None, math.inf
        for each in self._classes.values():
            rank = each.handicap + each.turns[0]
            if first is None or (rank, each.priority) < (lowest, first.priority):
                first, lowest = each, rank
        return first

    @staticmethod
    def _last_rank(priority_class: _PriorityClass[T]) -> float:
        return priority_class.handicap + priority_class.turns[-1]

    def _drop(self, priority_class: _PriorityClass[T]) -> None:
        """Count one less, and keep no class that is empty."""
        self._waiting -= 1
        if not priority_class.turns:
            del self._classes[priority_class.priority]


def _priority_name(priority: float) -> str:
    return _NAMES[int(priority)] if priority in _NAMES else f"{priority:.15g}"
