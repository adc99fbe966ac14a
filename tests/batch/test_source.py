"""Prompts are read one by one, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from vllm_unified.batch.source import READ_AHEAD, Source
from vllm_unified.errors import BadRequestError


def taken(source: Source) -> list[tuple[int, Any]]:
    found = []
    while (item := source.next()) is not None:
        found.append(item)
    return found


@pytest.mark.parametrize("prompts", ["one", b"one", {"prompt": "one"}, 5, None])
def test_one_prompt_is_not_several(prompts: Any) -> None:
    with pytest.raises(BadRequestError, match="prompts must be"):
        Source(prompts, by_priority=True)


def test_a_generator_is_read_as_far_as_is_asked_for() -> None:
    read = []

    def prompts() -> Iterator[str]:
        for letter in "abc":
            read.append(letter)
            yield letter

    source = Source(prompts(), by_priority=True)

    assert source.next() == (0, "a")
    assert read == ["a"]
    assert taken(source) == [(1, "b"), (2, "c")]
    assert source.is_empty


def test_of_a_list_the_urgent_ones_come_first() -> None:
    prompts: list[Any] = [
        "a",
        {"prompt": "b", "priority": "high"},
        {"prompt": "c", "priority": 5},
        "d",
    ]

    indices = [index for index, _ in taken(Source(prompts, by_priority=True))]

    assert indices == [1, 0, 3, 2]
    assert [index for index, _ in taken(Source(prompts, by_priority=False))] == [0, 1, 2, 3]


def test_a_priority_that_is_none_is_left_to_whoever_refuses_it() -> None:
    prompts: list[Any] = [{"prompt": "a", "priority": "soon"}, {"prompt": "b", "priority": "high"}]

    assert [index for index, _ in taken(Source(prompts, by_priority=True))] == [1, 0]


async def test_an_asynchronous_one_is_closed_with_the_batch() -> None:
    closed = []

    async def prompts() -> AsyncIterator[str]:
        try:
            yield "a"
            yield "b"
        finally:
            closed.append(True)

    source = Source(prompts(), by_priority=True)
    arrived = asyncio.Event()
    source.begin(arrived.set)
    assert source.waits
    await arrived.wait()
    assert source.next() == (0, "a")

    await source.close()

    assert closed == [True]
    assert source.is_empty


async def test_it_is_read_a_little_ahead() -> None:
    read = 0

    async def prompts() -> AsyncIterator[str]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield str(number)

    source = Source(prompts(), by_priority=True)
    source.begin(lambda: None)
    await asyncio.sleep(0)
    assert read == READ_AHEAD
    for number in range(1000):
        assert source.next() == (number, str(number))
        assert read <= number + READ_AHEAD
        await asyncio.sleep(0)
    assert not source.waits
    assert source.next() is None
    assert source.is_empty
    await source.close()
