"""What goes to the server for what the caller says."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.errors import BadRequestError
from vllm_unified.wire.requests import (
    WireRequest,
    chat_request,
    detokenize_request,
    embedding_request,
    encode,
    generation_fields,
    generation_request,
    tokenize_request,
)
from vllm_unified.wire.structure import output_structure

MESSAGES = [{"role": "user", "content": "Hello"}]


def body_of(request: WireRequest) -> Any:
    assert request.body is not None
    return json.loads(request.body)


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [
        ("Hello", 1),
        ("", 1),
        ([1, 2, 3], 1),
        ((1, 2, 3), 1),
        (["a", "b"], 2),
        ([[1, 2], [3]], 2),
    ],
)
def test_every_form_of_prompt_goes_to_completions(prompt: Any, choices: int) -> None:
    request = generation_request(generation_fields(prompt))

    assert (request.method, request.path) == ("POST", "/v1/completions")
    assert body_of(request) == {"prompt": json.loads(json.dumps(prompt))}
    assert request.choices == choices


@pytest.mark.parametrize("data", [MESSAGES, tuple(MESSAGES), {"messages": MESSAGES}])
def test_messages_go_to_chat(data: Any) -> None:
    request = generation_request(generation_fields(data))

    assert request.path == "/v1/chat/completions"
    assert request.is_chat
    assert body_of(request) == {"messages": MESSAGES}


def test_a_string_for_a_chat_is_one_message_of_the_user() -> None:
    assert body_of(chat_request("Hello", {})) == {"messages": MESSAGES}


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        7,
        1.5,
        [],
        [[]],
        [[1], []],
        ["a", 1],
        [1, "a"],
        [True],
        [-1],
        [1.5],
        b"bytes",
        [b"bytes"],
        [["a"]],
        {"a"},
        object(),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_what_is_no_prompt_is_said_before_anything_is_sent(prompt: Any) -> None:
    with pytest.raises(BadRequestError, match=r"the prompt cannot be sent") as caught:
        generation_request(generation_fields(prompt))

    assert caught.value.hint is not None


@pytest.mark.parametrize(
    "messages",
    [[], None, 5, {"role": "user"}, ["Hello"], [{"content": "no role"}], [{"role": 1}]],
    ids=repr,
)
def test_what_is_no_message_is_said_before_anything_is_sent(messages: Any) -> None:
    with pytest.raises(BadRequestError, match="message"):
        chat_request(messages, {})


def test_a_wrong_message_is_named_by_its_position() -> None:
    with pytest.raises(BadRequestError, match=r"messages\[1\]"):
        chat_request([*MESSAGES, {"role": None}], {})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "a", "messages": MESSAGES}, "both"),
        ({"max_tokens": 5}, "neither"),
        ({}, "neither"),
    ],
)
def test_a_request_has_a_prompt_or_messages(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        generation_request(fields)


def test_prompt_embeds_stand_in_for_a_prompt() -> None:
    assert body_of(generation_request({"prompt_embeds": "AAAA"})) == {"prompt_embeds": "AAAA"}


def test_parameters_that_are_none_are_left_to_the_server() -> None:
    assert body_of(generation_request({"prompt": "a", "seed": None, "top_p": 0})) == {
        "prompt": "a",
        "top_p": 0,
    }


def test_the_callers_dict_is_not_changed() -> None:
    fields = {"prompt": "a", "extra_body": {"x": 1}, "request_id": "r", "tools": []}
    before = json.dumps(fields)

    generation_request(fields)

    assert json.dumps(fields) == before


def test_a_stream_asks_for_its_usage() -> None:
    body = body_of(generation_request({"prompt": "a"}, stream=True))

    assert body == {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}


def test_the_callers_own_stream_options_stand() -> None:
    options = {"include_usage": False}
    request = generation_request({"prompt": "a", "stream_options": options}, stream=True)

    assert body_of(request)["stream_options"] == options


@pytest.mark.parametrize("stream", [True, False])
def test_whether_a_call_streams_cannot_be_changed_by_a_parameter(stream: bool) -> None:
    with pytest.raises(BadRequestError, match="stream"):
        generation_request({"prompt": "a", "stream": not stream}, stream=stream)


@pytest.mark.parametrize(
    ("fields", "choices"),
    [
        ({"prompt": "a", "n": 3}, 3),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"messages": MESSAGES, "n": 2}, 2),
        ({"prompt": "a", "extra_body": {"n": 4}}, 4),
    ],
)
def test_a_complete_answer_has_prompts_times_n_choices(
    fields: dict[str, Any], choices: int
) -> None:
    assert generation_request(fields).choices == choices


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True])
def test_n_is_a_whole_number(n: Any) -> None:
    with pytest.raises(BadRequestError, match="n must be a whole number"):
        generation_request({"prompt": "a", "n": n})


@pytest.mark.parametrize("name", ["model", "request_id"])
@pytest.mark.parametrize("value", [7, "two\nlines", "nul\0"])
def test_what_goes_into_a_header_or_a_log_is_one_line(name: str, value: Any) -> None:
    with pytest.raises(BadRequestError, match=f"{name} must be a string in one line"):
        generation_request({"prompt": "a", name: value})


def test_the_request_id_goes_into_the_header_and_not_into_the_body() -> None:
    request = generation_request({"prompt": "a", "request_id": "mine"})

    assert request.request_id == "mine"
    assert "request_id" not in body_of(request)


def test_no_tools_at_all_are_not_sent() -> None:
    """vLLM answers ``"tools": []`` with a 400."""
    assert "tools" not in body_of(chat_request("a", {"tools": []}))


def test_a_structure_is_sent_as_response_format() -> None:
    body = body_of(chat_request("a", {}, structure=output_structure(list[int])))

    assert body["response_format"]["json_schema"]["schema"]["type"] == "array"


def test_a_structure_and_a_response_format_contradict_each_other() -> None:
    with pytest.raises(BadRequestError, match="not both"):
        chat_request(
            "a", {"response_format": {"type": "json_object"}}, structure=output_structure(list[int])
        )


def test_extra_body_is_sent_as_it_is_and_wins() -> None:
    body = body_of(
        generation_request({"prompt": "a", "seed": 1, "extra_body": {"seed": None, "max_token": 1}})
    )

    assert body == {"prompt": "a", "seed": None, "max_token": 1}


@pytest.mark.parametrize("extra", [5, "x", [("a", 1)]])
def test_extra_body_is_a_mapping(extra: Any) -> None:
    with pytest.raises(BadRequestError, match="extra_body"):
        generation_request({"prompt": "a", "extra_body": extra})


def test_a_name_that_is_no_string_cannot_be_sent() -> None:
    with pytest.raises(BadRequestError, match="1"):
        generation_request({"prompt": "a", 1: 2})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"logit_bias": {"5": float("nan")}},
        {"documents": [{"score": float("-inf")}]},
        {"prompt": "half a pair: \ud83d"},
        {"value": object()},
        {"value": range(3)},
        {"value": {(1, 2): 3}},
    ],
    ids=lambda body: next(iter(body)),
)
def test_what_has_no_place_in_json_is_said_before_anything_is_sent(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError):
        encode(body)


def test_a_value_that_holds_itself_is_said_before_anything_is_sent() -> None:
    value: list[Any] = []
    value.append(value)

    with pytest.raises(BadRequestError):
        encode({"value": value})


def test_a_string_and_its_surrogates_are_not_in_the_message() -> None:
    """It would fail once more where the message is printed."""
    with pytest.raises(BadRequestError) as caught:
        encode({"prompt": "\ud83d"})

    str(caught.value).encode()


class Point(pydantic.BaseModel):
    x: int


class Array:
    """As numpy's arrays and numbers."""

    def tolist(self) -> list[int]:
        return [1, 2]


@pytest.mark.parametrize(
    ("value", "sent"), [(Point(x=1), {"x": 1}), (Array(), [1, 2]), ((1, 2), [1, 2])]
)
def test_common_foreign_values_are_understood(value: Any, sent: Any) -> None:
    assert json.loads(encode({"value": value})) == {"value": sent}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_json_arrives_as_it_was(body: dict[str, Any]) -> None:
    assert json.loads(encode(body)) == body


def test_text_goes_to_tokenize() -> None:
    request = tokenize_request("a", "m", {"return_token_strs": True, "add_special_tokens": None})

    assert request.path == "/tokenize"
    assert body_of(request) == {"prompt": "a", "model": "m", "return_token_strs": True}


def test_messages_go_to_tokenize() -> None:
    assert body_of(tokenize_request(MESSAGES, None, {})) == {"messages": MESSAGES}


def test_tokens_go_to_detokenize() -> None:
    request = detokenize_request([1, 2], None)

    assert request.path == "/detokenize"
    assert body_of(request) == {"tokens": [1, 2]}


@pytest.mark.parametrize("tokens", ["text", [1.5], ["a"], None, [-1]])
def test_only_token_ids_are_detokenized(tokens: Any) -> None:
    with pytest.raises(BadRequestError, match="token ids"):
        detokenize_request(tokens, None)


def test_inputs_go_to_embeddings() -> None:
    request = embedding_request(["a", "b"], "m", {"dimensions": 3})

    assert request.path == "/v1/embeddings"
    assert request.choices == 2
    assert body_of(request) == {
        "input": ["a", "b"],
        "model": "m",
        "encoding_format": "float",
        "dimensions": 3,
    }


def test_a_request_can_be_compared_and_is_immutable() -> None:
    request = generation_request({"prompt": "a"})

    assert request == generation_request({"prompt": "a"})
    with pytest.raises(AttributeError):
        request.path = "/other"  # type: ignore[misc]
    assert msgspec.structs.replace(request, path="/other") != request
