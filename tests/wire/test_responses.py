"""Answers become typed results, and what is no answer becomes an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support import answers
from vllm_unified.errors import (
    BadRequestError,
    EngineDeadError,
    GenerationAbortedError,
    OutputValidationError,
    ProtocolError,
)
from vllm_unified.results import ChatResult, GenerationResult, ResultMetadata, TokenLogprob
from vllm_unified.wire.responses import (
    decode_chat,
    decode_detokenization,
    decode_embeddings,
    decode_generation,
    decode_models,
    decode_tokenization,
)

METADATA = ResultMetadata(endpoint="http://a", request_id="r")


def completion(body: dict[str, Any]) -> GenerationResult:
    return decode_generation(json.dumps(body).encode(), METADATA)


def chat(body: dict[str, Any]) -> ChatResult[Any]:
    return decode_chat(json.dumps(body).encode(), METADATA)


def test_a_completion() -> None:
    result = completion(answers.completion_body("Once upon a time"))

    assert result.text == "Once upon a time"
    assert result.finish_reason == "stop"
    assert (result.id, result.model) == ("cmpl-1b2f", answers.MODEL)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (5, 2)
    assert result.usage.total_tokens == 7
    assert result.usage.cached_tokens is None
    assert result.metadata is METADATA


def test_several_choices_are_in_the_order_of_their_index() -> None:
    body = answers.completion_body("a", "b", "c")
    body["choices"].reverse()

    assert completion(body).texts == ["a", "b", "c"]


def test_fields_without_an_attribute_stay_reachable() -> None:
    body = answers.completion_body("a", metrics={"mean_itl_ms": 7.5})

    assert completion(body).raw["metrics"] == {"mean_itl_ms": 7.5}


def test_the_body_is_not_in_the_repr() -> None:
    shown = repr(completion(answers.completion_body("a", secret_field=1)))

    assert shown.startswith("GenerationResult(")
    assert "secret_field" not in shown


def test_token_ids_stop_reason_and_details() -> None:
    body = answers.completion_body(
        "a",
        usage={
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 4, "created_cache_tokens": None},
            "completion_tokens_details": {"reasoning_tokens": 1},
        },
    )
    body["choices"][0] |= {"token_ids": [7, 8], "prompt_token_ids": [1, 2], "stop_reason": 42}

    result = completion(body)

    choice = result.choices[0]
    assert (choice.token_ids, choice.prompt_token_ids) == ((7, 8), (1, 2))
    assert choice.stop_reason == 42
    assert (result.usage.cached_tokens, result.usage.reasoning_tokens) == (4, 1)


def test_logprobs_of_a_completion() -> None:
    body = answers.completion_body("ab")
    body["choices"][0]["logprobs"] = {
        "text_offset": [0, 1],
        "token_logprobs": [None, -0.5],
        "tokens": ["a", "b"],
        "top_logprobs": [None, {"b": -0.5, "c": -1.5}],
    }

    assert completion(body).choices[0].logprobs == (
        TokenLogprob("a", None, {}),
        TokenLogprob("b", -0.5, {"b": -0.5, "c": -1.5}),
    )


def test_logprobs_of_a_chat() -> None:
    body = answers.chat_body("a")
    top = [{"token": "a", "logprob": -0.5, "bytes": [97]}, {"token": "b", "logprob": -9999.0}]
    body["choices"][0]["logprobs"] = {
        "content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top}]
    }

    assert chat(body).choices[0].logprobs == (TokenLogprob("a", -0.5, {"a": -0.5, "b": -9999.0}),)


def test_a_chat() -> None:
    result = chat(answers.chat_body("Paris.", reasoning="France..."))

    assert isinstance(result, ChatResult)
    assert result.content == result.text == "Paris."
    assert result.reasoning == "France..."
    assert result.parsed is None
    assert result.message == {"role": "assistant", "content": "Paris."}


def test_the_older_name_of_reasoning() -> None:
    assert chat(answers.chat_body("a", reasoning_content="why")).reasoning == "why"


def test_prompt_token_ids_of_a_chat_stand_at_the_top() -> None:
    body = answers.chat_body("a") | {"prompt_token_ids": [1, 2]}

    assert chat(body).choices[0].prompt_token_ids == (1, 2)


CALL = {
    "id": "chatcmpl-tool-1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}


def test_tool_calls() -> None:
    result = chat(answers.chat_body(None, tool_calls=[CALL], finish_reason="tool_calls"))

    assert result.content == ""
    assert result.finish_reason == "tool_calls"
    (call,) = result.tool_calls
    assert (call.id, call.name) == ("chatcmpl-tool-1", "weather")
    assert call.parsed_arguments() == {"city": "Paris"}
    assert result.message["tool_calls"] == [CALL]


@pytest.mark.parametrize("arguments", ["{", "[]", "7", '{"a": }'])
def test_arguments_that_are_no_json_object_carry_their_text(arguments: str) -> None:
    call = CALL | {"function": {"name": "weather", "arguments": arguments}}
    result = chat(answers.chat_body(None, tool_calls=[call]))

    with pytest.raises(OutputValidationError, match="weather") as caught:
        result.tool_calls[0].parsed_arguments()

    assert caught.value.text == arguments


def test_no_arguments_are_an_empty_object() -> None:
    call = CALL | {"function": {"name": "now", "arguments": ""}}

    assert chat(answers.chat_body(None, tool_calls=[call])).tool_calls[0].parsed_arguments() == {}


def test_an_aborted_generation_is_an_error_although_it_is_a_200() -> None:
    with pytest.raises(GenerationAbortedError):
        completion(answers.completion_body("", finish_reason="abort"))


@pytest.mark.parametrize("decode", [decode_generation, decode_chat])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (answers.error_body(answers.ENGINE_DEAD), EngineDeadError),
        (answers.error_body("bad", code=400), BadRequestError),
    ],
)
def test_an_error_in_a_200_is_an_error(decode: Any, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        decode(json.dumps({"error": value}).encode(), METADATA)


def test_an_error_that_is_null_is_none() -> None:
    assert completion(answers.completion_body("a", error=None)).text == "a"


BROKEN = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"7",
    b"<html></html>",
    b"\xff",
    b"{}",
    b'{"choices": []}',
    b'{"choices": null}',
    b'{"choices": {}}',
    b'{"choices": [null]}',
    b'{"choices": [{"index": "a", "text": ""}]}',
    b'{"choices": [{"text": 7}]}',
    b'{"choices": [{"text": "a"}], "usage": 7}',
    b'{"choices": ' + b"[" * 100_000,
]


@pytest.mark.parametrize("decode", [decode_generation, decode_chat])
@pytest.mark.parametrize("body", BROKEN, ids=lambda body: body[:40].decode("latin-1"))
def test_what_is_no_answer_is_a_protocol_error_that_quotes_it(decode: Any, body: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(body, METADATA)

    assert body[:20].decode("utf-8", "replace") in caught.value.message


def test_a_choice_that_says_nothing_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="choice 3"):
        decode_generation(b'{"choices": [{"index": 3}]}', METADATA)


def test_models() -> None:
    body = {
        "object": "list",
        "data": [
            {
                "id": "base",
                "object": "model",
                "created": 1,
                "owned_by": "vllm",
                "root": "/m",
                "parent": None,
                "max_model_len": 2048,
                "permission": [{}],
            },
            {"id": "sql", "object": "model", "root": "/lora", "parent": "base"},
        ],
    }

    base, adapter = decode_models(json.dumps(body).encode())

    assert (base.id, base.root, base.parent, base.max_model_len) == ("base", "/m", None, 2048)
    assert (adapter.id, adapter.parent, adapter.max_model_len) == ("sql", "base", None)


def test_tokens() -> None:
    body = b'{"count":2,"max_model_len":2048,"tokens":[1,2],"token_strs":["a","b"]}'

    tokens = decode_tokenization(body)

    assert (tokens.tokens, tokens.count, tokens.max_model_len) == ((1, 2), 2, 2048)
    assert tokens.token_strs == ("a", "b")


def test_text_of_tokens() -> None:
    assert decode_detokenization(b'{"prompt": "Hello"}') == "Hello"


def embeddings(*indices: int) -> bytes:
    data = [{"index": i, "object": "embedding", "embedding": [i, 0.5]} for i in indices]
    return json.dumps(
        {"id": "embd-1", "model": "m", "data": data, "usage": answers.usage()}
    ).encode()


def test_embeddings_are_in_the_order_of_their_inputs() -> None:
    result = decode_embeddings(embeddings(1, 0), METADATA, inputs=2)

    assert result.embeddings == ((0.0, 0.5), (1.0, 0.5))
    assert result.usage.prompt_tokens == 5


@pytest.mark.parametrize("indices", [(), (0,), (0, 0), (0, 2), (0, 1, 2)])
def test_embeddings_that_do_not_fit_their_inputs_are_a_protocol_error(
    indices: tuple[int, ...],
) -> None:
    with pytest.raises(ProtocolError, match="2 inputs"):
        decode_embeddings(embeddings(*indices), METADATA, inputs=2)


@pytest.mark.parametrize(
    "decode",
    [
        decode_models,
        decode_tokenization,
        decode_detokenization,
        lambda body: decode_embeddings(body, METADATA, inputs=1),
    ],
    ids=["models", "tokenize", "detokenize", "embeddings"],
)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b"\xff", b'{"data": 7}'])
def test_every_other_answer_of_another_shape_is_a_protocol_error(decode: Any, body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(body)
