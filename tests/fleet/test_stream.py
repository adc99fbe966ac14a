"""A stream: how it ends, its three clocks, and what is left of it when it is left."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from tests.support import answers
from tests.support.answers import chunked, sse, text_event
from tests.support.fleets import directory
from tests.support.scripted import CLOSE, RESET, STALL, ScriptedServer, Step
from tests.support.waiting import eventually
from vllm_unified import (
    ChatResult,
    EngineDeadError,
    GenerationAbortedError,
    GenerationResult,
    GenerationStream,
    OutputValidationError,
    OverloadedError,
    ProtocolError,
    RequestTimeoutError,
    ResponseTooLargeError,
    StreamChunk,
    StreamStalledError,
    StreamTruncatedError,
    VllmError,
)
from vllm_unified.endpoints.endpoint import Slot
from vllm_unified.errors import QueueTimeoutError
from vllm_unified.fleet import stream as stream_module
from vllm_unified.settings import Settings
from vllm_unified.wire.requests import chat_request, generation_request
from vllm_unified.wire.structure import output_structure

pytestmark = pytest.mark.usefixtures("no_pauses")

ONCE, UPON, END = text_event("Once "), text_event("upon"), text_event("", finish_reason="stop")
DONE = chunked(answers.DONE) + answers.END


class Rig:
    """An endpoint for the scripted server."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.settings = Settings(api_url=server.url, timeout=3, max_retries=0)
        self.directory = directory(self.settings)
        self.fleet = self.directory.route(None)

    def limit_to_one(self) -> None:
        """One at a time, and one in line."""
        self.fleet = self.directory.route(
            self.directory.create_endpoint(None, {"max_concurrent_requests": 1, "queue_size": 1})
        )

    @property
    def in_flight(self) -> int:
        return self.fleet.endpoints[0].in_flight

    def stream(
        self, *steps: Step, fields: dict[str, Any] | None = None, **settings: Any
    ) -> GenerationStream[GenerationResult]:
        """A stream that gets this reply."""
        self.server.always(*steps)
        request = generation_request({"prompt": "a", **(fields or {})}, stream=True)
        return GenerationStream(self.fleet, request, self.settings.for_call(settings))

    def chat(self, *steps: Step, response_model: Any = None) -> GenerationStream[ChatResult[Any]]:
        self.server.always(*steps)
        structure = None if response_model is None else output_structure(response_model)
        request = chat_request("a", {}, stream=True, structure=structure)
        return GenerationStream(self.fleet, request, self.settings)

    async def is_clean(self) -> None:
        """Nothing is in flight any more, and no connection is left in mid-answer."""
        await eventually(lambda: self.in_flight == 0)
        await eventually(lambda: self.server.open_connections == 0)


@pytest.fixture
async def rig(server: ScriptedServer) -> AsyncIterator[Rig]:
    rig = Rig(server)
    yield rig
    await rig.directory.close()


async def failure_of(
    stream: GenerationStream[Any], after_each: Callable[[], None] = lambda: None
) -> tuple[list[StreamChunk], VllmError]:
    """What a stream delivers before it raises, and what it raises."""
    chunks = []

    async def read() -> None:
        async for chunk in stream:
            chunks.append(chunk)
            after_each()

    with pytest.raises(VllmError) as caught:
        await read()
    return chunks, caught.value


class TestTheEnd:
    async def test_complete(self, rig: Rig) -> None:
        stream = rig.stream(*answers.texts(["Once ", "upon ", "a time"]))

        texts = [chunk.text async for chunk in stream]

        assert texts == ["Once ", "upon ", "a time"]
        assert stream.ending == "complete"
        assert stream.text == stream.result.text == "Once upon a time"
        assert stream.result.finish_reason == "stop"
        assert stream.usage is not None
        assert stream.usage.completion_tokens == 2

    async def test_after_a_complete_stream_the_pool_has_its_connection_back(self, rig: Rig) -> None:
        for _ in range(3):
            await rig.stream(*answers.texts(["a", "b"])).collect()

        assert rig.server.connections == 1
        assert rig.in_flight == 0

    @pytest.mark.parametrize(
        "steps",
        [
            (sse(ONCE, UPON), CLOSE),
            (sse(ONCE, UPON), RESET),
            (sse(ONCE, UPON) + answers.END,),
            (sse(ONCE, UPON) + DONE,),
            (sse(ONCE, UPON, b'data: {"cho'), CLOSE),
        ],
        ids=["closed", "reset", "ended politely", "[DONE] without a reason", "cut in an event"],
    )
    async def test_truncated(self, rig: Rig, steps: tuple[Step, ...]) -> None:
        stream = rig.stream(*steps)

        chunks, error = await failure_of(stream)

        assert [chunk.text for chunk in chunks] == ["Once ", "upon"]
        assert type(error) is StreamTruncatedError
        assert stream.ending == "truncated"
        assert error.partial is not None
        assert (error.partial.ending, error.partial.text) == ("truncated", "Once upon")

    async def test_closed_after_the_finish_reason_is_complete(self, rig: Rig) -> None:
        """All that was asked for has come; a missing [DONE] takes nothing away."""
        stream = rig.stream(sse(ONCE, END), CLOSE)

        result = await stream.collect()

        assert (result.text, stream.ending) == ("Once ", "complete")

    @pytest.mark.parametrize(
        ("frame", "kind"),
        [
            (answers.error_event(), EngineDeadError),
            (answers.error_event(answers.BUSY, kind="x", code=503), OverloadedError),
            (text_event("", finish_reason="abort"), GenerationAbortedError),
            (b"data: {\n\n", ProtocolError),
            (b"data: " + b"x" * 5000 + b"\n\n", ResponseTooLargeError),
        ],
        ids=["engine dead", "busy", "abort", "no JSON", "too large"],
    )
    @pytest.mark.parametrize("together", [True, False], ids=["in one packet", "apart"])
    async def test_error(
        self, rig: Rig, frame: bytes, kind: type[VllmError], together: bool
    ) -> None:
        rig.settings = msgspec.structs.replace(rig.settings, max_response_bytes=4000)
        steps: tuple[Step, ...] = (sse(ONCE, frame) + DONE,)
        apart = threading.Event()
        if not together:
            steps = (sse(ONCE), apart, chunked(frame) + DONE)
        stream = rig.stream(*steps)

        chunks, error = await failure_of(stream, apart.set)

        assert type(error) is kind
        assert [chunk.text for chunk in chunks] == ["Once "]
        assert stream.ending == "error"
        assert error.partial is not None
        assert (error.partial.ending, error.partial.text) == ("error", "Once ")
        assert error.attempts[-1].error == f"{kind.__name__}: {error.message}"
        assert rig.in_flight == 0

    async def test_stalled(self, rig: Rig) -> None:
        stream = rig.stream(sse(ONCE), STALL, idle_timeout=0.1)

        chunks, error = await failure_of(stream)

        assert [chunk.text for chunk in chunks] == ["Once "]
        assert type(error) is StreamStalledError
        assert "0.1 s" in error.message
        assert stream.ending == "stalled"
        await rig.is_clean()

    async def test_cancelled(self, rig: Rig) -> None:
        stream = rig.stream(sse(ONCE), STALL)

        async with stream:
            await anext(stream)

        assert stream.ending == "cancelled"
        await rig.is_clean()

    @pytest.mark.parametrize("steps", [(sse(ONCE), CLOSE), (sse(ONCE), STALL)])
    async def test_after_an_error_the_iteration_is_over(
        self, rig: Rig, steps: tuple[Step, ...]
    ) -> None:
        stream = rig.stream(*steps, idle_timeout=0.1)
        await failure_of(stream)

        assert [chunk async for chunk in stream] == []

    async def test_a_result_before_the_end_raises_and_says_where_it_stands(self, rig: Rig) -> None:
        async with rig.stream(sse(ONCE), STALL) as stream:
            await anext(stream)
            with pytest.raises(StreamTruncatedError, match="not at its end") as caught:
                _ = stream.result

        assert caught.value.partial is not None
        assert caught.value.partial.text == "Once "
        with pytest.raises(StreamTruncatedError, match="cancelled"):
            _ = stream.result

    async def test_every_choice_must_end(self, rig: Rig) -> None:
        first = text_event("a", index=0, finish_reason="stop")
        stream = rig.stream(sse(first) + DONE, fields={"prompt": ["a", "b"]})

        _, error = await failure_of(stream)

        assert type(error) is StreamTruncatedError


class TestTheClocks:
    async def test_the_first_token(self, rig: Rig) -> None:
        stream = rig.stream(STALL, first_token_timeout=0.1)

        chunks, error = await failure_of(stream)

        assert chunks == []
        assert type(error) is RequestTimeoutError
        assert "first_token_timeout" in str(error)
        assert stream.ending == "stalled"
        await rig.is_clean()

    async def test_headers_and_a_role_are_no_token(self, rig: Rig) -> None:
        rig.settings = msgspec.structs.replace(rig.settings, first_token_timeout=0.1)

        _, error = await failure_of(rig.chat(sse(answers.ROLE_EVENT), STALL))

        assert type(error) is RequestTimeoutError

    async def test_the_line_counts(self, rig: Rig) -> None:
        rig.limit_to_one()
        slot = Slot(rig.fleet.endpoints[0], time.monotonic())

        _, error = await failure_of(rig.stream(STALL, first_token_timeout=0.1))

        assert type(error) is QueueTimeoutError
        assert rig.fleet.waiting == 0
        assert rig.server.connections == 0
        slot.leave()

    async def test_comments_do_not_wind_the_idle_clock(self, rig: Rig) -> None:
        """A dead engine behind a server that keeps the connection alive."""
        stop = threading.Event()
        stream = rig.stream(sse(ONCE), chunked(b": keep-alive\n\n"), stop, STALL, idle_timeout=0.15)
        await anext(stream)
        started = time.monotonic()

        with pytest.raises(StreamStalledError):
            await anext(stream)

        assert time.monotonic() - started < 10

    async def test_the_total(self, rig: Rig) -> None:
        stream = rig.stream(sse(ONCE), STALL, total_timeout=0.15, idle_timeout=2)

        _, error = await failure_of(stream)

        assert type(error) is RequestTimeoutError
        assert "total_timeout" in str(error)
        await rig.is_clean()

    async def test_a_stall_before_the_total_is_a_stall(self, rig: Rig) -> None:
        stream = rig.stream(sse(ONCE), STALL, idle_timeout=0.2, total_timeout=2)

        _, error = await failure_of(stream)

        assert type(error) is StreamStalledError

    async def test_the_clocks_start_with_the_call_and_not_when_it_is_prepared(
        self, rig: Rig
    ) -> None:
        stream = rig.stream(*answers.texts(["a", "b"]), total_timeout=0.2)
        made = time.monotonic()
        await eventually(lambda: time.monotonic() - made > 0.25)

        assert (await stream.collect()).text == "ab"

    async def test_a_slow_reader_is_no_stall(self, rig: Rig) -> None:
        chunks = []
        async for chunk in rig.stream(*answers.texts(["a", "b", "c"]), idle_timeout=0.1):
            chunks.append(chunk.text)
            read = time.monotonic()
            await eventually(lambda since=read: time.monotonic() - since > 0.12)  # type: ignore[misc]

        assert chunks == ["a", "b", "c"]

    async def test_a_server_that_never_ends_the_body_costs_the_connection_only(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stream_module, "_END_SECONDS", 0.05)
        stream = rig.stream(sse(ONCE, END, answers.DONE), STALL)

        assert (await stream.collect()).text == "Once "
        assert stream.ending == "complete"
        await rig.is_clean()


class TestAttempts:
    async def test_before_the_first_token_an_attempt_may_be_repeated(self, rig: Rig) -> None:
        rig.server.reply(answers.BUSY_ANSWER)
        rig.server.reply(sse(answers.error_event(answers.BUSY, code=503)) + DONE)
        rig.server.reply(CLOSE)
        stream = rig.stream(*answers.texts(["a", "b"]), max_retries=3)

        result = await stream.collect()

        assert result.text == "ab"
        assert [attempt.error is None for attempt in result.metadata.attempts] == [
            False,
            False,
            False,
            True,
        ]
        assert [attempt.status_code for attempt in result.metadata.attempts] == [
            503,
            503,
            None,
            None,
        ]

    async def test_after_the_first_token_it_may_not(self, rig: Rig) -> None:
        _, error = await failure_of(rig.stream(sse(ONCE), CLOSE, max_retries=3))

        assert len(rig.server.requests) == 1
        assert [attempt.error is None for attempt in error.attempts] == [False]

    @pytest.mark.parametrize("pieces", [["ab"], ["a", "b"]])
    async def test_the_attempt_that_succeeded_is_among_them(
        self, rig: Rig, pieces: list[str]
    ) -> None:
        whole = b"".join(answers.texts(pieces))

        result = await rig.stream(whole).collect()

        (attempt,) = result.metadata.attempts
        assert attempt.error is None
        assert attempt.endpoint == rig.server.url
        assert result.metadata.time_to_first_token is not None
        assert 0 < result.metadata.time_to_first_token <= result.metadata.duration

    async def test_all_attempts_have_the_same_request_id(self, rig: Rig) -> None:
        rig.server.reply(CLOSE)

        result = await rig.stream(*answers.texts(["a", "b"]), max_retries=1).collect()

        sent = {request.headers["x-request-id"] for request in rig.server.requests}
        assert sent == {result.metadata.request_id}

    async def test_a_200_that_is_no_stream(self, rig: Rig) -> None:
        _, error = await failure_of(rig.stream(answers.completion("whole")))

        assert type(error) is ProtocolError
        assert "does not stream" in error.message

    async def test_a_200_with_an_error_that_is_no_stream(self, rig: Rig) -> None:
        body = {"error": answers.error_body(answers.ENGINE_DEAD)}

        _, error = await failure_of(rig.stream(answers.response(body)))

        assert type(error) is EngineDeadError


class TestContents:
    async def test_prompts_and_samples_interleave(self, rig: Rig) -> None:
        frames = [
            text_event(letter, index=index, finish_reason="stop" if last else None)
            for letter, last in (("a", False), ("b", True))
            for index in (3, 1, 0, 2)
        ]
        stream = rig.stream(*answers.events(*frames), fields={"prompt": ["x", "y"], "n": 2})

        indices = [chunk.index async for chunk in stream]

        assert indices == [3, 1, 0, 2] * 2
        assert stream.result.texts == ["ab"] * 4
        assert stream.text == "ab"

    async def test_texts_are_those_of_the_first_choice(self, rig: Rig) -> None:
        frames = [
            text_event("a"),
            text_event("x", index=1),
            text_event(""),
            text_event("b"),
            text_event("", finish_reason="stop"),
            text_event("", index=1, finish_reason="stop"),
        ]
        stream = rig.stream(*answers.events(*frames), fields={"n": 2})

        assert [text async for text in stream.texts()] == ["a", "b"]

    async def test_a_chat_with_reasoning_and_tools(self, rig: Rig) -> None:
        def call(**function: str) -> bytes:
            head = {"id": "call-1", "type": "function"} if "name" in function else {}
            return answers.delta_event({"tool_calls": [{"index": 0, **head, "function": function}]})

        stream = rig.chat(
            *answers.events(
                answers.ROLE_EVENT,
                answers.delta_event({"reasoning": "hm"}),
                call(name="weather", arguments=""),
                call(arguments='{"city":'),
                call(arguments=' "Paris"}'),
                answers.delta_event({}, finish_reason="tool_calls"),
            )
        )

        result = await stream.collect()

        assert result.reasoning == "hm"
        assert result.tool_calls[0].parsed_arguments() == {"city": "Paris"}
        assert result.finish_reason == "tool_calls"

    async def test_a_structure_is_parsed_at_the_end(self, rig: Rig) -> None:
        frames = [
            answers.delta_event({"content": "[1,"}),
            answers.delta_event({"content": " 2]"}, finish_reason="stop"),
        ]

        assert (
            await rig.chat(*answers.events(*frames), response_model=list[int]).collect()
        ).parsed == [1, 2]

    async def test_a_structure_that_is_wrong_says_where_it_came_from(self, rig: Rig) -> None:
        frame = answers.delta_event({"content": "[1,"}, finish_reason="length")
        stream = rig.chat(*answers.events(frame), response_model=list[int])

        with pytest.raises(OutputValidationError, match="max_tokens") as caught:
            await stream.collect()

        assert caught.value.text == "[1,"
        assert caught.value.endpoint == rig.server.url
        assert caught.value.request_id is not None
        assert stream.ending == "complete"

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
    async def test_packets_of_any_size(self, rig: Rig, size: int) -> None:
        body = (
            text_event("Drachen \u2028 🐉") + text_event("é", finish_reason="stop") + answers.DONE
        )
        packets = [chunked(body[at : at + size]) for at in range(0, len(body), size)]

        result = await rig.stream(answers.STREAM_HEAD, *packets, answers.END).collect()

        assert result.text == "Drachen \u2028 🐉é"

    async def test_an_event_of_megabytes(self, rig: Rig) -> None:
        text = "x" * 4 * 2**20

        assert (await rig.stream(*answers.texts([text, "y"])).collect()).text == text + "y"


async def leave_by_break(stream: GenerationStream[Any]) -> None:
    async with stream:
        async for _ in stream:
            break


async def leave_by_an_exception(stream: GenerationStream[Any]) -> None:
    async def read() -> None:
        async with stream:
            async for _ in stream:
                raise KeyError

    with pytest.raises(KeyError):
        await read()


async def leave_by_close(stream: GenerationStream[Any]) -> None:
    await anext(stream)
    await stream.close()
    await stream.close()


async def leave_by_cancelling_the_read(stream: GenerationStream[Any]) -> None:
    await anext(stream)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def leave_by_a_timeout(stream: GenerationStream[Any]) -> None:
    async def read() -> None:
        async with asyncio.timeout(0.05), stream:
            async for _ in stream:
                pass

    with pytest.raises(TimeoutError):
        await read()


class TestLeaving:
    @pytest.mark.parametrize(
        "leave",
        [
            leave_by_break,
            leave_by_an_exception,
            leave_by_close,
            leave_by_cancelling_the_read,
            leave_by_a_timeout,
        ],
    )
    async def test_the_connection_is_cut_and_the_slot_given_back(
        self, rig: Rig, leave: Callable[[GenerationStream[Any]], Any]
    ) -> None:
        stream = rig.stream(sse(ONCE), STALL)

        await leave(stream)

        assert stream.ending == "cancelled"
        assert rig.in_flight == 0
        await rig.is_clean()

    @pytest.mark.parametrize("steps", [(STALL,), (sse(answers.ROLE_EVENT), STALL)])
    async def test_cancelled_before_the_first_token(
        self, rig: Rig, steps: tuple[Step, ...]
    ) -> None:
        waiting = asyncio.ensure_future(anext(rig.stream(*steps)))
        await eventually(lambda: len(rig.server.requests) == 1)

        waiting.cancel()

        with pytest.raises(asyncio.CancelledError):
            await waiting
        await rig.is_clean()

    async def test_forgotten_streams_are_ended_with_a_warning(self, rig: Rig) -> None:
        stream = rig.stream(sse(ONCE), STALL)
        await anext(stream)

        streams = [stream]
        del stream
        with pytest.warns(ResourceWarning, match="left without being closed"):
            streams.clear()

        await rig.is_clean()

    async def test_two_readers_at_once_are_too_many(self, rig: Rig) -> None:
        stream = rig.stream(sse(ONCE), STALL)
        await anext(stream)

        readers = [asyncio.ensure_future(anext(stream)) for _ in range(2)]
        ends = await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), 20)

        assert StreamTruncatedError in map(type, ends)
        assert all(isinstance(end, VllmError | StopAsyncIteration) for end in ends)
        await rig.is_clean()

    async def test_a_stream_that_was_never_begun_needs_no_closing(self, rig: Rig) -> None:
        stream = rig.stream(STALL)
        del stream
        gc.collect()

        unused = rig.stream(STALL)
        await unused.close()

        assert rig.server.connections == 0
        assert rig.in_flight == 0

    async def test_left_after_its_finish_reason_it_is_complete(self, rig: Rig) -> None:
        stream = rig.stream(sse(ONCE, END), STALL)

        async with stream:
            async for chunk in stream:
                if chunk.finish_reason:
                    break

        assert stream.ending == "complete"
        assert stream.result.text == "Once "

    async def test_an_error_at_the_beginning_leaves_nothing_behind(self, rig: Rig) -> None:
        with pytest.raises(OverloadedError):
            async with rig.stream(answers.BUSY_ANSWER):
                pytest.fail("the block must not be entered")

        assert rig.in_flight == 0

    async def test_another_stream_gets_the_slot(self, rig: Rig) -> None:
        rig.limit_to_one()
        first = rig.stream(sse(ONCE), STALL)
        await anext(first)
        second = asyncio.ensure_future(rig.stream(sse(ONCE), STALL).__aenter__())
        await eventually(lambda: rig.fleet.waiting == 1)

        await first.close()

        await (await second).close()


async def test_its_repr_says_how_it_stands(rig: Rig) -> None:
    stream = rig.stream(sse(ONCE), STALL)
    assert "not started" in repr(stream)

    async with stream:
        await anext(stream)
        assert "open, 5 characters" in repr(stream)

    assert "cancelled" in repr(stream)
