"""Which server gets a request."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Container, Sequence
from math import ceil, nan
from random import Random
from typing import Any, Generic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unified.errors import ConfigurationError
from vllm_unified.fleet.affinity import PrefixAware, Session
from vllm_unified.fleet.candidates import C, Candidate, Room, Route, Strategy
from vllm_unified.fleet.load import LeastLoaded, LowestLatency, PowerOfTwo, loads
from vllm_unified.fleet.policies import STRATEGIES, strategy
from vllm_unified.fleet.turns import RoundRobin, Weighted

ROUTE = Route()


class Server:
    """A candidate whose numbers a test sets."""

    def __init__(
        self,
        id: str,
        *,
        weight: float = 1.0,
        in_flight: int = 0,
        latency: float | None = None,
        running: float = nan,
        waiting: float = nan,
        polled: int = 0,
    ) -> None:
        self.id = id
        self.weight = weight
        self.in_flight = in_flight
        self.capacity = 64
        self.latency = latency
        self.server_running = running
        self.server_waiting = waiting
        self.polled_in_flight = polled

    def __repr__(self) -> str:
        return self.id


def fleet(count: int) -> list[Server]:
    return [Server(f"s{number}") for number in range(count)]


class RoomBut(Generic[C]):
    """Room at all candidates but a few."""

    def __init__(self, full: Container[str] = ()) -> None:
        self._full = full

    def at(self, candidate: C) -> bool:
        return candidate.id not in self._full

    def among(self, candidates: Sequence[C]) -> list[C]:
        return [*filter(self.at, candidates)]


def choose(
    policy: Strategy,
    candidates: Sequence[Candidate],
    route: Route = ROUTE,
    *,
    full: Container[str] = (),
    now: float = 0.0,
    random: Random | None = None,
) -> str:
    draw = (random or Random(1)).random
    chosen = policy.choose(candidates, RoomBut[Candidate](full), route, now, draw)
    assert chosen is not None
    return chosen.id


servers = st.builds(
    Server,
    st.sampled_from([f"s{number}" for number in range(12)]),
    weight=st.floats(0.1, 100),
    in_flight=st.integers(0, 50),
    latency=st.none() | st.floats(0, 100),
    running=st.just(nan) | st.integers(0, 200),
    waiting=st.just(nan) | st.integers(0, 50),
    polled=st.integers(0, 50),
)
fleets = st.lists(servers, min_size=1, max_size=8, unique_by=lambda server: server.id)
routes = st.builds(
    Route,
    model=st.none() | st.just("m"),
    session=st.none() | st.text(max_size=5),
    body=st.binary(max_size=20) | st.sampled_from([b'{"prompt":"' + b"a" * 2000 + b'"}']),
)


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=15)
@given(st.lists(st.tuples(fleets, routes, st.floats(0, 100)), max_size=10), st.randoms())
def test_the_chosen_is_one_of_the_candidates(
    name: str, calls: list[tuple[list[Server], Route, float]], random: Random
) -> None:
    policy, now = strategy(name), 0.0
    for candidates, route, pause in calls:
        now += pause
        chosen = policy.choose(candidates, RoomBut[Server](), route, now, random.random)
        assert chosen is not None
        assert any(chosen is candidate for candidate in candidates)
        policy.forget(chosen.id)


@pytest.mark.parametrize("name", STRATEGIES)
def test_clients_that_start_at_once_do_not_all_begin_with_the_same_server(name: str) -> None:
    random = Random(1)

    assert len({choose(strategy(name), fleet(4), random=random) for _ in range(100)}) == 4


# Round robin


@given(st.integers(1, 8), st.integers(1, 5), st.randoms())
def test_round_robin_gives_everybody_the_same(count: int, rounds: int, random: Random) -> None:
    policy, candidates = RoundRobin(), fleet(count)

    chosen = Counter(choose(policy, candidates, random=random) for _ in range(count * rounds))

    assert set(chosen.values()) == {rounds}


@given(st.lists(st.sets(st.integers(0, 5), min_size=1), max_size=60), st.randoms())
def test_round_robin_takes_the_least_recently_chosen_of_those_given(
    calls: list[set[int]], random: Random
) -> None:
    policy, all_of_them = RoundRobin(), fleet(6)
    last = dict.fromkeys(range(6), -1)
    for time, present in enumerate(calls):
        chosen = int(choose(policy, [all_of_them[each] for each in present], random=random)[1:])

        assert last[chosen] == min(last[each] for each in present)
        last[chosen] = time


def test_round_robin_alternates_also_if_the_list_does() -> None:
    """By index modulo length, the second of these would never be chosen."""
    policy, (a, b, c) = RoundRobin(), fleet(3)

    chosen = [choose(policy, each) for each in itertools.islice(itertools.cycle([[a, b], [c]]), 20)]

    assert Counter(chosen) == {"s0": 5, "s1": 5, "s2": 10}


def test_round_robin_counts_a_forgotten_server_as_new() -> None:
    policy, (a, b) = RoundRobin(), fleet(2)
    first = choose(policy, [a, b])
    choose(policy, [a, b])
    second = "s1" if first == "s0" else "s0"

    policy.forget(second)

    assert choose(policy, [a, b]) == second


@pytest.mark.parametrize("full", [range(0), range(100, 190), range(0, 256, 2)], ids=len)
def test_round_robin_gives_everybody_with_room_the_same(full: range) -> None:
    policy, candidates, without = RoundRobin(), fleet(256), {f"s{number}" for number in full}

    chosen = Counter(
        choose(policy, candidates, full=without) for _ in range(5 * (len(candidates) - len(full)))
    )

    assert set(chosen.values()) == {5}
    assert not chosen.keys() & without


def test_round_robin_goes_on_with_those_that_were_full() -> None:
    policy, candidates, full = RoundRobin(), fleet(64), {f"s{number}" for number in range(20)}
    for _ in range(44):
        choose(policy, candidates, full=full)

    assert {choose(policy, candidates) for _ in range(20)} == full


# Weighted


@pytest.mark.parametrize(
    "weights",
    [[1.0] * 256, [1.0] * 128 + [10.0] * 128, [0.5, 1.0, 2.0, 7.5] * 64, [1.0, 5.0, 2.0]],
    ids=["equal", "two kinds", "four kinds", "few"],
)
@pytest.mark.parametrize("without", ["nobody", "neighbours", "every other"])
def test_weighted_gives_shares_to_those_with_room(weights: list[float], without: str) -> None:
    policy, random, count = Weighted(), Random(1), len(weights)
    candidates = [Server(f"s{number}", weight=weight) for number, weight in enumerate(weights)]
    numbers = {"nobody": [], "neighbours": range(count // 2), "every other": range(0, count, 2)}
    full = {f"s{number}" for number in numbers[without]}
    total = sum(each.weight for each in candidates if each.id not in full)

    chosen: Counter[str] = Counter()
    for requests in range(1, 20 * count):
        chosen[choose(policy, candidates, full=full, random=random)] += 1
        if requests % 97 == 0:
            for each in candidates:
                share = 0.0 if each.id in full else requests * each.weight / total
                assert chosen[each.id] == pytest.approx(share, abs=1.5)


def test_weighted_gives_a_server_that_was_full_its_share_and_no_burst() -> None:
    policy, random = Weighted(), Random(1)
    candidates = [Server(f"s{number}", weight=1 + number % 4) for number in range(40)]
    for _ in range(1000):
        choose(policy, candidates, full={"s3"}, random=random)

    chosen = [choose(policy, candidates, random=random) for _ in range(100)]

    assert chosen.count("s3") == pytest.approx(4, abs=1)
    assert chosen[:10].count("s3") <= 1


@pytest.mark.parametrize("count", [4, 40])
def test_weighted_finds_the_only_one_with_room(count: int) -> None:
    policy, candidates = Weighted(), fleet(count)
    names = {each.id for each in candidates}

    for name in sorted(names) * 2:
        assert choose(policy, candidates, full=names - {name}) == name


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.randoms())
def test_weighted_gives_exact_shares(weights: list[int], random: Random) -> None:
    candidates = [Server(f"s{n}", weight=weight) for n, weight in enumerate(weights)]
    policy = Weighted()

    chosen = Counter(choose(policy, candidates, random=random) for _ in range(2 * sum(weights)))

    assert [chosen[each.id] for each in candidates] == [2 * weight for weight in weights]


@given(
    st.lists(st.sampled_from([0.3, 1.0, 2.0, 7.5]), min_size=5, max_size=5),
    st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=400),
    st.randoms(),
)
def test_weighted_keeps_shares_while_candidates_come_and_go(
    weights: list[float], calls: list[set[int]], random: Random
) -> None:
    everybody = [Server(f"s{n}", weight=weight) for n, weight in enumerate(weights)]
    policy, due, had = Weighted(), Counter[str](), Counter[str]()
    for present in calls:
        candidates = [everybody[each] for each in present]
        total = sum(each.weight for each in candidates)
        for each in candidates:
            due[each.id] += each.weight / total  # type: ignore[assignment]
        had[choose(policy, candidates, random=random)] += 1

        assert all(abs(had[each.id] - due[each.id]) < 3 for each in everybody)


def test_weighted_is_smooth() -> None:
    """nginx's own example: not a a a a a b c."""
    candidates = [Server("a", weight=5), Server("b", weight=1), Server("c", weight=1)]
    policy = Weighted()

    chosen = "".join(choose(policy, candidates) for _ in range(70))

    assert "aaaaa" not in chosen
    assert "bb" not in chosen
    assert "cc" not in chosen


def test_weighted_lets_a_forgotten_server_claim_nothing() -> None:
    first = set()
    for seed in range(20):
        policy, (a, b) = Weighted(), (Server("a"), Server("b", weight=9))
        for _ in range(5):
            choose(policy, [a, b])
        policy.forget("a")
        first.add(choose(policy, [a, Server("new")], random=Random(seed)))

    assert first == {"a", "new"}


# Load


@pytest.mark.parametrize(
    ("busier", "idler"),
    [
        ({"in_flight": 2}, {"in_flight": 1}),
        ({"in_flight": 2}, {"in_flight": 3, "weight": 2}),
        ({"weight": 1}, {"weight": 2}),
        ({"running": 9, "waiting": 0}, {"running": 8, "waiting": 0}),
        ({"running": 9, "waiting": 0}, {"running": 8, "waiting": 0, "in_flight": 5, "polled": 5}),
        ({"running": 5, "waiting": 1}, {"running": 8, "waiting": 0}),
        ({"running": 2, "waiting": 1, "weight": 1}, {"running": 5, "waiting": 2, "weight": 4}),
        ({"running": 8, "waiting": 0, "in_flight": 2, "polled": 0}, {"running": 9, "waiting": 0}),
        ({"running": 0, "waiting": 0, "in_flight": 2, "polled": 9}, {"running": 1, "waiting": 0}),
    ],
    ids=[
        "own requests",
        "own requests by weight",
        "an idle one of less weight",
        "everybody's",
        "own requests are in the gauges",
        "one waiting more than three running",
        "everybody's by weight",
        "what was sent since the poll",
        "under way at the poll, and not yet seen",
    ],
)
def test_the_less_loaded_is_chosen(busier: dict[str, Any], idler: dict[str, Any]) -> None:
    candidates = [Server("busier", **busier), Server("idler", **idler)]

    assert choose(LeastLoaded(), candidates) == "idler"
    assert choose(PowerOfTwo(), candidates) == "idler"


@pytest.mark.parametrize("stale", [{}, {"running": 3}, {"waiting": 3}])
def test_a_server_that_cannot_be_read_does_not_attract_everybody(stale: dict[str, Any]) -> None:
    read = Server("read", running=50, waiting=5, in_flight=2, polled=2)
    unread = Server("unread", in_flight=3, **stale)

    assert choose(LeastLoaded(), [unread, read]) == "read"


def test_two_choices_never_take_the_most_loaded() -> None:
    candidates = [Server(f"s{number}", in_flight=number) for number in range(5)]
    policy, random = PowerOfTwo(), Random(1)

    chosen = {choose(policy, candidates, random=random) for _ in range(300)}

    assert chosen == {"s0", "s1", "s2", "s3"}


@given(fleets)
def test_one_request_more_is_more_load(candidates: list[Server]) -> None:
    before = loads(candidates)
    candidates[0].in_flight += 1
    after = loads(candidates)

    assert after[0] >= before[0]
    assert after[1:] == before[1:]


class _AtRandom:
    def choose(
        self, members: Sequence[C], room: Room[C], route: Route, now: float, random: Any
    ) -> C | None:
        return members[int(random() * len(members))]

    def forget(self, endpoint_id: str) -> None: ...


def highest_load(policy: Strategy, seed: int) -> int:
    """With 10 servers and 100 requests at a time, each of which lasts for a random time."""
    random, candidates, highest = Random(seed), fleet(10), 0
    running: list[Server] = []
    by_id = {each.id: each for each in candidates}
    for _ in range(2000):
        if len(running) == 100:
            running.pop(random.randrange(100)).in_flight -= 1
        server = by_id[choose(policy, candidates, random=random)]
        server.in_flight += 1
        running.append(server)
        highest = max(highest, server.in_flight)
    return highest


@pytest.mark.parametrize("seed", range(3))
def test_choosing_by_load_keeps_the_highest_load_below_that_of_chance(seed: int) -> None:
    least, two, chance = (
        highest_load(policy, seed) for policy in (LeastLoaded(), PowerOfTwo(), _AtRandom())
    )

    assert least <= two < chance
    assert least <= 11


def test_requests_between_two_polls_spread_over_servers_that_others_use() -> None:
    """The larger of own requests and gauges would send them all to the first."""
    candidates = [Server("a", running=50, waiting=0), Server("b", running=52, waiting=0)]
    policy = LeastLoaded()
    for _ in range(20):
        chosen = choose(policy, candidates)
        next(each for each in candidates if each.id == chosen).in_flight += 1

    assert [each.in_flight for each in candidates] == [11, 9]


# Prefixes


def prompt(text: str, **fields: Any) -> Route:
    return Route(body=json.dumps({"prompt": text, **fields}).encode())


STORY = "once " * 1000


def test_a_known_prefix_is_followed() -> None:
    policy, candidates = PrefixAware(), fleet(8)
    first = choose(policy, candidates, prompt(STORY))

    for turn in range(1, 5):
        longer = prompt(STORY + "and then " * 100 * turn, max_tokens=turn)
        assert choose(policy, candidates, longer, random=Random(turn)) == first


def test_the_holder_of_more_is_preferred() -> None:
    policy, (a, b, c) = PrefixAware(), fleet(3)
    choose(policy, [a], prompt(STORY[:2500]))
    choose(policy, [b], prompt(STORY))

    assert choose(policy, [a, b, c], prompt(STORY + "end")) == "s1"


def test_of_equal_holders_the_less_loaded_is_chosen() -> None:
    policy, (a, b, c) = PrefixAware(), fleet(3)
    choose(policy, [a], prompt(STORY))
    choose(policy, [b], prompt(STORY))
    a.in_flight = 2
    b.in_flight = 1

    assert choose(policy, [a, b, c], prompt(STORY)) == "s1"


@pytest.mark.parametrize(("known", "followed"), [(0.2, False), (0.5, True)])
def test_a_small_share_of_the_prompt_is_not_followed(known: float, followed: bool) -> None:
    policy, (a, b) = PrefixAware(), fleet(2)
    choose(policy, [a], prompt(STORY[: int(known * len(STORY))]))
    a.in_flight = 1

    assert (choose(policy, [a, b], prompt(STORY)) == "s0") is followed


@pytest.mark.parametrize(
    ("holder", "other", "followed"),
    [(4, 0, True), (5, 0, False), (14, 9, True), (15, 9, False), (60, 50, True), (99, 50, False)],
)
@pytest.mark.parametrize("weight", [1.0, 100.0])
def test_an_overloaded_holder_is_not_followed(
    holder: int, other: int, followed: bool, weight: float
) -> None:
    """Neither by the scale of the weights."""
    policy, (a, b) = PrefixAware(), (Server("a", weight=weight), Server("b", weight=weight))
    choose(policy, [a], prompt(STORY))
    a.in_flight, b.in_flight = holder, other

    assert (choose(policy, [a, b], prompt(STORY)) == "a") is followed


def test_a_system_prompt_that_all_share_does_not_keep_them_on_one_server() -> None:
    policy, candidates, random = PrefixAware(), fleet(4), Random(1)
    by_id = {each.id: each for each in candidates}
    for user in range(64):
        chosen = choose(policy, candidates, prompt(f"{STORY} {user}"), random=random)
        by_id[chosen].in_flight += 1

    in_flight = [each.in_flight for each in candidates]
    assert max(in_flight) <= 20
    assert min(in_flight) >= 8


def test_conversations_that_share_a_system_prompt_share_the_caches_of_idle_servers() -> None:
    policy, candidates, random = PrefixAware(), fleet(4), Random(1)
    homes = []
    for user in range(16):
        talk = f"{STORY}{user} says " + f"{user} " * 1000
        homes.append(choose(policy, candidates, prompt(talk), random=random))
        again = choose(policy, candidates, prompt(talk + "and then " * 100), random=random)
        assert again == homes[-1]

    assert set(Counter(homes).values()) == {4}


def test_a_beginning_is_not_sent_elsewhere_before_its_holder_has_as_much_beside_it() -> None:
    policy, candidates = PrefixAware(), fleet(4)
    first = choose(policy, candidates, prompt(STORY + "a " * 300))

    assert choose(policy, candidates, prompt(STORY + "b " * 300)) == first


def test_the_cache_of_a_server_with_more_weight_gets_more_conversations() -> None:
    policy, candidates = PrefixAware(), [Server("a", weight=1), Server("b", weight=3)]
    homes = [
        choose(policy, candidates, prompt(STORY + f"{user} " * 1000), random=Random(user))
        for user in range(40)
    ]

    assert Counter(homes)["b"] == pytest.approx(30, abs=2)


def test_short_and_unknown_prompts_go_to_the_least_loaded() -> None:
    policy, (a, b) = PrefixAware(), fleet(2)
    choose(policy, [a], prompt("hello"))
    choose(policy, [a], prompt(STORY))
    a.in_flight = 1

    assert choose(policy, [a, b], prompt("hello")) == "s1"
    assert choose(policy, [a, b], prompt("another " * 500)) == "s1"


@pytest.mark.parametrize("holders", [1, 12, 40])
def test_a_holder_is_found_in_a_large_fleet(holders: int) -> None:
    policy, candidates = PrefixAware(), fleet(256)
    for each in candidates[100 : 100 + holders]:
        choose(policy, [each], prompt(STORY))
    full = {each.id for each in candidates[101 : 100 + holders]}

    for turn in range(20):
        assert choose(policy, candidates, prompt(STORY), full=full, random=Random(turn)) == "s100"


def test_a_holder_that_is_no_candidate_is_passed_over() -> None:
    policy, (a, b) = PrefixAware(), fleet(2)
    choose(policy, [a], prompt(STORY))

    assert choose(policy, [b], prompt(STORY)) == "s1"


def test_a_forgotten_holder_is_like_any_other() -> None:
    policy, (a, b) = PrefixAware(), fleet(2)
    choose(policy, [a], prompt(STORY))
    a.in_flight = 1

    policy.forget("s0")

    assert choose(policy, [a, b], prompt(STORY)) == "s1"


# Sessions


def homes(candidates: Sequence[Candidate], sessions: int = 200) -> list[str]:
    return [
        choose(Session(), candidates, Route(session=f"session {number}"))
        for number in range(sessions)
    ]


@given(st.integers(2, 8), st.data())
def test_a_server_that_leaves_moves_its_own_sessions_only(count: int, data: st.DataObject) -> None:
    candidates = fleet(count)
    gone = data.draw(st.sampled_from(candidates))

    before = homes(candidates, 50)
    after = homes([each for each in candidates if each is not gone], 50)

    assert all(new == old for old, new in zip(before, after, strict=True) if old != gone.id)


def test_sessions_are_spread_by_weight() -> None:
    candidates = [Server("a", weight=1), Server("b", weight=2), Server("c", weight=5)]

    counted = Counter(homes(candidates, 4000))

    for each in candidates:
        assert counted[each.id] / 4000 == pytest.approx(each.weight / 8, abs=0.03)


def test_sessions_of_a_server_that_leaves_are_spread_over_the_others() -> None:
    candidates = fleet(5)
    before = homes(candidates, 4000)
    after = homes(candidates[1:], 4000)

    moved = Counter(new for old, new in zip(before, after, strict=True) if old == "s0")

    assert [moved[f"s{n}"] / moved.total() for n in range(1, 5)] == pytest.approx(
        [0.25] * 4, abs=0.06
    )


def test_the_order_of_the_candidates_does_not_matter() -> None:
    assert homes(fleet(5)) == homes(fleet(5)[::-1])


@given(
    st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=6),
    st.lists(st.integers(0, 3), max_size=120),
)
def test_no_server_gets_more_of_the_sessions_than_the_bound(
    weights: list[float], sessions: list[int]
) -> None:
    candidates = [Server(f"s{n}", weight=weight) for n, weight in enumerate(weights)]
    policy, by_id = Session(), {each.id: each for each in candidates}
    for requests, number in enumerate(sessions, 1):
        chosen = by_id[choose(policy, candidates, Route(session=str(number)))]
        chosen.in_flight += 1

        share = requests * chosen.weight / sum(weights)
        assert chosen.in_flight <= max(4, ceil(1.25 * share))


def test_a_session_stays_while_its_server_has_few_requests() -> None:
    candidates = fleet(5)
    home = choose(Session(), candidates, Route(session="mine"))
    next(each for each in candidates if each.id == home).in_flight = 3

    assert choose(Session(), candidates, Route(session="mine")) == home


def test_a_session_moves_only_while_its_server_is_full_or_gone() -> None:
    policy, candidates = Session(), fleet(256)
    routes = [Route(session=f"session {number}") for number in range(300)]
    first = [choose(policy, candidates, route) for route in routes]
    full = set(first[:20])

    meanwhile = [choose(policy, candidates, route, full=full) for route in routes]
    fewer = [each for each in candidates if each.id not in full]
    without = [choose(policy, fewer, route) for route in routes]
    more = [*fleet(300)[256:], *candidates]
    later = [choose(policy, more, route) for route in routes]

    assert meanwhile == without
    assert full.isdisjoint(meanwhile)
    assert all(new == old for new, old in zip(meanwhile, first, strict=True) if old not in full)
    new = {f"s{number}" for number in range(256, 300)}
    assert all(now == old or now in new for now, old in zip(later, first, strict=True))
    assert first == [choose(policy, candidates, route) for route in routes]


def test_a_session_that_few_preferred_servers_have_room_for_finds_another() -> None:
    candidates = fleet(256)
    names = {each.id for each in candidates}

    assert choose(Session(), candidates, Route(session="mine"), full=names - {"s77"}) == "s77"


def test_requests_of_one_session_alone_are_spread_when_they_are_many() -> None:
    policy, candidates = Session(), fleet(256)
    by_id = {each.id: each for each in candidates}
    for _ in range(6 * 256):
        by_id[choose(policy, candidates, Route(session="mine"))].in_flight += 1

    assert max(each.in_flight for each in candidates) <= ceil(1.25 * 6)


def test_a_request_without_a_session_goes_to_the_least_loaded() -> None:
    assert choose(Session(), [Server("a", in_flight=2), Server("b", in_flight=1)]) == "b"


def test_every_process_finds_the_same_server() -> None:
    """Python's hash of a text would not."""
    program = (
        "from tests.fleet.test_policies import fleet, homes\nprint(*homes(fleet(5), 20), end='')"
    )
    output = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert output.split() == homes(fleet(5), 20)


# Latency


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"latency": 2.0}, {"latency": 1.0}),
        ({"latency": 1.0, "in_flight": 2}, {"latency": 2.0}),
        ({"latency": 1.0}, {"latency": 1.5, "weight": 2}),
        ({"latency": 1.0}, {"latency": None}),
        ({"latency": None, "in_flight": 1}, {"latency": 60.0, "in_flight": 60}),
        ({"latency": None, "in_flight": 2}, {"latency": None, "in_flight": 1}),
    ],
    ids=[
        "latency",
        "latency times requests",
        "by weight",
        "an unknown one is tried",
        "but not while its first answer is awaited",
        "of unknown ones the one with fewest",
    ],
)
def test_the_shortest_expected_time_is_chosen(
    slower: dict[str, Any], faster: dict[str, Any]
) -> None:
    assert choose(LowestLatency(), [Server("slower", **slower), Server("faster", **faster)]) == (
        "faster"
    )


def test_a_new_server_gets_one_request_of_many_at_once() -> None:
    known = [Server(f"s{n}", latency=1.0, in_flight=30) for n in range(3)]
    policy, candidates = LowestLatency(), [*known, Server("new")]

    chosen = [choose(policy, candidates, now=0.001 * n) for n in range(100)]

    assert chosen.count("new") == 1


def test_a_new_server_that_fails_each_time_gets_one_request_a_second() -> None:
    policy, candidates = LowestLatency(), [Server("known", latency=1.0), Server("failing")]

    chosen = [choose(policy, candidates, now=0.125 * n) for n in range(80)]

    assert chosen.count("failing") == 10


def test_an_idle_server_that_was_slow_is_tried_again_the_later_the_slower_it_was() -> None:
    policy = LowestLatency()
    slow, slower = Server("slow", latency=3.0), Server("slower", latency=100.0)
    for each in (slow, slower):
        choose(policy, [each], now=0.0)
    tried: dict[str, int] = {}
    for now in range(1, 100):
        chosen = choose(policy, [Server("fast", latency=1.0), slow, slower], now=now)
        tried.setdefault(chosen, now)

    assert tried["fast"] < 10 < tried["slow"] < 20 < 40 < tried["slower"] < 70


def test_a_server_that_does_not_answer_does_not_seem_faster_with_time() -> None:
    policy = LowestLatency()
    silent, other = Server("silent", latency=1.0), Server("other", latency=1.5)
    choose(policy, [silent], now=0.0)
    silent.in_flight = 1

    assert choose(policy, [silent, other], now=1000.0) == "other"


def test_a_forgotten_server_is_tried_at_once() -> None:
    policy, candidates = LowestLatency(), [Server("known", latency=1.0), Server("new")]
    choose(policy, candidates)

    policy.forget("new")

    assert choose(policy, candidates, now=0.5) == "new"


# Names and functions


def test_an_unknown_name_is_answered_with_the_list() -> None:
    with pytest.raises(ConfigurationError) as caught:
        strategy("fastest")

    assert all(name in str(caught.value) for name in ("fastest", *STRATEGIES))


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_call_makes_a_strategy_of_its_own(name: str) -> None:
    assert strategy(name) is not strategy(name)


def test_a_function_chooses_from_the_candidates_for_the_request() -> None:
    def by_model(candidates: Sequence[Candidate], route: Route) -> Candidate:
        return next(each for each in candidates if each.id == route.model)

    assert choose(strategy(by_model), fleet(3), Route(model="s2")) == "s2"


def test_what_a_function_raises_is_named() -> None:
    def broken(candidates: Sequence[Candidate], route: Route) -> Candidate:
        raise LookupError("no such zone")

    with pytest.raises(ConfigurationError, match=r"broken raised LookupError: no such zone") as e:
        choose(strategy(broken), fleet(2))

    assert isinstance(e.value.__cause__, LookupError)


@pytest.mark.parametrize("foreign", [None, "s0", Server("s0")], ids=["nothing", "an id", "a copy"])
def test_what_is_no_candidate_is_refused(foreign: Any) -> None:
    with pytest.raises(ConfigurationError, match="none of the candidates"):
        choose(strategy(lambda candidates, route: foreign), fleet(2))


def test_an_asynchronous_function_is_refused_at_once() -> None:
    async def slowly(candidates: Sequence[Candidate], route: Route) -> Candidate:
        return candidates[0]

    with pytest.raises(ConfigurationError, match="async"):
        strategy(slowly)  # type: ignore[arg-type]


def test_what_is_neither_a_name_nor_a_function_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not 7"):
        strategy(7)  # type: ignore[arg-type]
