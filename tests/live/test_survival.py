"""Streams that lose a real vLLM on the way, and go on at another one.

Three servers of the same model, of which each test kills one. Their weights are float32, so that
two servers, and batches of different sizes, agree on which token is the most likely.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import pytest

from tests.support.vllm import OWN_SERVERS, all_running
from tests.support.waiting import eventually
from vllm_unified import AsyncVllmUnified, GenerationResult, GenerationStream
from vllm_unified.servers import LocalServer, ServerSpec
from vllm_unified.servers.guard import session_members

pytestmark = [pytest.mark.live, pytest.mark.timeout(900), OWN_SERVERS]

TOKENS = 72
GREEDY: dict[str, Any] = {
    "max_tokens": TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
}
EPSILON = 1e-3
"""Difference of two log probabilities (natural logarithms) that float32 may mistake."""
ASKED = (
    ("stream", "😀 🐉 🌍 🎉 👍 🚀 😀 🐉 🌍 🎉 👍 🚀 😀 🐉"),
    ("stream", "こんにちは世界。日本語の文章です。こんにちは世界。日本語の文章です。こんにちは"),
    ("stream_chat", "Repeat ten times: 🚀🌍🎉🙂👍"),
    ("stream_chat", "Write こんにちは世界 twenty times in a row."),
)
"""Requests whose answers are mostly characters of several tokens."""


def spec(number: int) -> ServerSpec:
    """One of the servers; equal specs would share one."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[number % len(cores)]
    return ServerSpec(
        served_model_name="survival-test",
        dtype="float32",
        max_model_len=1024,
        max_restarts=0,
        env={"VLLM_CPU_OMP_THREADS_BIND": str(core), "SURVIVAL_TEST": str(number)},
    )


@pytest.fixture(scope="module")
def alive() -> Iterator[list[LocalServer]]:
    """The servers that no test has killed."""
    with all_running(*(spec(number) for number in range(3))) as servers:
        yield list(servers)


class Pair(NamedTuple):
    """The server that is killed, the one that is not, and a client of both."""

    victim: LocalServer
    survivor: LocalServer
    client: AsyncVllmUnified


@pytest.fixture
async def pair(alive: list[LocalServer]) -> AsyncIterator[Pair]:
    victim, survivor = alive.pop(0), alive[0]
    resources = {"endpoints": [victim.url, survivor.url], "strategy": lambda free, route: free[0]}
    async with AsyncVllmUnified(resources, timeout=100) as client:
        yield Pair(victim, survivor, client)


def kill_engine(server: LocalServer) -> None:
    """The HTTP server lives on, for a moment, and tells it."""
    [core] = [pid for pid in session_members(server.pid) if b"EngineCore" in title(pid)]
    os.kill(core, signal.SIGKILL)


def title(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def kill_server(server: LocalServer) -> None:
    """Nobody is left to tell anything."""
    for pid in (server.pid, *session_members(server.pid)):
        os.kill(pid, signal.SIGKILL)


async def interrupted(pair: Pair, kill: Callable[[LocalServer], None]) -> list[GenerationResult]:
    """The answers to all requests, whose server is killed when each of them has begun."""
    async with AsyncExitStack() as stack:
        streams: list[GenerationStream[Any]] = [
            # One after the other, so that they are cut after different numbers of tokens.
            await stack.enter_async_context(getattr(pair.client, form)(prompt, **GREEDY))
            for form, prompt in ASKED
        ]
        reading = asyncio.gather(*(stream.collect() for stream in streams))
        await eventually(lambda: all(len(stream.text) > 4 for stream in streams), 60)
        assert {stream.ending for stream in streams} == {None}
        kill(pair.victim)
        return list(await reading)


async def uninterrupted(pair: Pair) -> list[GenerationResult]:
    """The answers to the same requests from the survivor alone."""
    async with AsyncVllmUnified(api_url=pair.survivor.url, timeout=100) as client:
        streams = [getattr(client, form)(prompt, **GREEDY) for form, prompt in ASKED]
        return list(await asyncio.gather(*(stream.collect() for stream in streams)))


async def check(pair: Pair, result: GenerationResult, wanted: GenerationResult, why: str) -> None:
    """It went on once, for this reason, and nothing is missing, twice or different."""
    (note,) = result.metadata.continuations
    assert (note.from_endpoint, note.to_endpoint) == (pair.victim.url, pair.survivor.url)
    assert note.reason.startswith(why)
    assert 0 < note.tokens < TOKENS
    choice = result.choices[0]
    assert choice.token_ids is not None
    assert len(choice.token_ids) == result.usage.completion_tokens == TOKENS
    assert (choice.finish_reason, result.usage) == ("length", wanted.usage)
    text = await pair.client.detokenize(choice.token_ids, endpoint_url=pair.survivor.url)
    # A character that is not complete at the end is in no stream.
    assert result.text == text.rstrip("\ufffd")
    assert len(result.text.encode()) > 1.5 * len(result.text)
    print(f"{note.tokens} of {TOKENS} tokens before the cut: {result.text!r}")
    if choice.token_ids != wanted.choices[0].token_ids:
        gap = await gap_at_first_difference(pair, result, wanted)
        print(f"another token, by {gap:.2g}")
        assert gap < EPSILON


async def gap_at_first_difference(
    pair: Pair, one: GenerationResult, other: GenerationResult
) -> float:
    """How much less likely than the other the survivor finds one of the tokens that differ."""
    first, second = (each.choices[0].token_ids or () for each in (one, other))
    place = next(at for at, ids in enumerate(zip(first, second, strict=True)) if len(set(ids)) > 1)
    prompt = [*(one.choices[0].prompt_token_ids or ()), *first[:place]]
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 20, "return_tokens_as_token_ids": True}
    answer = await pair.client.make_request(pair.survivor.url, prompt, None, asked)
    (found,) = answer.choices[0].logprobs or ()
    likely = [found.top[f"token_id:{ids[place]}"] for ids in (first, second)]
    return abs(likely[0] - likely[1])


@pytest.mark.parametrize(
    ("kill", "why"), [(kill_engine, "EngineDeadError"), (kill_server, "StreamTruncatedError")]
)
async def test_streams_survive_their_server(
    pair: Pair, kill: Callable[[LocalServer], None], why: str
) -> None:
    results = await interrupted(pair, kill)
    whole = await uninterrupted(pair)

    for result, wanted in zip(results, whole, strict=True):
        await check(pair, result, wanted, why)
