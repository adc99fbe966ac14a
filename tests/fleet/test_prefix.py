"""The keys of prompts, and what is known of who holds them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.fleet.prefix import BLOCK_BYTES, MAX_KEYS, PrefixIndex, prefix_keys

TTL = 120.0


def keys(*, model: str | None = None, **fields: Any) -> list[int]:
    return prefix_keys(msgspec.json.encode(fields), model)


def message(role: str, size: int = 1000) -> dict[str, str]:
    return {"role": role, "content": role[0] * size}


CHAT = [message("system"), message("user")]
NEXT_TURN = [*CHAT, message("assistant"), message("user")]


def shared(left: list[int], right: list[int]) -> int:
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def test_the_next_turn_has_all_keys_of_the_turn_before() -> None:
    """However the closing bracket, and what follows it, meet the edges of blocks."""
    for size in range(900, 900 + BLOCK_BYTES):
        chat = [message("system"), message("user", size)]
        before = keys(messages=chat, max_tokens=5)
        after = keys(messages=[*chat, message("assistant")], max_tokens=7)

        assert len(before) >= 3
        assert after[: len(before)] == before


@pytest.mark.parametrize(
    ("shorter", "longer"),
    [
        ({"messages": CHAT}, {"messages": NEXT_TURN}),
        ({"prompt": "once " * 300}, {"prompt": "once " * 500}),
        ({"prompt": list(range(500))}, {"prompt": list(range(800))}),
        ({"prompt": ["once " * 300]}, {"prompt": ["once " * 300, "more"]}),
    ],
    ids=["messages", "text", "token ids", "texts"],
)
def test_what_stands_before_and_after_the_prompt_does_not_matter(
    shorter: dict[str, Any], longer: dict[str, Any]
) -> None:
    before = keys(temperature=1, **shorter, stop="x" * 2000)
    after = keys(**longer, max_tokens=9)

    assert before
    assert after[: len(before)] == before


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_prompts_share_the_blocks_before_the_first_difference(length: int, at: int) -> None:
    one, other = "a" * 4000, "a" * at + "b" + "a" * length

    together = shared(keys(prompt=one), keys(prompt=other))

    assert together == min((at + 1) // BLOCK_BYTES, (at + length + 2) // BLOCK_BYTES)


def test_equal_blocks_have_different_keys_at_different_places() -> None:
    assert len(set(keys(prompt="a" * 5000))) == 5001 // BLOCK_BYTES


@pytest.mark.parametrize(
    "other",
    [
        {"model": "adapter"},
        {"tools": [{"type": "function"}]},
        {"cache_salt": "mine"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_changes_the_cache_changes_all_keys(other: dict[str, Any]) -> None:
    plain, changed = keys(messages=CHAT), keys(**{"messages": CHAT, **other})

    assert set(plain).isdisjoint(changed)
    assert len(plain) == len(changed)


def test_no_more_than_the_beginning_of_a_long_prompt_is_looked_at() -> None:
    assert len(keys(prompt="a" * (BLOCK_BYTES * (MAX_KEYS + 5)))) == MAX_KEYS


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b"\xff", b'{"prompt":null}', b'{"messages":[{', b'{"input":"a"}']
)
def test_what_has_no_prompt_has_no_keys(body: bytes) -> None:
    assert prefix_keys(body, None) == []


chains = st.lists(st.integers(0, 2), min_size=0, max_size=5).map(
    lambda path: [hash(tuple(path[: depth + 1])) for depth in range(len(path))]
)
servers = st.sampled_from("abc")
steps = st.lists(st.tuples(chains, servers, st.floats(0, 90)), max_size=25)


@given(steps, chains, st.sets(servers), st.floats(0, 150))
def test_the_longest_prefix_is_that_of_a_naive_model(
    history: list[tuple[list[int], str, float]], asked: list[int], among: set[str], later: float
) -> None:
    index, sent, now = PrefixIndex(ttl=TTL), [], 0.0
    for chain, server, pause in history:
        now += pause
        index.add(chain, server, now)
        sent.append((chain, server, now))
    now += later

    best = dict.fromkeys(among, 0)
    for chain, server, at in sent:
        if server in among and now - at <= TTL:
            best[server] = max(best[server], shared(chain, asked))
    longest = max(best.values(), default=0)
    holders = sorted(server for server in best if longest and best[server] == longest)

    count, found = index.longest(asked, among.__contains__, now)
    assert (count, sorted(found)) == (longest, holders)


@given(steps, st.integers(1, 6))
def test_the_index_is_bounded(history: list[tuple[list[int], str, float]], bound: int) -> None:
    index = PrefixIndex(max_blocks=bound)
    for chain, server, now in history:
        index.add(chain, server, now)

        assert len(index) <= bound


@given(steps, chains, st.integers(1, 6))
def test_what_is_left_of_a_prompt_is_its_beginning(
    history: list[tuple[list[int], str, float]], last: list[int], bound: int
) -> None:
    index = PrefixIndex(max_blocks=bound)
    for chain, server, _ in history:
        index.add(chain, server, 0.0)
    index.add(last, "a", 0.0)

    count, _ = index.longest(last, "a".__contains__, 0.0)

    assert count == min(len(last), bound)


def test_the_least_recently_used_block_is_evicted() -> None:
    index = PrefixIndex(max_blocks=2)
    index.add([1], "a", 0)
    index.add([2], "a", 1)
    index.add([1], "a", 2)
    index.add([3], "a", 3)

    assert [index.longest([key], "a".__contains__, 3)[0] for key in (1, 2, 3)] == [1, 0, 1]


def test_a_block_is_forgotten_after_its_time_without_use() -> None:
    index = PrefixIndex(ttl=TTL)
    index.add([1, 2], "a", 0)
    index.add([1], "a", 100)

    assert index.longest([1, 2], "a".__contains__, 120) == (2, ["a"])
    assert index.longest([1, 2], "a".__contains__, 121) == (1, ["a"])
    assert index.longest([1, 2], "a".__contains__, 221) == (0, [])


def test_expired_blocks_leave_the_index() -> None:
    index = PrefixIndex(ttl=TTL)
    index.add(range(100), "a", 0)
    index.add([7], "b", 50)
    index.add([200], "a", 121)

    assert len(index) == 2


def test_a_server_that_is_forgotten_holds_nothing_and_the_others_hold_theirs() -> None:
    index = PrefixIndex()
    index.add([1, 2], "a", 0)
    index.add([1], "b", 0)

    index.forget("a")

    assert index.longest([1, 2], "ab".__contains__, 0) == (1, ["b"])
    assert len(index) == 1


def test_only_a_prompt_that_leaves_another_behind_is_a_fork() -> None:
    index = PrefixIndex()
    index.add([1, 2], "a", 0)

    assert index.is_fork([1, 5], 1)
    assert not index.is_fork([1, 2, 3], 2), "it goes on"
    assert not index.is_fork([1], 1), "it is the beginning of the other"
    assert not index.is_fork([5], 0), "they have nothing in common"


@given(steps, st.integers(1, 6), servers)
def test_what_a_server_holds_is_what_the_index_finds_there(
    history: list[tuple[list[int], str, float]], bound: int, forgotten: str
) -> None:
    index, now = PrefixIndex(max_blocks=bound, ttl=TTL), 0.0
    for chain, server, pause in history:
        now += pause
        index.add(chain, server, now)
    index.forget(forgotten)

    found = {
        server: sum(
            index.longest([key], server.__contains__, 0.0)[0]
            for key in {key for chain, _, _ in history for key in chain}
        )
        for server in "abc"
    }
    assert {server: index.held(server) for server in "abc"} == found
