"""Prompts are read one by one, and in which order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from vllm_unified.batch.source import END, Source
from vllm_unified.errors import BadRequestError


def taken(source: Source) -> list[tuple[int, Any]]:
    found = []
    while (item := source.next())[1] is not END:
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
    assert source.waits
    assert await source.wait_for_next() == (0, "a")

    await source.close()

    assert closed == [True]
    assert source.is_empty
