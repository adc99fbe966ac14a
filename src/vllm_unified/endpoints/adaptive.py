"""How many requests one server takes at a time, found while it works. Pure.

A hill is climbed: throughput (work per second) is measured at one capacity, then at another a step
away, and the better of the two is kept. What was taken from where:

- TCP (RFC 5681): doubling at the start and after an outage, a multiplicative decrease when
  refused, and one decrease for all refusals of one flight.
- The .NET thread pool's hill climbing: throughput decides, not latency, and more concurrency must
  earn its keep, so that a plateau is left downwards. Its sine wave is not needed: steps are
  compared with a running mean, over windows long enough for their size.
- Not Vegas or Gradient2 (Netflix concurrency-limits): they stop where latency grows, and a vLLM
  batch makes every token slower long before it is full. With latency doubled by a full batch,
  they would end at two thirds of its throughput.
"""

from __future__ import annotations

import math
from collections.abc import Callable

EARNED = 0.15
"""Elasticity of throughput that a higher capacity must show: twice the capacity is kept for 11 %
more throughput. The .NET thread pool's bias is the same 15 %."""
DECREASE = 0.7
"""What a refusal leaves of the capacity; CUBIC's factor (RFC 9438)."""
LARGEST_STEP = 2.0
SMALLEST_STEP = 1.1
STEP_AFTER_REFUSAL = 1.2
"""Small: the probes of servers that were all refused fall together, and cost most of what is then
missing. 1.2 gave 97.7 % of the capacity of four servers at three times their load, the square root
of 2 gave 95 %."""
CHANGED = 1.25
"""Throughput that differs this much at the same capacity means that the server has changed."""
SHORTEST_REST, LONGEST_REST = 8, 16
"""Windows without a probe once no step is an improvement; doubled while that stays so."""
WATCHING_STEP = math.sqrt(2)
"""Those windows are as long as for this step."""
UNIFORM = 4 / 3
"""Mean square of uniformly distributed work, in squares of its mean."""
LARGEST_SPREAD = 10.0
SHORTEST_WINDOW = 0.2
"""Seconds; hiccups of an event loop are small against it."""
RESTART_CAPACITY = 4
WIDEST_START = 256
"""vLLM's default ``max_num_seqs`` on most hardware: with more, requests only wait there until the
server was found to take them. A ceiling in the thousands is no reason to begin with as many."""
BUSY_SHARE = 0.6
"""Of a window that the caller's thread spent working; with more, the window shows how fast the
caller is, and not the server."""
QUEUE_SHARE = 0.1
"""Waiting requests, as a share of the running ones, that are more than passing through."""


class AdaptiveLimit:
    """The number of requests that may be in flight at one server.

    Tell it how each request ended, and read :attr:`capacity`. After a change, a round of answers
    only settles; the window that follows measures. Both are counted in answers, so that they suit
    answers of a millisecond and of a minute. Nothing moves up or is compared while callers leave
    room below the capacity. A lost connection says nothing here.
    """

    __slots__ = (
        "_answers",
        "_climb",
        "_cpu_since",
        "_cpu_time",
        "_due",
        "_fresh",
        "_goal",
        "_left",
        "_measuring",
        "_queued",
        "_refused",
        "_since",
        "_slack",
        "_spread",
        "_squares",
        "_surplus",
        "_work",
        "capacity",
    )
    capacity: int
    """How many requests may be in flight now; from 1 to the ceiling."""
    _fresh: bool
    """Whether nothing is known of the server: nothing was measured, refused or lost."""
    _goal: int
    """What is grown back to after an outage; 0 at other times."""
    _refused: bool
    """Whether the present flight had a refusal already."""
    _queued: bool
    """Whether the last look at the server found a queue."""
    _spread: float
    """How much less even work is than if it were uniformly distributed; at least 1."""
    _measuring: bool
    """Whether the present window measures, or settles."""
    _surplus: int
    """Requests that were in flight beyond the capacity when the window began."""
    _answers: int
    """Answers that the window takes; ``_left`` of them are to come."""
    _left: int
    _slack: int
    """Answers that came while fewer were in flight than may be."""
    _work: float
    _squares: float
    """Sum of the squares of work."""
    _since: float
    """When the window began; it does not end before ``_due``. In monotonic seconds."""
    _due: float

    def __init__(
        self, ceiling: int, *, initial: int = 64, cpu_time: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Starts at ``initial``, or at ``ceiling`` if that is less.

        Args:
            cpu_time: Seconds that the caller's thread has worked so far.

        Raises:
            ValueError: one of them is less than 1.
        """
        if ceiling < 1 or initial < 1:
            raise ValueError(f"a capacity is at least 1: ceiling={ceiling}, initial={initial}")
        self._climb = _Climb(min(initial, ceiling), ceiling)
        self._cpu_time = cpu_time
        self.capacity = self._climb.base
        self._fresh = True
        self._goal = 0
        self._refused = False
        self._spread = 1.0
        self._settle(0)

    def on_success(self, *, in_flight: int, work: float, now: float) -> None:
        """A request was answered.

        Args:
            in_flight: Requests in flight, this one included.
            work: Tokens that were generated; 1 where that is not known.
            now: Monotonic seconds.
        """
        self._work += work
        self._squares += work * work
        self._left -= 1
        if in_flight < self.capacity:
            self._slack += 1
            if 2 * in_flight < self.capacity:
                self._start_over()
        if self._left <= 0 and now >= self._due:
            self._end_window(in_flight, now)

    def on_overload(self, *, in_flight: int) -> None:
        """A request was refused: a 503 of admission control, or a 429.

        The first refusal of a flight decreases the capacity, or ends a probe. The others only
        lower it to what is in flight without them: that much the server has taken.

        Args:
            in_flight: Requests in flight, this one included.
        """
        taken = in_flight - 1
        self._fresh = False
        if self._climb.probing:
            self._climb.give_up_probe()
            self._move(self._climb.base, in_flight)
        elif not self._refused:
            present = min(in_flight, self.capacity)
            self._decrease(min(taken, int(DECREASE * present)), in_flight)
        elif taken < self.capacity:
            self._decrease(taken, in_flight)
        self._refused = True

    def on_server_queue(self, *, running: float, waiting: float) -> None:
        """Fresh gauges of the server's metrics, where somebody asks for them.

        A queue that two looks find while the capacity is used up is cut, by half at most. With
        several clients, each gives up the same share.
        """
        if not self._measuring or self._has_room:
            return
        queued, self._queued = self._queued, waiting > max(1.0, QUEUE_SHARE * running)
        if not (queued and self._queued):
            return
        share = max((1 + QUEUE_SHARE) * running / (running + waiting), 0.5)
        self._decrease(math.ceil(share * self.capacity), self.capacity)

    def widen(self, capacity: int) -> None:
        """There is work for this many requests, and nobody waits for a single one of them: begin
        there, or with ``WIDEST_START``, as long as nothing is known of the server. Where less is as
        good, it comes down."""
        capacity = min(capacity, self._climb.ceiling, WIDEST_START)
        if self._fresh and capacity > self.capacity:
            self._climb.restart(capacity)
            self._move(self._climb.base, 0)

    @property
    def ceiling(self) -> int:
        """The highest capacity that may be."""
        return self._climb.ceiling

    def bound(self, ceiling: int) -> None:
        """Another ceiling. A capacity above it comes down to it; one that was at the ceiling before
        may be too low only because of that, and goes up with it, to what was found to be good, or
        to be measured there.

        Raises:
            ValueError: it is less than 1.
        """
        if ceiling < 1:
            raise ValueError(f"a capacity is at least 1: ceiling={ceiling}")
        before, self._climb.ceiling = self._climb.ceiling, ceiling
        if self._climb.base > ceiling or (self._climb.base == before < ceiling):
            self._climb.restart(ceiling)
            self._goal = 0
            self._move(ceiling, 0)
        elif self.capacity > ceiling:  # a probe
            self._climb.give_up_probe()
            self._move(self._climb.base, 0)
        self._goal = min(self._goal, ceiling)

    def restart(self) -> None:
        """The server is back after an outage: slow start.

        Doubles with every round that uses the capacity up, to half of the last good capacity;
        grows by steps to all of it, and climbs on from there.
        """
        self._fresh = False
        self._goal = self._goal or self._climb.base
        self._refused = False
        self._climb.restart(self._goal)
        self._move(min(RESTART_CAPACITY, max(self._goal // 2, 1)), 0)

    @property
    def _has_room(self) -> bool:
        """Whether half of this window's answers came while fewer were in flight than may be."""
        return 2 * self._slack >= self._answers - self._left

    def _is_caller_busy(self, now: float) -> bool:
        """Whether the server could have done more in this window than it was asked for."""
        return self._cpu_time() - self._cpu_since > BUSY_SHARE * (now - self._since)

    def _end_window(self, in_flight: int, now: float) -> None:
        if self._is_short():
            return
        if self._goal:
            self._grow_back(in_flight)
        elif not self._measuring:
            self._measure(now)
        elif self._has_room:
            self._learn_nothing(in_flight)
        elif self._is_caller_busy(now):
            self._learn_nothing(in_flight)
            # To stand in line takes time of the caller's, who has none left.
            self.widen(WIDEST_START)
        else:
            self._fresh = False
            self._go_on(self._climb.next(self._work / (now - self._since)), in_flight, now)

    def _learn_nothing(self, in_flight: int) -> None:
        self._climb.give_up_probe()
        self._climb.forget()
        self._move(self._climb.base, in_flight)

    def _is_short(self) -> bool:
        """Whether to count on, because work is less even than was known when this began."""
        answers = self._answers - self._left
        mean = self._work / answers
        if mean > 0:
            uneven = self._squares / answers / mean / mean / UNIFORM
            self._spread = min(max(uneven, (uneven + self._spread) / 2, 1.0), LARGEST_SPREAD)
        self._answers = max(self._wanted(), answers)
        self._left = self._answers - answers
        return self._left > 0

    def _wanted(self) -> int:
        """Answers in a window: whole rounds, since requests of one length are answered in waves."""
        if self._measuring:
            return self.capacity * self._climb.rounds(self.capacity, self._spread)
        rounds = 1 if self._goal else round(2 * self._spread - 1)
        return self.capacity * rounds + self._surplus

    def _go_on(self, capacity: int, in_flight: int, now: float) -> None:
        if capacity == self.capacity:
            self._measure(now)
        else:
            self._move(capacity, in_flight)

    def _grow_back(self, in_flight: int) -> None:
        goal, grown = self._goal, self.capacity
        if not self._has_room:
            half = goal // 2
            grown = min(2 * grown, half) if grown < half else grown + max(goal // 16, 1)
        if grown >= goal:
            self._goal = 0
            self._climb.restart(goal)
        self._move(min(grown, goal), in_flight)

    def _decrease(self, capacity: int, in_flight: int) -> None:
        self._fresh = False
        self._goal = 0
        self._climb.restart(max(capacity, 1), step=STEP_AFTER_REFUSAL)
        self._move(self._climb.base, in_flight)

    def _move(self, capacity: int, in_flight: int) -> None:
        self.capacity = capacity
        self._settle(max(in_flight - capacity, 0))

    def _start_over(self) -> None:
        """Hardly anything is in flight; what comes after a pause must not be measured with it."""
        if self._climb.probing:
            self._climb.give_up_probe()
            self.capacity = self._climb.base
        self._settle(0)

    def _settle(self, surplus: int) -> None:
        """Let the surplus drain, and then a round pass."""
        self._measuring = False
        self._queued = False
        self._begin(surplus, due=-math.inf)

    def _measure(self, now: float) -> None:
        self._measuring = True
        self._refused = False
        self._since = now
        self._cpu_since = self._cpu_time()
        self._begin(0, due=now + SHORTEST_WINDOW)

    def _begin(self, surplus: int, *, due: float) -> None:
        self._surplus = surplus
        self._answers = self._left = self._wanted()
        self._due = due
        self._work = self._squares = 0.0
        self._slack = 0

    def __repr__(self) -> str:
        return f"<AdaptiveLimit {self.capacity}/{self._climb.ceiling}>"


class _Climb:
    """Where to measure next. A pattern search in one dimension, on a logarithmic scale."""

    __slots__ = (
        "_accepted",
        "_direction",
        "_next_rest",
        "_rate",
        "_rejected",
        "_rest",
        "_step",
        "_target",
        "base",
        "ceiling",
    )
    base: int
    """The best capacity that is known."""
    _target: int
    """What is being measured: the base, or a probe."""
    _rate: float | None
    """Throughput at the base: a running mean."""
    _step: float
    """Ratio of two capacities that are compared."""
    _direction: int
    _accepted: bool
    """Whether the last probe was an improvement."""
    _rejected: bool
    """Whether one side of the base is known to be no improvement at this step."""
    _rest: int
    """Windows to come without a probe."""
    _next_rest: int

    def __init__(self, base: int, ceiling: int) -> None:
        self.ceiling = ceiling
        self.restart(base)

    def restart(self, base: int, *, step: float = LARGEST_STEP) -> None:
        """Begin at another capacity, upwards."""
        self.base = self._target = base
        self._rate = None
        self._look(+1, step)

    @property
    def probing(self) -> bool:
        """Whether what is being measured is not the base."""
        return self._target != self.base

    def rounds(self, capacity: int, spread: float) -> int:
        """How many rounds a window takes.

        The work of its answers differs from what the server did in that time by the unfinished
        work at both ends, which is of the order of the square root of what is in flight. So many
        rounds keep that below what a step changes, whatever the capacity. A rest only watches for
        changes of the server, up to its last window, which the next probe is compared with.
        """
        wanted = WATCHING_STEP if self._rest > 1 else self._step
        step = max(wanted, 1 + 1 / capacity)
        return math.ceil(8 * spread / (math.sqrt(capacity) * math.log2(step)))

    def next(self, rate: float) -> int:
        """The capacity to measure next; ``rate`` is what was found at the present one."""
        if not self.probing:
            self._keep(rate)
        elif self._is_earned(rate):
            self._accept(rate)
        else:
            self.give_up_probe()
        self._target = self._choose()
        return self._target

    def give_up_probe(self) -> None:
        """Back to the base. The other direction is next, or smaller steps."""
        if not self.probing:
            return
        self._target = self.base
        self._reject()
        self._rest = max(self._rest, 1)

    def forget(self) -> None:
        """What is known of the base's throughput does not hold any more."""
        self._rate = None

    def _is_earned(self, rate: float) -> bool:
        if self._rate is None:
            return False
        wanted: float = self._rate * (self._target / self.base) ** EARNED
        return rate >= wanted

    def _keep(self, rate: float) -> None:
        known = self._rate
        if known is None or known / CHANGED < rate < known * CHANGED:
            self._rate = rate if known is None else (known + rate) / 2
            self._rest = max(self._rest - 1, 0)
        else:
            # This window may have seen both servers; the next one will not.
            self._rate = None
            self._look(+1 if rate > known else -1, LARGEST_STEP)

    def _accept(self, rate: float) -> None:
        if self._accepted:
            self._step = min(self._step**2, LARGEST_STEP)
        self.base, self._rate = self._target, rate
        self._accepted = True
        self._next_rest = SHORTEST_REST
        self._rejected = True  # on the other side is where it came from

    def _reject(self) -> None:
        self._direction = -self._direction
        self._accepted = False
        if self._rejected:
            self._refine()
        self._rejected = not self._rejected

    def _refine(self) -> None:
        if self._step > SMALLEST_STEP:
            self._step = max(math.sqrt(self._step), SMALLEST_STEP)
        else:
            self._direction = +1
            self._rest = self._next_rest
            self._next_rest = min(2 * self._next_rest, LONGEST_REST)

    def _look(self, direction: int, step: float) -> None:
        """Begin a search."""
        self._direction = direction
        self._step = step
        self._rest = 0
        self._next_rest = SHORTEST_REST
        self._accepted = False
        self._rejected = False

    def _choose(self) -> int:
        while self._rate is not None and not self._rest:
            target = self._neighbour()
            if target != self.base:
                return target
            self._reject()
        return self.base

    def _neighbour(self) -> int:
        if self._direction > 0:
            return min(max(round(self.base * self._step), self.base + 1), self.ceiling)
        return max(min(round(self.base / self._step), self.base - 1), 1)
