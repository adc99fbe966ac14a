"""The chunks of a stream, and the result that they add up to."""

from __future__ import annotations

import pytest

from tests.support import answers
from vllm_unified.errors import (
    EngineDeadError,
    GenerationAbortedError,
    OverloadedError,
    ProtocolError,
)
from vllm_unified.results import ChatResult, GenerationResult, ResultMetadata, StreamChunk
from vllm_unified.wire.chunks import ChunkAssembler

METADATA = ResultMetadata()


def payload(frame: bytes) -> bytes:
    return frame.removeprefix(b"data: ").rstrip(b"\n")


def feed(assembler: ChunkAssembler, *frames: bytes) -> list[StreamChunk]:
    return [chunk for frame in frames for chunk in assembler.feed(payload(frame))]


def completion(choices: int = 1) -> ChunkAssembler:
    return ChunkAssembler(choices=choices, is_chat=False)


def chat() -> ChunkAssembler:
    return ChunkAssembler(choices=1, is_chat=True)


def test_a_completion_adds_up() -> None:
    assembler = completion()

    chunks = feed(
        assembler,
        answers.text_event("Once "),
        answers.text_event("upon", finish_reason="length", stop_reason=7),
        answers.usage_event(5, 2),
        answers.DONE,
    )

    result = assembler.result(METADATA)
    assert type(result) is GenerationResult
    assert [chunk.text for chunk in chunks] == ["Once ", "upon"]
    assert result.text == assembler.text == "Once upon"
    assert (result.finish_reason, result.choices[0].stop_reason) == ("length", 7)
    assert result.usage.completion_tokens == 2
    assert (result.id, result.model, result.created) == ("cmpl-1b2f", answers.MODEL, 1780000000)
    assert assembler.is_complete
    assert assembler.saw_done


def test_done_alone_is_not_completeness() -> None:
    assembler = completion()

    feed(assembler, answers.text_event("Once "), answers.DONE)

    assert not assembler.is_complete


def test_every_choice_needs_its_finish_reason() -> None:
    assembler = completion(2)

    feed(assembler, answers.text_event("a", index=1, finish_reason="stop"))
    assert not assembler.is_complete
    feed(assembler, answers.text_event("b", index=0, finish_reason="stop"))
    assert assembler.is_complete


def test_choices_interleave() -> None:
    assembler = completion(3)

    feed(
        assembler,
        answers.text_event("x", index=2),
        answers.text_event("a", index=0),
        answers.text_event("m", index=1),
        answers.text_event("y", index=2, finish_reason="stop"),
        answers.text_event("b", index=0, finish_reason="stop"),
        answers.text_event("n", index=1, finish_reason="stop"),
    )

    assert assembler.result(METADATA).texts == ["ab", "mn", "xy"]


def test_a_chat_with_reasoning_adds_up() -> None:
    assembler = chat()

    chunks = feed(
        assembler,
        answers.ROLE_EVENT,
        answers.delta_event({"reasoning": "Fra"}),
        answers.delta_event({"reasoning": "nce"}),
        answers.delta_event({"content": "Paris"}),
        answers.delta_event({}, finish_reason="stop"),
    )

    result = assembler.result(METADATA)
    assert isinstance(result, ChatResult)
    assert (result.reasoning, result.content) == ("France", "Paris")
    assert [(chunk.reasoning, chunk.text) for chunk in chunks] == [
        ("Fra", ""),
        ("nce", ""),
        (None, "Paris"),
        (None, ""),
    ]


def tool(
    index: int, *, call_id: str | None = None, name: str | None = None, arguments: str | None = None
) -> bytes:
    function = {"name": name, "arguments": arguments}
    call = {
        "index": index,
        "function": {key: value for key, value in function.items() if value is not None},
    }
    if call_id is not None:
        call |= {"id": call_id, "type": "function"}
    return answers.delta_event({"tool_calls": [call]})


def test_tool_calls_are_assembled_from_their_pieces() -> None:
    assembler = chat()

    chunks = feed(
        assembler,
        answers.ROLE_EVENT,
        tool(0, call_id="call-0", name="weather", arguments=""),
        tool(0, arguments='{"city": '),
        tool(1, call_id="call-1", name="time", arguments="{"),
        tool(0, arguments='"Paris"}'),
        tool(1, arguments="}"),
        answers.delta_event({}, finish_reason="tool_calls"),
    )

    result = assembler.result(METADATA)
    assert isinstance(result, ChatResult)
    assert [(call.id, call.name, call.parsed_arguments()) for call in result.tool_calls] == [
        ("call-0", "weather", {"city": "Paris"}),
        ("call-1", "time", {}),
    ]
    assert chunks[0].tool_calls[0].name == "weather"
    assert chunks[1].tool_calls[0].arguments == '{"city": '


def test_token_ids_and_logprobs_add_up() -> None:
    assembler = completion()

    feed(
        assembler,
        answers.text_event(
            "a",
            token_ids=[7],
            prompt_token_ids=[1, 2],
            logprobs={
                "tokens": ["a"],
                "token_logprobs": [-0.5],
                "top_logprobs": [{"a": -0.5}],
                "text_offset": [0],
            },
        ),
        answers.text_event("", token_ids=[8]),
        answers.text_event(
            "b",
            token_ids=[9],
            finish_reason="stop",
            logprobs={
                "tokens": ["b"],
                "token_logprobs": [-0.25],
                "top_logprobs": [{"b": -0.25}],
                "text_offset": [1],
            },
        ),
    )

    choice = assembler.result(METADATA).choices[0]
    assert choice.token_ids == (7, 8, 9)
    assert choice.prompt_token_ids == (1, 2)
    assert choice.logprobs is not None
    assert [(entry.token, entry.logprob) for entry in choice.logprobs] == [
        ("a", -0.5),
        ("b", -0.25),
    ]


def test_a_chunk_always_says_something() -> None:
    assembler = chat()

    assert feed(assembler, answers.ROLE_EVENT, answers.usage_event(), answers.DONE) == []
    assert len(feed(assembler, answers.delta_event({"content": ""}, token_ids=[5]))) == 1


def test_a_chunk_keeps_what_has_no_attribute() -> None:
    (chunk,) = feed(completion(), answers.text_event("a", new_field=[1]))

    assert chunk.raw["choices"][0]["new_field"] == [1]
    assert "new_field" not in repr(chunk)


def test_an_error_frame_raises_and_what_came_is_kept() -> None:
    assembler = completion()
    feed(assembler, answers.text_event("Once ", token_ids=[1]))

    with pytest.raises(EngineDeadError) as caught:
        feed(assembler, answers.error_event())

    assert caught.value.status_code == 500
    partial = assembler.partial("error")
    assert (partial.ending, partial.text, partial.token_ids) == ("error", "Once ", (1,))


def test_admission_control_may_speak_inside_the_stream() -> None:
    with pytest.raises(OverloadedError) as caught:
        feed(completion(), answers.error_event(answers.BUSY, kind="Service Unavailable", code=503))

    assert caught.value.status_code == 503


def test_an_aborted_choice_raises() -> None:
    with pytest.raises(GenerationAbortedError):
        feed(completion(), answers.text_event("", finish_reason="abort"))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"hello",
        b'"[DONE]"',
        b'{"choices": 7}',
        b"\xff",
        b'{"choices": [{"index": null}]}',
    ],
)
def test_what_is_no_chunk_raises(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        completion().feed(frame)


def test_what_came_of_several_choices_is_in_the_partial_output() -> None:
    assembler = completion(2)
    feed(assembler, answers.text_event("b", index=1), answers.text_event("a", index=0))

    partial = assembler.partial("truncated")

    assert (partial.text, partial.texts) == ("a", ("a", "b"))


def test_nothing_came() -> None:
    partial = completion().partial("stalled")

    assert (partial.text, partial.texts, partial.token_ids) == ("", (), ())
