"""Streams that lose their server on the way, and are the ones of a server that never fails.

The simulator's next token depends on all tokens before it and on nothing else, so an answer that
goes on elsewhere can be compared, byte by byte, with the whole one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import pytest

from tests.support.answers import chunked, event, sse, text_event
from tests.support.clients import KINDS, Kind, make_client
from tests.support.scripted import CLOSE, ScriptedServer
from tests.support.waiting import eventually
from vllm_unified import (
    AsyncVllmUnified,
    EngineDeadError,
    GenerationStream,
    StreamTruncatedError,
    VllmError,
)
from vllm_unified.events import StreamContinuedEvent
from vllm_unified.settings import Settings
from vllm_unified.simulator import Simulator
from vllm_unified.wire.http import HttpTransport
from vllm_unified.wire.transport import Response

pytestmark = pytest.mark.usefixtures("no_pauses")

FORMS = ("stream", "stream_chat")
STREAMS = 15
"""For each failure and form; with 7 failures and 2 forms, 210 in all."""
TOKENS = 40
IDLE_SECONDS = 0.25
ODD_PROMPTS = ("Say it 234", "Say it 177", "Say it 288")
"""Prompts whose answers have many characters of several tokens."""
LONG = {"max_tokens": TOKENS, "ignore_eos": True}


class Answer(NamedTuple):
    """What two streams of one request must have in common."""

    text: str
    shown: str
    """The texts of all chunks."""
    token_ids: tuple[int, ...] | None
    shown_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...] | None
    finish_reason: str | None
    stop_reason: str | int | None
    usage: Any


async def answer_of(stream: GenerationStream[Any], at: int = 0, act: Any = None) -> Answer:
    """Read a stream to its end; ``act`` is called once its text is ``at`` characters long."""
    shown = ""
    shown_ids: tuple[int, ...] = ()
    async with stream:
        async for chunk in stream:
            shown += chunk.text
            shown_ids += chunk.token_ids or ()
            if act is not None and len(shown) >= at:
                await act()
                act = None
    choice = stream.result.choices[0]
    return Answer(
        choice.text,
        shown,
        choice.token_ids,
        shown_ids,
        choice.prompt_token_ids,
        choice.finish_reason,
        choice.stop_reason,
        stream.result.usage,
    )


class Whole(NamedTuple):
    """The answer of a server that does not fail."""

    answer: Answer
    texts: tuple[str, ...]
    """What each of its tokens added to the text."""

    def length(self, tokens: int) -> int:
        """Of the text that so many tokens brought, in characters."""
        return len("".join(self.texts[:tokens]))

    @property
    def cuts(self) -> list[int]:
        """After how many tokens it can break off when text has come, and is not complete."""
        return [count for count in range(1, len(self.texts)) if self.length(count)]


async def whole(form: str, prompt: str, params: Mapping[str, Any], **config: Any) -> Whole:
    """Ask a simulator that does not fail."""
    async with Simulator(**config) as server, AsyncVllmUnified(api_url=server.url) as client:
        answer = await answer_of(getattr(client, form)(prompt, **params))
        asked = {"return_token_ids": True, "stream_interval": 1}
        chunks = [chunk async for chunk in getattr(client, form)(prompt, **{**params, **asked})]
    assert all(len(chunk.token_ids or ()) == 1 for chunk in chunks)
    return Whole(answer, tuple(chunk.text for chunk in chunks))


class Rig:
    """Simulators, and a client that uses the first of them that it can."""

    def __init__(self, servers: Sequence[Simulator]) -> None:
        self.servers = servers
        self.urls = [each.url for each in servers]
        self.client: AsyncVllmUnified
        self._endpoints: dict[str, Any] = {}

    @property
    def first(self) -> Simulator:
        return self.servers[0]

    @property
    def second(self) -> Simulator:
        return self.servers[1]

    def choose(self, candidates: Sequence[Any], route: Any) -> Any:
        """The strategy."""
        self._endpoints |= {each.id: each for each in candidates}
        return candidates[0]

    def stream(self, form: str, prompt: str, **params: Any) -> GenerationStream[Any]:
        stream: GenerationStream[Any] = getattr(self.client, form)(prompt, **params)
        return stream

    @property
    def in_flight(self) -> list[int]:
        """At each server, as the client counts and as the server does."""
        counted = [each.in_flight for each in self._endpoints.values()]
        return counted + [each.service.engine.unfinished for each in self.servers]

    async def is_idle(self) -> None:
        """Nothing runs anywhere."""
        assert len(self._endpoints) == len(self.servers)
        await eventually(lambda: not any(self.in_flight))


@asynccontextmanager
async def rig(
    kind: Kind = "async",
    *,
    servers: int = 2,
    config: Mapping[str, Any] | None = None,
    transport: Any = None,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """Simulators of one model, and a client of them."""
    async with AsyncExitStack() as stack:
        simulators = [
            await stack.enter_async_context(Simulator(**(config or {}))) for _ in range(servers)
        ]
        fleet = Rig(simulators)
        resources = {
            "endpoints": fleet.urls,
            "strategy": fleet.choose,
            "transport": transport,
        }
        settings = {"timeout": 10, "max_retries": 3, **settings}
        client = make_client(kind, resources=resources, **settings)
        fleet.client = await stack.enter_async_context(client)
        yield fleet


Failure = Callable[[Simulator, int], Callable[[], Awaitable[None]] | None]
"""Makes a server fail after so many tokens; what is to be called once their text has come."""


def fault(kind: Any) -> Failure:
    def arm(server: Simulator, tokens: int) -> None:
        server.fail_next(kind, after_tokens=tokens)

    return arm


def kill(server: Simulator, tokens: int) -> Callable[[], Awaitable[None]]:
    server.fail_next("stall_after", after_tokens=tokens)

    async def act() -> None:
        server.kill()

    return act


def restart(server: Simulator, tokens: int) -> Callable[[], Awaitable[None]]:
    server.fail_next("stall_after", after_tokens=tokens)
    return server.restart


FAILURES: dict[str, Failure] = {
    "kill": kill,
    "restart": restart,
    **{
        kind: fault(kind)
        for kind in ("reset_after", "close_after", "stall_after", "error_frame", "die")
    },
}


async def survivor(
    form: str,
    prompt: str,
    params: Mapping[str, Any],
    *,
    failure: str,
    wanted: Whole,
    cut: int,
    kind: Kind = "async",
    **options: Any,
) -> Answer:
    """The answer to a request whose first server fails after ``cut`` tokens."""
    idle = {"idle_timeout": IDLE_SECONDS} if failure == "stall_after" else {}
    async with rig(kind, **{**idle, **options}) as fleet:
        act = FAILURES[failure](fleet.first, cut)
        stream = fleet.stream(form, prompt, **params)
        answer = await answer_of(stream, wanted.length(cut), act)
        assert [note.tokens <= cut for note in stream.result.metadata.continuations] == [True]
        await fleet.is_idle()
    return answer


# Every failure, at any token.


@pytest.mark.resilience
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("failure", FAILURES)
async def test_the_answer_is_that_of_a_server_that_does_not_fail(failure: str, form: str) -> None:
    source = random.Random(f"{failure} {form}")

    async def one(number: int) -> None:
        prompt, params = f"Tell me {failure} {number}", dict(LONG)
        if number % 2:
            params["return_token_ids"] = True
        wanted = await whole(form, prompt, params)
        cut = source.choice(wanted.cuts)
        answer = await survivor(form, prompt, params, failure=failure, wanted=wanted, cut=cut)
        assert answer == wanted.answer, f"cut after {cut} tokens"

    await asyncio.gather(*map(one, range(STREAMS)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failure", FAILURES)
async def test_with_both_clients(failure: str, kind: Kind) -> None:
    prompt = ODD_PROMPTS[0]
    wanted = await whole("stream_chat", prompt, LONG)

    answer = await survivor(
        "stream_chat", prompt, LONG, failure=failure, wanted=wanted, cut=20, kind=kind
    )

    assert answer == wanted.answer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prompt", ODD_PROMPTS)
async def test_a_cut_may_lie_inside_a_character(prompt: str, form: str) -> None:
    params = {**LONG, "return_token_ids": True}
    wanted = await whole(form, prompt, params)
    inside = [cut for cut in wanted.cuts if not wanted.texts[cut - 1]]
    assert len(inside) >= 4

    for cut in wanted.cuts:
        answer = await survivor(form, prompt, params, failure="close_after", wanted=wanted, cut=cut)
        assert answer == wanted.answer, f"cut after {cut} tokens"


# Chunks of several tokens.


class JoiningTransport(HttpTransport):
    """Makes one event of ``size`` of the server's, as a server with a stream interval does."""

    def __init__(self, size: int) -> None:
        super().__init__(Settings())
        self._size = size

    async def open(self, *args: Any, **kwargs: Any) -> Response:
        response = await super().open(*args, **kwargs)
        is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        return JoiningResponse(response, self._size) if is_stream else response


class JoiningResponse:
    """A stream whose events are joined; what is not joined yet is lost with the connection."""

    def __init__(self, response: Response, size: int) -> None:
        self.status, self.headers = response.status, response.headers
        self.close = response.close
        self._response, self._size = response, size
        self._unread = b""
        self._joined: dict[str, Any] | None = None
        self._count = 0

    async def read(self, limit: int) -> bytes:
        return await self._response.read(limit)

    async def packet(self) -> bytes:
        while packet := await self._response.packet():
            *events, self._unread = (self._unread + packet).split(b"\n\n")
            if joined := b"".join(map(self._join, events)):
                return joined
        return b""

    def _join(self, frame: bytes) -> bytes:
        data = frame.removeprefix(b"data: ")
        choices = data.startswith(b"{") and json.loads(data).get("choices")
        if not choices or choices[0].get("token_ids") is None:
            return frame + b"\n\n"
        body, self._count = json.loads(data), self._count + 1
        if self._joined is not None:
            body = _joined(self._joined, body)
        self._joined = body
        if self._count % self._size and choices[0]["finish_reason"] is None:
            return b""
        self._joined = None
        return event(body)


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    (one,), (other,) = first["choices"], second["choices"]
    one["token_ids"] += other["token_ids"]
    if "delta" in one:
        texts = [each["delta"].get("content") or "" for each in (one, other)]
        one["delta"] = {"content": "".join(texts)}
    else:
        one["text"] += other["text"]
    one["finish_reason"], one["stop_reason"] = other["finish_reason"], other.get("stop_reason")
    return first


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [2, 3, 7])
async def test_chunks_may_be_of_several_tokens(size: int, form: str) -> None:
    params = {**LONG, "return_token_ids": True}
    wanted = await whole(form, ODD_PROMPTS[1], params)

    for cut in wanted.cuts[size::3]:
        answer = await survivor(
            form,
            ODD_PROMPTS[1],
            params,
            failure="close_after",
            wanted=wanted,
            cut=cut,
            transport=JoiningTransport(size),
        )
        assert answer == wanted.answer, f"cut after {cut} tokens"


# What ends an answer.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keeps", [False, True])
async def test_a_stop_string_counts_wherever_the_cut_is(form: str, keeps: bool) -> None:
    """Before it, in the middle of it, and while the server holds back what may begin it."""
    prompt = ODD_PROMPTS[0]
    free = await whole(form, prompt, LONG)
    start = free.length(12) - 2
    stop = free.answer.text[start : start + 8]
    params = {**LONG, "stop": ["never said", stop], "include_stop_str_in_output": keeps}
    wanted = await whole(form, prompt, params)
    assert wanted.answer.stop_reason == stop
    assert wanted.answer.usage.completion_tokens == len(wanted.texts) > 13
    assert 12 in wanted.cuts  # the stop string begins before it, and ends after it

    for cut in wanted.cuts:
        answer = await survivor(form, prompt, params, failure="close_after", wanted=wanted, cut=cut)
        assert answer == wanted.answer, f"cut after {cut} tokens"


ENDINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "max_tokens": ("stream", {"max_tokens": 9, "ignore_eos": True}, {}, "length"),
    "the default of completions": ("stream", {"ignore_eos": True}, {}, "length"),
    "max_completion_tokens": (
        "stream_chat",
        {"max_completion_tokens": 9, "ignore_eos": True},
        {},
        "length",
    ),
    "the context": ("stream_chat", {"ignore_eos": True}, {"max_model_len": 40}, "length"),
    "the model": ("stream_chat", {"max_tokens": 200}, {"eos_probability": 0.05}, "stop"),
    "the model, after min_tokens": (
        "stream",
        {"max_tokens": 200, "min_tokens": 20},
        {"eos_probability": 0.5},
        "stop",
    ),
    "a stop token": ("stream", {**LONG, "stop_token_ids": [988]}, {}, "stop"),
}


@pytest.mark.parametrize("name", ENDINGS)
async def test_the_end_is_where_it_would_have_been(name: str) -> None:
    form, params, config, reason = ENDINGS[name]
    prompt = ODD_PROMPTS[0]
    wanted = await whole(form, prompt, params, **config)
    assert wanted.answer.finish_reason == reason

    for cut in wanted.cuts:  # the last one is right before the finish
        answer = await survivor(
            form, prompt, params, failure="close_after", wanted=wanted, cut=cut, config=config
        )
        assert answer == wanted.answer, f"cut after {cut} tokens"


async def test_an_answer_with_all_its_tokens_needs_nothing_but_its_finish_reason(
    server: ScriptedServer,
) -> None:
    once = text_event("Once", token_ids=[5], prompt_token_ids=[1, 2])
    server.always(sse(once, text_event(" upon", token_ids=[6])), CLOSE)

    async with Simulator() as other:
        resources = {"endpoints": [server.url, other.url], "strategy": first_of}
        async with AsyncVllmUnified(resources) as client:
            result = await client.stream("a", max_tokens=2).collect()

    assert (result.text, result.finish_reason) == ("Once upon", "length")
    assert result.usage.completion_tokens == 2
    assert other.requests == []


def first_of(candidates: Sequence[Any], route: Any) -> Any:
    return candidates[0]


# What is told of it.


async def test_the_result_says_where_it_went_on_and_why() -> None:
    async with rig() as fleet:
        fleet.first.fail_next("error_frame", after_tokens=7)
        result = await fleet.stream("stream", "Hello", **LONG).collect()

    (note,) = result.metadata.continuations
    assert (note.from_endpoint, note.to_endpoint) == (fleet.urls[0], fleet.urls[1])
    assert note.tokens == 7
    assert note.reason.startswith("EngineDeadError: EngineCore")
    assert [attempt.error is None for attempt in result.metadata.attempts] == [False, True]


async def test_an_event_says_it_when_it_happens() -> None:
    events: list[StreamContinuedEvent] = []
    async with rig() as fleet:
        fleet.client.on("stream_continued", events.append)
        fleet.first.fail_next("error_frame", after_tokens=7)
        result = await fleet.stream("stream", "Hello", **LONG).collect()

    (event,) = events
    assert event.request_id == result.metadata.request_id
    assert event.tokens == 7
    assert event.from_endpoint in fleet.urls[0]
    assert event.to_endpoint in fleet.urls[1]
    assert type(event.error) is EngineDeadError


async def test_an_answer_that_never_lost_its_server_has_no_continuations() -> None:
    async with rig() as fleet:
        result = await fleet.stream("stream", "Hello", **LONG).collect()

    assert result.metadata.continuations == ()


# More than one failure.


@pytest.mark.parametrize("form", FORMS)
async def test_a_stream_survives_one_server_after_another(form: str) -> None:
    prompt, params = ODD_PROMPTS[0], {**LONG, "return_token_ids": True}
    wanted = await whole(form, prompt, params)

    async with rig(servers=4) as fleet:
        for each, tokens in zip(fleet.servers, (8, 6, 12), strict=False):
            each.fail_next("reset_after", after_tokens=tokens)
        stream = fleet.stream(form, prompt, **params)
        answer = await answer_of(stream)
        await fleet.is_idle()

    assert answer == wanted.answer
    notes = stream.result.metadata.continuations
    assert [(note.from_endpoint, note.to_endpoint) for note in notes] == list(
        itertools.pairwise(fleet.urls)
    )


async def test_a_server_that_came_back_may_take_it_again() -> None:
    wanted = await whole("stream", "Hello", LONG)

    async with rig() as fleet:
        fleet.first.fail_next("close_after", after_tokens=8)
        fleet.second.fail_next("close_after", after_tokens=8)
        stream = fleet.stream("stream", "Hello", **LONG)
        answer = await answer_of(stream)

    assert answer == wanted.answer
    assert [note.to_endpoint for note in stream.result.metadata.continuations] == [
        fleet.urls[1],
        fleet.urls[0],
    ]


async def test_a_server_that_refuses_the_rest_is_not_the_last_one_asked() -> None:
    wanted = await whole("stream_chat", "Hello", LONG)

    async with rig(servers=3) as fleet:
        fleet.first.fail_next("close_after", after_tokens=8)
        fleet.second.fail_next("busy", times=2)
        stream = fleet.stream("stream_chat", "Hello", **LONG)
        answer = await answer_of(stream)

    assert answer == wanted.answer
    (note,) = stream.result.metadata.continuations
    assert note.to_endpoint == fleet.urls[2]


async def error_of(stream: GenerationStream[Any]) -> VllmError:
    with pytest.raises(VllmError) as caught:
        await stream.collect()
    return caught.value


async def test_it_goes_on_as_often_as_there_may_be_retries() -> None:
    wanted = await whole("stream", "Hello", LONG)

    async with rig(servers=4, max_retries=2) as fleet:
        for each in fleet.servers:
            each.fail_next("close_after", after_tokens=5)
        error = await error_of(fleet.stream("stream", "Hello", **LONG))
        await eventually(lambda: not any(fleet.in_flight))

    assert type(error) is StreamTruncatedError
    assert error.partial is not None
    assert error.partial.text == wanted.answer.text[: wanted.length(15)]
    assert fleet.servers[3].requests == []


# Streams that do not go on.


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_that_may_not_go_on_raises_what_broke_it(kind: Kind) -> None:
    wanted = await whole("stream", "Hello", LONG)

    async with rig(kind) as fleet:
        fleet.first.fail_next("close_after", after_tokens=5)
        error = await error_of(fleet.stream("stream", "Hello", **LONG, continue_streams=False))

    assert type(error) is StreamTruncatedError
    assert error.partial is not None
    assert error.partial.text == wanted.answer.text[: wanted.length(5)]
    assert "go on" not in (error.hint or "")
    assert fleet.second.requests == []


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
EXACT_ONLY: dict[str, tuple[str, dict[str, Any], str]] = {
    "samples": ("stream", {"n": 2}, "n is 2"),
    "logprobs": ("stream", {"logprobs": 1}, "logprobs"),
    "logprobs of a chat": ("stream_chat", {"logprobs": True}, "logprobs"),
    "a penalty": ("stream", {"presence_penalty": 0.5}, "presence_penalty"),
    "a grammar": ("stream", {"structured_outputs": {"choice": ["a" * 90]}}, "structured outputs"),
    "a format": ("stream_chat", {"response_format": {"type": "json_object"}}, "response_format"),
    "tools": ("stream_chat", {"tools": [TOOL]}, "tools"),
    "stop strings and token ids": (
        "stream",
        {"stop": ["never said"], "return_token_ids": True},
        "stop string",
    ),
}


@pytest.mark.parametrize("name", EXACT_ONLY)
async def test_the_error_of_a_stream_that_cannot_go_on_says_why(name: str) -> None:
    form, params, reason = EXACT_ONLY[name]

    async with rig(config={"tool_call_parser": True, "enable_auto_tool_choice": True}) as fleet:
        fleet.first.fail_next("close_after", after_tokens=2)
        error = await error_of(fleet.stream(form, "Hello", **{**LONG, **params}))

    assert type(error) is StreamTruncatedError
    assert error.partial is not None
    assert reason in str(error.hint)
    assert "go on" in str(error.hint)
    assert fleet.second.requests == []


async def test_with_nobody_left_the_error_is_that_of_the_server_that_was_lost() -> None:
    wanted = await whole("stream", "Hello", LONG)

    async with rig(max_retries=0) as fleet:
        fleet.second.kill()
        fleet.first.fail_next("error_frame", after_tokens=5)
        error = await error_of(fleet.stream("stream", "Hello", **LONG))
        await eventually(lambda: not any(fleet.in_flight))

    assert type(error) is EngineDeadError
    assert error.endpoint == fleet.urls[0]
    assert error.partial is not None
    assert error.partial.text == wanted.answer.text[: wanted.length(5)]
    assert "could not go on at another server" in str(error.hint)


async def test_a_wrong_request_does_not_go_on() -> None:
    """The next server would say the same."""
    frame = {"error": {"message": "no such token", "type": "BadRequestError", "code": 400}}
    with ScriptedServer() as server:
        first = text_event("Once", token_ids=[5], prompt_token_ids=[1, 2])
        server.always(sse(first) + chunked(event(frame)), CLOSE)
        async with Simulator() as other:
            resources = {"endpoints": [server.url, other.url], "strategy": first_of}
            async with AsyncVllmUnified(resources) as client:
                error = await error_of(client.stream("a", max_tokens=9))

    assert error.status_code == 400
    assert other.requests == []


async def test_the_next_first_token_has_the_time_of_a_first_token() -> None:
    async with rig(first_token_timeout=0.2) as fleet:
        fleet.first.fail_next("close_after", after_tokens=5)
        fleet.second.fail_next("stall")
        error = await error_of(fleet.stream("stream", "Hello", **LONG))
        await eventually(lambda: not any(fleet.in_flight))

    assert type(error) is StreamTruncatedError
    assert "no token within" in str(error.hint)


async def test_a_caller_may_leave_while_it_goes_on() -> None:
    async with rig() as fleet:
        fleet.first.fail_next("close_after", after_tokens=5)
        fleet.second.fail_next("stall")
        stream = fleet.stream("stream", "Hello", **LONG)
        reading = asyncio.ensure_future(stream.collect())
        await eventually(lambda: len(fleet.second.requests) == 1)

        reading.cancel()

        with pytest.raises(asyncio.CancelledError):
            await reading
        await fleet.is_idle()
    assert stream.ending == "cancelled"


async def test_a_server_that_stalls_is_told_to_stop() -> None:
    async with rig(idle_timeout=IDLE_SECONDS) as fleet:
        fleet.first.fail_next("stall_after", after_tokens=5)
        await fleet.stream("stream", "Hello", **LONG).collect()

        await eventually(lambda: fleet.first.requests[0].disconnected)
