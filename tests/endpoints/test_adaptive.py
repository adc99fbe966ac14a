"""The limit against a model of a server, and its rules one by one."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from statistics import mean

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.endpoints.adaptive import WIDEST_START, AdaptiveLimit

CEILING = 256
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.resilience) for seed in (1, 2))]
"""One in seconds, and more where there is time."""
Work = Callable[[random.Random], int]


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """What a server does with more than its batch holds."""

    admits: float = math.inf
    """Unfinished requests, in batches, beyond which it refuses."""
    thrashes: float = math.inf
    """Unfinished requests, in batches, beyond which all of it becomes slower."""


KINDS = {
    "queueing": Kind(),
    "admission": Kind(admits=1.5),
    "thrashing": Kind(thrashes=1.0),
}


class Server:
    """Generates a token for every request in its batch at a time: slower when it is fuller."""

    def __init__(self, batch: int, kind: Kind = KINDS["queueing"], *, token: float = 0.01) -> None:
        """``token`` is in seconds, for a batch of one."""
        self.batch = batch
        self.now = 0.0
        self._kind = kind
        self._token = token
        self._generated = 0.0
        """Tokens of a request that had run all the time."""
        self._running: list[tuple[float, int, int]] = []
        self._waiting: deque[int] = deque()
        self._numbers = itertools.count()

    @property
    def unfinished(self) -> int:
        return len(self._running) + len(self._waiting)

    def submit(self, work: int) -> bool:
        """Whether it takes a request of so many tokens."""
        if self.unfinished >= self._kind.admits * self.batch:
            return False
        self._waiting.append(work)
        self._fill()
        return True

    @property
    def next_answer(self) -> float:
        """When the next request is answered, if none comes before."""
        if not self._running:
            return math.inf
        return self.now + (self._running[0][0] - self._generated) * self._seconds()

    def pass_time(self, until: float) -> None:
        """Go on for a time in which nothing is answered."""
        if self._running:
            self._generated += (until - self.now) / self._seconds()
        self.now = until

    def answer(self) -> int:
        """Go on until a request is answered; its work."""
        self.now = self.next_answer
        self._generated, _, work = heapq.heappop(self._running)
        self._fill()
        return work

    def _seconds(self) -> float:
        overfull = self.unfinished / self.batch / self._kind.thrashes
        return self._token * (1 + len(self._running) / self.batch) * max(overfull, 1)

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.batch:
            work = self._waiting.popleft()
            entry = (self._generated + work, next(self._numbers), work)
            heapq.heappush(self._running, entry)


class Fixed:
    """A limit that does not adapt."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def on_success(self, *, in_flight: int, work: float, now: float) -> None:
        pass

    def on_overload(self, *, in_flight: int) -> None:
        pass


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, and the capacity after it."""

    now: float
    work: int
    capacity: int


def uniform(random: random.Random) -> int:
    return random.randint(1, 400)


def exponential(random: random.Random) -> int:
    return 1 + min(int(random.expovariate(1 / 200)), 2000)


class Client:
    """Callers of one server, behind a limit."""

    def __init__(
        self,
        server: Server,
        limit: AdaptiveLimit | Fixed,
        *,
        work: Work = uniform,
        seed: int = 0,
    ) -> None:
        self.server = server
        self.limit = limit
        self.refusals = 0
        self._work = work
        self._random = random.Random(seed)
        self._in_flight = 0

    def closed_loop(self, answers: int, *, callers: int = 1000) -> list[Answer]:
        """Callers that each send their next request when the last one is answered."""
        log = []
        for _ in range(answers):
            self._send(callers)
            log.append(self._receive())
        return log

    def open_loop(self, answers: int, *, per_second: float) -> list[Answer]:
        """Requests come by chance, however many are there already."""
        log: list[Answer] = []
        callers, arrival = 0, self.server.now
        while len(log) < answers:
            if arrival < self.server.next_answer:
                self.server.pass_time(arrival)
                arrival += self._random.expovariate(per_second)
                callers += 1
            else:
                log.append(self._receive())
                callers -= 1
            self._send(callers)
        return log

    def drain(self) -> list[Answer]:
        """No more requests until all are answered."""
        return [self._receive() for _ in range(self._in_flight)]

    def _send(self, callers: int) -> None:
        while self._in_flight < min(self.limit.capacity, callers):
            self._in_flight += 1
            if not self.server.submit(self._work(self._random)):
                self.refusals += 1
                self.limit.on_overload(in_flight=self._in_flight)
                self._in_flight -= 1
                return

    def _receive(self) -> Answer:
        work = self.server.answer()
        self.limit.on_success(in_flight=self._in_flight, work=work, now=self.server.now)
        self._in_flight -= 1
        return Answer(now=self.server.now, work=work, capacity=self.limit.capacity)


def throughput(log: list[Answer]) -> float:
    """Tokens per second."""
    return sum(answer.work for answer in log[1:]) / (log[-1].now - log[0].now)


@cache
def best_fixed(batch: int, kind: str, work: Work = uniform) -> float:
    """Tokens per second of the best limit that does not adapt."""
    found = []
    for tenths in (8, 9, 10, 11, 12, 14):
        client = Client(Server(batch, KINDS[kind]), Fixed(max(tenths * batch // 10, 1)), work=work)
        client.closed_loop(4 * batch)
        found.append(throughput(client.closed_loop(1000 + 10 * batch)))
    return max(found)


def converged(batch: int) -> int:
    """Answers after which a limit has found its place."""
    return 3000 + 40 * batch


def measured(batch: int) -> int:
    """Answers that are many enough to see probes on both sides."""
    return 2000 + 20 * batch


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [6, 30, 150])
def test_throughput_is_within_a_tenth_of_the_best_fixed_limit(
    batch: int, kind: str, seed: int
) -> None:
    client = Client(Server(batch, KINDS[kind]), AdaptiveLimit(CEILING), seed=seed)
    client.closed_loop(converged(batch))

    log = client.closed_loop(measured(batch))

    assert throughput(log) > 0.9 * best_fixed(batch, kind)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_very_uneven_work_takes_longer_windows_and_no_throughput(kind: str, seed: int) -> None:
    limit = AdaptiveLimit(CEILING)
    client = Client(Server(30, KINDS[kind]), limit, work=exponential, seed=seed)
    client.closed_loop(2 * converged(30))

    log = client.closed_loop(2 * measured(30))

    assert throughput(log) > 0.9 * best_fixed(30, kind, exponential)


@pytest.mark.parametrize("batch", [6, 30])
def test_a_queue_that_earns_nothing_is_given_up(batch: int) -> None:
    client = Client(Server(batch), AdaptiveLimit(CEILING))
    client.closed_loop(converged(batch))

    log = client.closed_loop(measured(batch))

    assert mean(answer.capacity for answer in log) < 1.5 * batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(30, 150), (150, 30), (30, 6), (6, 30)])
def test_a_change_of_the_server_is_followed(kind: str, before: int, after: int) -> None:
    server = Server(before, KINDS[kind])
    client = Client(server, AdaptiveLimit(CEILING))
    client.closed_loop(converged(before))
    server.batch = after
    client.closed_loop(converged(after))

    log = client.closed_loop(measured(after))

    assert throughput(log) > 0.9 * best_fixed(after, kind)
    assert mean(answer.capacity for answer in log) < 2 * after


def test_a_server_that_grew_is_found_though_nothing_shows_it() -> None:
    """At the old capacity, it is as fast as it was."""
    limit = AdaptiveLimit(CEILING)
    now = 0.0
    for knee in (30, 150):
        for _ in range(10_000):
            now += 1 / min(limit.capacity, knee)
            limit.on_success(in_flight=limit.capacity, work=100, now=now)

    assert limit.capacity >= 0.9 * 150


@pytest.mark.parametrize("kind", KINDS)
def test_more_requests_than_can_be_served_do_no_harm(kind: str) -> None:
    client = Client(Server(30, KINDS[kind]), AdaptiveLimit(CEILING))
    requests_per_second = 1.2 * best_fixed(30, kind) / 200
    client.open_loop(converged(30), per_second=requests_per_second)

    log = client.open_loop(measured(30), per_second=requests_per_second)

    assert throughput(log) > 0.9 * best_fixed(30, kind)


def test_requests_that_come_by_chance_are_all_served_where_they_can_be() -> None:
    server = Server(30)
    requests_per_second = 0.8 * best_fixed(30, "queueing") / 200

    Client(server, AdaptiveLimit(CEILING)).open_loop(20_000, per_second=requests_per_second)

    assert server.now * requests_per_second < 20_000 * 1.02


def test_batches_with_pauses_between_them_are_measured_without_the_pauses() -> None:
    server = Server(30)
    client = Client(server, AdaptiveLimit(CEILING))
    log = []
    for _ in range(20):
        log += client.closed_loop(1000) + client.drain()
        server.pass_time(server.now + 3600)

    assert 27 <= mean(answer.capacity for answer in log[-3000:]) < 60


def test_from_64_to_256_takes_few_round_trips() -> None:
    """For a server that answers everything in a second, however much there is."""
    limit = AdaptiveLimit(1024)
    now = 0.0
    while limit.capacity < 256:
        now += 1
        for _ in range(limit.capacity):
            limit.on_success(in_flight=limit.capacity, work=100, now=now)

    assert now <= 6


class Caller:
    """Who spends a share of the time working, and asks a server that takes any number at once."""

    def __init__(self, limit_of: Callable[[Callable[[], float]], AdaptiveLimit]) -> None:
        self.now = self.worked = 0.0
        self.limit = limit_of(lambda: self.worked)

    def work(self, answers: int, *, share: float, waiting: bool = True) -> None:
        """Get so many answers, a millisecond each."""
        for _ in range(answers):
            self.now += 0.001
            self.worked += share * 0.001
            in_flight = self.limit.capacity - (0 if waiting else 1)
            self.limit.on_success(in_flight=in_flight, work=1, now=self.now)


def test_what_a_caller_without_time_to_spare_sees_is_not_the_server() -> None:
    caller = Caller(lambda cpu_time: AdaptiveLimit(CEILING, cpu_time=cpu_time))

    caller.work(5000, share=0.95)
    busy = caller.limit.capacity
    caller.work(200_000, share=0.95)
    still_busy = caller.limit.capacity
    caller.work(200_000, share=0.3)

    assert busy == still_busy == 256  # nobody stands in line for nothing
    assert caller.limit.capacity < 64  # the same from a server that has no more to give


def test_a_busy_caller_goes_no_higher_than_was_found_to_be_good() -> None:
    caller = Caller(lambda cpu_time: AdaptiveLimit(CEILING, cpu_time=cpu_time))
    caller.work(200_000, share=0.3)
    caller.limit.on_overload(in_flight=caller.limit.capacity)
    found = caller.limit.capacity

    caller.work(200_000, share=0.95)

    assert caller.limit.capacity <= found


@pytest.mark.parametrize("factor", [3, 1000])
def test_the_pace_of_the_server_makes_no_difference(factor: int) -> None:
    def capacities(token: float) -> Iterator[int]:
        client = Client(Server(30, token=token), AdaptiveLimit(CEILING))
        return (answer.capacity for answer in client.closed_loop(5000))

    assert all(a == b for a, b in zip(capacities(0.1), capacities(0.1 * factor), strict=True))


def test_a_window_is_no_shorter_than_what_a_hiccup_would_distort() -> None:
    limit = AdaptiveLimit(CEILING)
    for answer in range(10_000):
        limit.on_success(in_flight=64, work=1, now=answer * 1e-5)
    assert limit.capacity == 64

    for answer in range(10_000, 30_000):
        limit.on_success(in_flight=64, work=1, now=answer * 1e-5)
    assert limit.capacity != 64


@pytest.mark.parametrize("callers", [1, 20, 40, 63])
def test_callers_that_leave_room_move_nothing(callers: int) -> None:
    client = Client(Server(256), AdaptiveLimit(CEILING))

    log = client.closed_loop(20_000, callers=callers)

    assert {answer.capacity for answer in log} == {64}


def test_much_work_begins_with_much() -> None:
    limit = AdaptiveLimit(100)

    limit.widen(80)
    assert limit.capacity == 80
    limit.widen(1000)
    assert limit.capacity == 100
    limit.widen(70)
    assert limit.capacity == 100


def test_but_not_with_thousands_because_they_are_allowed() -> None:
    limit = AdaptiveLimit(4096)

    limit.widen(100_000)

    assert limit.capacity == WIDEST_START


def test_but_not_where_the_server_is_known() -> None:
    refused, restarted, measured = (AdaptiveLimit(CEILING) for _ in range(3))
    refuse(refused, 1, in_flight=64)
    restarted.restart()
    Client(Server(256), measured).closed_loop(1000, callers=64)

    for limit in (refused, restarted, measured):
        before = limit.capacity
        limit.widen(CEILING)
        assert limit.capacity == before


def test_an_idle_client_ends_its_probe() -> None:
    limit = AdaptiveLimit(CEILING)
    client = Client(Server(256), limit)
    client.closed_loop(200)
    assert limit.capacity == 128

    client.drain()

    assert limit.capacity == 64


def test_work_of_nothing_moves_nothing() -> None:
    client = Client(Server(6), AdaptiveLimit(CEILING), work=lambda random: 0)

    log = client.closed_loop(2000)

    assert {answer.capacity for answer in log} == {64}


def refuse(limit: AdaptiveLimit, times: int, *, in_flight: int) -> None:
    for _ in range(times):
        limit.on_overload(in_flight=in_flight)


def answer_rounds(limit: AdaptiveLimit, rounds: int, *, now: float) -> None:
    for _ in range(rounds * limit.capacity):
        limit.on_success(in_flight=limit.capacity, work=100, now=now)


def test_refusals_of_one_flight_are_one_decrease() -> None:
    limit = AdaptiveLimit(CEILING)

    refuse(limit, 20, in_flight=64)

    assert limit.capacity == 44


def test_refusals_of_a_later_flight_are_another_decrease() -> None:
    limit = AdaptiveLimit(CEILING)
    refuse(limit, 20, in_flight=64)
    for _ in range(20 + 44):
        limit.on_success(in_flight=64, work=100, now=1)

    refuse(limit, 20, in_flight=44)

    assert limit.capacity == 30


def test_when_most_of_a_flight_is_refused_the_rest_is_what_the_server_takes() -> None:
    limit = AdaptiveLimit(CEILING)

    for in_flight in range(64, 6, -1):
        limit.on_overload(in_flight=in_flight)

    assert limit.capacity == 6


def test_a_refused_probe_costs_nothing_of_what_was_good() -> None:
    limit = AdaptiveLimit(CEILING)
    Client(Server(256), limit).closed_loop(200)
    assert limit.capacity == 128

    refuse(limit, 20, in_flight=128)

    assert limit.capacity == 64


def test_a_decrease_counts_from_what_was_in_flight() -> None:
    limit = AdaptiveLimit(CEILING)

    limit.on_overload(in_flight=10)

    assert limit.capacity == 7


def test_the_last_slot_stays() -> None:
    limit = AdaptiveLimit(CEILING, initial=1)

    refuse(limit, 5, in_flight=1)

    assert limit.capacity == 1


def measuring() -> AdaptiveLimit:
    limit = AdaptiveLimit(CEILING)
    answer_rounds(limit, 1, now=0)
    for _ in range(10):
        limit.on_success(in_flight=64, work=100, now=0.1)
    return limit


def test_a_queue_that_stays_is_cut() -> None:
    limit = measuring()

    limit.on_server_queue(running=48, waiting=16)
    assert limit.capacity == 64
    limit.on_server_queue(running=48, waiting=16)

    assert limit.capacity == 53  # what runs, and a tenth


def test_a_queue_that_passes_is_let_be() -> None:
    limit = measuring()

    for waiting in (30, 0, 30, 4, 30):
        limit.on_server_queue(running=48, waiting=waiting)

    assert limit.capacity == 64


def test_an_engine_that_pauses_costs_half_at_most() -> None:
    limit = measuring()

    for _ in range(10):
        limit.on_server_queue(running=0, waiting=64)

    assert limit.capacity == 32


def test_the_queue_of_other_clients_does_not_move_an_idle_one() -> None:
    limit = AdaptiveLimit(CEILING)
    for _ in range(200):
        limit.on_success(in_flight=40, work=100, now=0)

    for _ in range(10):
        limit.on_server_queue(running=10, waiting=500)

    assert limit.capacity == 64


def rounds_after_restart(limit: AdaptiveLimit, rounds: int) -> list[int]:
    limit.restart()
    found = [limit.capacity]
    for _ in range(rounds):
        answer_rounds(limit, 1, now=0)
        found.append(limit.capacity)
    return found


def test_after_an_outage_it_doubles_to_half_and_goes_on_by_steps() -> None:
    found = rounds_after_restart(AdaptiveLimit(CEILING), 11)

    assert found == [4, 8, 16, 32, 36, 40, 44, 48, 52, 56, 60, 64]


def test_an_outage_in_a_slow_start_does_not_lose_what_was_good() -> None:
    limit = AdaptiveLimit(CEILING)
    rounds_after_restart(limit, 2)

    assert rounds_after_restart(limit, 11)[-1] == 64


def test_a_refusal_ends_the_slow_start() -> None:
    limit = AdaptiveLimit(CEILING)
    rounds_after_restart(limit, 2)

    limit.on_overload(in_flight=16)
    answer_rounds(limit, 1, now=0)

    assert limit.capacity == 11


def test_the_slow_start_waits_for_those_who_need_it() -> None:
    limit = AdaptiveLimit(CEILING)
    limit.restart()

    for _ in range(100):
        limit.on_success(in_flight=3, work=100, now=0)

    assert limit.capacity == 4


@pytest.mark.parametrize("capacity", [1, 2, 3, 5])
def test_a_small_limit_comes_back_too(capacity: int) -> None:
    found = rounds_after_restart(AdaptiveLimit(CEILING, initial=capacity), 6)

    assert found[-1] == capacity


def test_a_ceiling_below_the_start_is_the_start() -> None:
    assert AdaptiveLimit(10).capacity == 10
    assert AdaptiveLimit(100, initial=30).capacity == 30


@pytest.mark.parametrize(("ceiling", "initial"), [(0, 64), (-1, 64), (64, 0)])
def test_less_than_one_is_no_capacity(ceiling: int, initial: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        AdaptiveLimit(ceiling, initial=initial)


in_flights = st.integers(1, 300)
gauges = st.floats(0, 1e6)
events = st.one_of(
    st.tuples(st.just("success"), st.integers(1, 1000), in_flights, st.floats(0, 1e6)),
    st.tuples(st.just("overload"), st.integers(1, 50), in_flights),
    st.tuples(st.just("queue"), gauges, gauges),
    st.tuples(st.just("restart")),
)


@given(st.integers(1, 300), st.lists(events, max_size=15))
def test_the_capacity_is_from_one_to_the_ceiling_whatever_comes(
    ceiling: int, happened: list[tuple[object, ...]]
) -> None:
    limit = AdaptiveLimit(ceiling)
    now = 0.0
    for event in happened:
        match event:
            case ("success", int(times), int(in_flight), float(work)):
                for _ in range(times):
                    now += 0.01
                    limit.on_success(in_flight=in_flight, work=work, now=now)
            case ("overload", int(times), int(in_flight)):
                refuse(limit, times, in_flight=in_flight)
            case ("queue", float(running), float(waiting)):
                limit.on_server_queue(running=running, waiting=waiting)
            case _:
                limit.restart()
        assert 1 <= limit.capacity <= ceiling


def test_a_lower_ceiling_brings_the_capacity_down() -> None:
    limit = AdaptiveLimit(256)
    limit.bound(10)
    assert (limit.capacity, limit.ceiling) == (10, 10)


def test_what_was_at_the_ceiling_goes_up_with_it() -> None:
    limit = AdaptiveLimit(20)
    limit.bound(50)
    assert limit.capacity == 50


def test_what_was_found_below_the_ceiling_stays() -> None:
    limit = AdaptiveLimit(256)
    limit.on_overload(in_flight=41)
    found = limit.capacity
    limit.bound(128)
    limit.bound(512)
    assert limit.capacity == found


def test_a_goal_above_a_new_ceiling_is_not_grown_back_to() -> None:
    limit = AdaptiveLimit(64)
    limit.restart()
    limit.bound(8)
    for now in range(1000):
        limit.on_success(in_flight=limit.capacity, work=1, now=float(now))
        assert limit.capacity <= 8


def test_a_ceiling_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="ceiling=0"):
        AdaptiveLimit(64).bound(0)
