"""Deadlines behave as asyncio.timeout() does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import Any

import pytest

from vllm_unified.deadlines import Deadlines


async def test_what_is_done_in_time_goes_on() -> None:
    deadlines = Deadlines()

    for _ in range(3):
        with deadlines.within(60):
            await asyncio.sleep(0)

    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_what_takes_longer_is_cancelled() -> None:
    deadlines = Deadlines()
    loop = asyncio.get_running_loop()
    began = loop.time()

    with pytest.raises(TimeoutError), deadlines.within(0.05):
        await asyncio.sleep(60)

    assert loop.time() - began >= 0.05 - 0.002
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_each_has_its_own_time() -> None:
    deadlines = Deadlines()
    ended: list[str] = []

    async def wait(name: str, begin_after: float, seconds: float) -> None:
        await asyncio.sleep(begin_after)
        try:
            with deadlines.within(seconds):
                await asyncio.sleep(60)
        except TimeoutError:
            ended.append(name)

    async def leave() -> None:
        with deadlines.within(0.1):
            await asyncio.sleep(0)

    waits = [wait("second", 0.1, 0.1), wait("third", 0.3, 0.1), wait("first", 0, 0.1)]
    await asyncio.gather(leave(), *waits)

    assert ended == ["first", "second", "third"]


async def test_no_time_at_all() -> None:
    with pytest.raises(TimeoutError), Deadlines().within(-1.0):
        await asyncio.sleep(60)


async def test_cancelling_is_no_timeout() -> None:
    deadlines = Deadlines()

    async def wait() -> None:
        with deadlines.within(60):
            await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelling_wins_over_a_timeout_in_the_same_moment() -> None:
    deadlines = Deadlines()
    waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait() -> None:
        with deadlines.within(0.01):
            try:
                await waiting
            except asyncio.CancelledError:
                task.cancel()
                raise

    task = asyncio.create_task(wait())

    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_the_outer_one_is_told_of_in_the_outer_place() -> None:
    deadlines = Deadlines()

    async def wait() -> None:
        try:
            with deadlines.within(60):
                await asyncio.sleep(60)
        except TimeoutError:
            pytest.fail("that had time left")

    with pytest.raises(TimeoutError), deadlines.within(0.02):
        await wait()


async def test_an_error_is_passed_on() -> None:
    with pytest.raises(ZeroDivisionError), Deadlines().within(60):
        raise ZeroDivisionError


async def test_nothing_is_kept_of_those_that_are_over() -> None:
    deadlines = Deadlines()

    for number in range(1000):
        with deadlines.within(60 + number / 1000):
            pass

    gc.collect()
    assert len(deadlines._lines) <= 100
    assert not any(line.waiting for line in deadlines._lines.values())


def test_another_event_loop() -> None:
    deadlines = Deadlines()

    async def run_out_of_time() -> None:
        with deadlines.within(0.01):
            await asyncio.sleep(60)

    for _ in range(2):
        with pytest.raises(TimeoutError):
            asyncio.run(run_out_of_time())


async def test_a_thousand_lengths_at_once_leave_no_timers() -> None:
    """As of streams with a total, of which another part is left each time."""
    deadlines = Deadlines()
    loop = asyncio.get_running_loop()
    timers = []
    call_at = loop.call_at
    go_on = asyncio.Event()

    def noted(when: float, *call: Any) -> asyncio.TimerHandle:
        timers.append(call_at(when, *call))
        return timers[-1]

    async def wait(seconds: float) -> None:
        with deadlines.within(seconds):
            await go_on.wait()

    loop.call_at = noted  # type: ignore[assignment, method-assign]
    try:
        waiting = [asyncio.create_task(wait(60 + number / 7)) for number in range(1000)]
        await asyncio.sleep(0)
        assert len(timers) == 1000
        go_on.set()
        await asyncio.gather(*waiting)
    finally:
        del loop.call_at

    assert sum(not timer.cancelled() for timer in timers) <= 100


async def test_a_length_of_its_own_is_kept_to() -> None:
    deadlines = Deadlines()
    with contextlib.ExitStack() as many:
        for number in range(200):
            many.enter_context(deadlines.within(60 + number))
        with pytest.raises(TimeoutError), deadlines.within(0.05):
            await asyncio.sleep(60)
