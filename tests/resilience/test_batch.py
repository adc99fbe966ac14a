"""Batches while servers die, return, hang and refuse: nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.support.clients import KINDS, Kind, make_client
from tests.support.waiting import eventually
from vllm_unified import AsyncVllmUnified, BadRequestError, BatchAnswer, BatchStoppedError
from vllm_unified.simulator import Fault, Fleet, Timing

pytestmark = [pytest.mark.resilience, pytest.mark.timeout(240)]

TIMING = Timing(time_to_first_token=0.01, inter_token_latency=0.002, jitter=0.2)
PROMPTS = [f"What is {number} times 7?" for number in range(600)]
PARAMS: dict[str, Any] = {"max_tokens": 8, "seed": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What a server that nothing happens to answers."""
    with Fleet() as fleet:
        url = fleet.add(model="sim").url

        async def ask() -> list[str]:
            async with AsyncVllmUnified(api_url=url) as vllm:
                texts: list[str] = await vllm.batch(PROMPTS, **PARAMS)
                return texts

        return asyncio.run(ask())


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Fleet() as fleet:
        for _ in range(3):
            fleet.add(model="sim", timing=TIMING, max_num_seqs=32)
        yield fleet


@contextlib.asynccontextmanager
async def client_of(kind: Kind, fleet: Fleet, **settings: Any) -> AsyncIterator[Any]:
    resources = {"endpoints": fleet.urls}
    async with make_client(kind, resources=resources, **settings) as vllm:
        yield vllm


def once_each(found: list[BatchAnswer], expected: list[str]) -> None:
    assert Counter(answer.index for answer in found) == Counter(range(len(expected)))
    assert {answer.error for answer in found} == {None}
    assert [answer.text for answer in sorted(found, key=lambda answer: answer.index)] == expected


@pytest.mark.parametrize("kind", KINDS)
async def test_a_fleet_that_loses_a_server_loses_no_prompt(
    kind: Kind, fleet: Fleet, expected: list[str]
) -> None:
    """One dies while it answers, and does not come back. No clock of an attempt is needed."""
    found = []
    async with client_of(kind, fleet) as vllm, vllm.stream_batch(PROMPTS, PARAMS) as stream:
        async for answer in stream:
            found.append(answer)
            if len(found) == 50:
                fleet.servers[0].kill()
        assert all(status.in_flight == 0 for status in vllm.list_endpoints())
    once_each(found, expected)


@pytest.mark.parametrize("kind", KINDS)
async def test_servers_that_die_and_return_in_turn(
    kind: Kind, fleet: Fleet, expected: list[str]
) -> None:
    found = []
    chance = random.Random(1)
    async with (
        client_of(kind, fleet) as vllm,
        vllm.stream_batch(PROMPTS, PARAMS, ordered=True) as stream,
    ):
        async for answer in stream:
            found.append(answer)
            if len(found) % 60 == 0:
                fleet.servers[chance.randrange(3)].restart(0.2)
    assert [answer.index for answer in found] == list(range(len(PROMPTS)))
    once_each(found, expected)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_outage_of_all_servers_is_waited_for(
    kind: Kind, fleet: Fleet, expected: list[str]
) -> None:
    async with client_of(kind, fleet) as vllm:
        stream = vllm.stream_batch(PROMPTS, PARAMS)
        found = [await anext(stream) for _ in range(50)]
        for server in fleet.servers:
            server.kill()
        rest = asyncio.ensure_future(_rest(stream))
        await eventually(lambda: stream.trouble is not None, 30)
        assert not rest.done()
        for server in fleet.servers:
            server.start()
        found += await asyncio.wait_for(rest, 120)
        assert stream.trouble is None
    once_each(found, expected)


async def _rest(stream: Any) -> list[BatchAnswer]:
    async with stream:
        return [answer async for answer in stream]


async def test_an_outage_that_does_not_end_keeps_what_there_was(
    fleet: Fleet, expected: list[str]
) -> None:
    found = []

    async def take(vllm: AsyncVllmUnified) -> None:
        async with vllm.stream_batch(PROMPTS, PARAMS, patience=1.0) as stream:
            async for answer in stream:
                found.append(answer)
                if len(found) == 50:
                    for server in fleet.servers:
                        server.kill()

    async with client_of("async", fleet) as vllm:
        with pytest.raises(BatchStoppedError) as caught:
            await take(vllm)
    done = {answer.index for answer in found}
    assert len(done) == len(found) >= 50
    assert all(answer.text == expected[answer.index] for answer in found)
    assert done.isdisjoint(caught.value.pending)
    assert done | set(caught.value.pending) == set(range(len(done) + len(caught.value.pending)))


@pytest.mark.parametrize("kind", KINDS)
async def test_servers_that_refuse_and_break_now_and_then(
    kind: Kind, fleet: Fleet, expected: list[str]
) -> None:
    for server in fleet.servers:
        for fault in ("busy", "error_500", "reset", "reset_after", "malformed_json"):
            server.faults.add(Fault(kind=fault, times=None, probability=0.02))
    async with client_of(kind, fleet) as vllm:
        found = await _rest(vllm.stream_batch(PROMPTS, PARAMS))
    # An answer that is no JSON is no passing error; with retries elsewhere it is rare.
    good = [answer for answer in found if answer.error is None]
    assert len(found) == len(PROMPTS)
    assert len(good) >= 0.9 * len(PROMPTS)
    assert all(answer.text == expected[answer.index] for answer in good)
    assert {type(answer.error).__name__ for answer in found} <= {"NoneType", "ProtocolError"}


@pytest.mark.parametrize("kind", KINDS)
async def test_admission_control_loses_nothing(kind: Kind, expected: list[str]) -> None:
    """The servers take less than a batch begins with."""
    with Fleet() as fleet:
        for _ in range(2):
            fleet.add(model="sim", timing=TIMING, max_num_seqs=8, max_num_queued_reqs=12)
        async with client_of(kind, fleet) as vllm:
            found = await _rest(vllm.stream_batch(PROMPTS, PARAMS))
    once_each(found, expected)


@pytest.mark.parametrize("kind", KINDS)
async def test_only_a_poisoned_prompt_fails(kind: Kind, fleet: Fleet, expected: list[str]) -> None:
    """Prompts that the server refuses stand between the others."""
    poisoned = {index for index in range(len(PROMPTS)) if index % 16 == 5}
    prompts: list[Any] = [
        "long " * 5000 if index in poisoned else prompt for index, prompt in enumerate(PROMPTS)
    ]
    async with client_of(kind, fleet) as vllm:
        found = await _rest(vllm.stream_batch(prompts, PARAMS, ordered=True))
    assert {answer.index for answer in found if answer.error is not None} == poisoned
    for answer, text in zip(found, expected, strict=True):
        if answer.index in poisoned:
            assert isinstance(answer.error, BadRequestError)
            assert answer.tries == 1
        else:
            assert answer.text == text
