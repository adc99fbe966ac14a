"""What is refused, with which status and in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.contract.wire import Target

MISSING = "{'type': 'missing', 'loc': 'body.%s', 'msg': 'Field required', 'input': '%s'}"

SEMANTIC = [
    ({"prompt": None}, "Either prompt or prompt_embeds must be provided and non-empty.", "prompt"),
    ({"prompt": []}, "You must pass at least one prompt", None),
    ({"prompt": [""]}, "The decoder prompt cannot be empty", None),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0.", "max_tokens"),
    (
        {"max_tokens": 5000},
        "max_tokens=5000 cannot be greater than max_model_len=2048. "
        "Please request fewer output tokens.",
        "max_tokens",
    ),
    ({"temperature": -1}, "temperature must be non-negative, got -1.0.", "temperature"),
    ({"temperature": 3}, "temperature must be in [0, 2], got 3.0.", "temperature"),
    ({"top_p": 0}, "top_p must be in (0, 1], got 0.0.", "top_p"),
    ({"top_k": -5}, "top_k must be 0 (disable), or at least 1, got -5.", None),
    ({"min_p": 2}, "min_p must be in [0, 1], got 2.0.", None),
    ({"n": 2}, "n must be 1 when using greedy sampling, got 2.", None),
    ({"n": 0}, "n must be at least 1, got 0.", None),
    ({"presence_penalty": 3}, "presence_penalty must be in [-2, 2], got 3.0.", None),
    ({"repetition_penalty": 0}, "repetition_penalty must be greater than zero, got 0.0.", None),
    ({"min_tokens": 9}, "min_tokens must be less than or equal to max_tokens=3, got 9.", None),
    ({"stop": [""]}, "stop cannot contain an empty string.", None),
    (
        {"logprobs": 50},
        "Requested sample logprobs of 50, which is greater than max allowed: 20",
        "logprobs",
    ),
    ({"prompt": [999999]}, "Token id 999999 is out of vocabulary", None),
    (
        {"stream_options": {"include_usage": True}},
        "Stream options can only be defined when `stream=True`.",
        "stream_options",
    ),
    (
        {"stream": True, "use_beam_search": True},
        "Streaming is not currently supported with beam search",
        None,
    ),
    (
        {"stream": True, "prompt_logprobs": 1},
        "`prompt_logprobs` are not available when `stream=True`.",
        "prompt_logprobs",
    ),
    (
        {"suffix": "x"},
        "suffix is only supported for models with FIM completion rendering",
        "suffix",
    ),
    (
        {"cache_salt": ""},
        "Parameter 'cache_salt' must be a non-empty string if provided.",
        "cache_salt",
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "You can only use one kind of constraints for structured outputs "
        "('json', 'regex' or 'choice').",
        "structured_outputs",
    ),
    ({"structured_outputs": {"choice": []}}, "Choice '[]' cannot be an empty list", None),
]


@pytest.mark.parametrize(("fields", "message", "param"), SEMANTIC)
async def test_a_semantic_error_names_parameter_and_value(
    target: Target, fields: dict[str, Any], message: str, param: str | None
) -> None:
    reply = await target.complete(**fields)
    error = reply.json["error"]
    assert reply.status == 400
    assert reply.header("content-type") == "application/json"
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == "BadRequestError"
    assert error["param"] == param
    assert error["code"] == 400
    assert error["message"].partition(" (parameter=")[0] == message
    assert (param is not None) is (f"(parameter={param}" in error["message"] or param == "suffix")


TYPES = [
    (
        {"max_tokens": "many", "stream": "perhaps", "temperature": "hot"},
        "3 validation errors:\n"
        "  {'type': 'int_parsing', 'loc': 'body.max_tokens', 'msg': 'Input should be a valid "
        "integer, unable to parse string as an integer', 'input': 'many'}\n"
        "  {'type': 'bool_parsing', 'loc': 'body.stream', 'msg': 'Input should be a valid boolean, "
        "unable to interpret input', 'input': 'perhaps'}\n"
        "  {'type': 'float_parsing', 'loc': 'body.temperature', 'msg': 'Input should be a valid "
        "number, unable to parse string as a number', 'input': 'hot'}",
        "body.max_tokens",
    ),
    (
        {"stop": ["a", "b", "c", "d", "e"]},
        "2 validation errors:\n"
        "  {'type': 'string_type', 'loc': 'body.stop', 'msg': 'Input should be a valid string', "
        "'input': '<list of 5 items>'}\n"
        "  {'type': 'too_long', 'loc': 'body.stop', 'msg': 'List should have at most 4 items after "
        "validation, not 5', 'input': '<list of 5 items>', 'ctx': {'field_type': 'List', "
        "'max_length': 4, 'actual_length': 5}}",
        "body.stop",
    ),
]


@pytest.mark.parametrize(("fields", "message", "param"), TYPES)
async def test_a_wrong_type_is_pydantics_error(
    target: Target, fields: dict[str, Any], message: str, param: str
) -> None:
    reply = await target.complete(**fields)
    assert reply.status == 400
    expected = {"message": message, "type": "Bad Request", "param": param, "code": 400}
    assert reply.json == {"error": expected}


async def test_values_convert_as_pydantic_converts_them(target: Target) -> None:
    reply = await target.complete(max_tokens="2", temperature="0", stream="no", ignore_eos=1)
    assert reply.json["usage"]["completion_tokens"] == 2


async def test_malformed_json_names_the_place(target: Target) -> None:
    reply = await target.send("POST", "/v1/completions", data=b'{"prompt": ')
    assert reply.status == 400
    assert reply.json["error"]["message"] == (
        "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.11', 'msg': 'JSON decode "
        "error', 'input': '<dict of 0 items>', 'ctx': {'error': 'Expecting value'}}"
    )


async def test_a_body_must_be_an_object_of_json(target: Target) -> None:
    reply = await target.send("POST", "/v1/completions", data=b"[1]")
    assert "'type': 'model_attributes_type', 'loc': 'body'" in reply.json["error"]["message"]
    headers = {"content-type": "text/plain"}
    reply = await target.send("POST", "/v1/completions", data=b"{}", headers=headers)
    assert reply.status == 400
    assert reply.json["error"]["message"] == (
        "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
    )


async def test_chat_needs_messages(target: Target) -> None:
    reply = await target.send("POST", "/v1/chat/completions", {"model": target.model})
    message = "1 validation error:\n  " + MISSING % ("messages", "<dict of 1 items>")
    assert reply.json["error"]["message"] == message
    assert reply.json["error"]["param"] == "body.messages"
    reply = await target.chat(messages=[])
    assert reply.json["error"]["message"] == (
        "Cannot apply chat template to an empty conversation. Provide at least one message."
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_logprobs": 2}, "when using `top_logprobs`, `logprobs` must be set to true."),
        ({"tools": []}, "`tools` must not be an empty array. Either provide at least one tool"),
        ({"tool_choice": "auto"}, "When using `tool_choice`, `tools` must be set."),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
        ),
        ({"chat_template": "x"}, "Chat template is passed with request, but --trust-request-chat"),
        (
            {"response_format": {"type": "json_schema"}},
            "When response_format type is 'json_schema', the 'json_schema' field must be provided.",
        ),
        ({"response_format": {"type": "xml"}}, "6 validation errors:\n  {'type': 'literal_error'"),
        (
            {"max_completion_tokens": 5000},
            "max_completion_tokens=5000 cannot be greater than max_model_len=2048.",
        ),
    ],
)
async def test_chat_refuses(target: Target, fields: dict[str, Any], message: str) -> None:
    reply = await target.chat(**fields)
    assert reply.status == 400
    assert reply.json["error"]["message"].startswith(message)


async def test_an_image_is_refused_by_a_model_of_text(target: Target) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    reply = await target.chat(messages=[{"role": "user", "content": [part]}])
    assert reply.json["error"]["message"] == f"{target.model} is not a multimodal model"


async def test_a_prompt_must_fit_the_context(target: Target) -> None:
    long = (await target.complete(prompt=[5] * 3000)).json["error"]
    assert long["message"] == (
        "This model's maximum context length is 2048 tokens. However, your prompt contains 3000 "
        "input tokens, which exceeds this limit even without any output tokens. Please reduce the "
        "length of the input prompt. (parameter=input_tokens, value=3000)"
    )
    text = (await target.complete(prompt="hello " * 3000)).json["error"]
    assert "your prompt contains at least 2049 input tokens" in text["message"]
    full = (await target.complete(prompt=[5] * 2048)).json["error"]
    assert full["message"].startswith("max_tokens must be at least 1, got 0.")
    huge = (await target.complete(prompt="h" * 900_000)).json["error"]
    assert huge["param"] == "input_text"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
async def test_an_unknown_model_is_a_404_with_the_aliases(target: Target, path: str) -> None:
    body = {"model": "nope", "prompt": "x"}
    if path == "/v1/chat/completions":
        body = {"model": "nope", "messages": [{"role": "user", "content": "x"}]}  # type: ignore[dict-item]
    reply = await target.send("POST", path, body)
    assert reply.status == 404
    error = {"type": "NotFoundError", "param": "model", "code": 404}
    message = f"The model `nope` does not exist. Valid aliases: {target.model}."
    assert reply.json == {"error": {"message": message, **error}}


@pytest.mark.parametrize("fields", [{"logprobs": 50}, {"prompt": [999999]}])
async def test_what_the_engine_refuses_comes_inside_a_stream(
    target: Target, fields: dict[str, Any]
) -> None:
    whole = await target.complete(**fields)
    stream = await target.complete(**fields, stream=True)
    assert stream.status == 200
    assert stream.chunks == [whole.json]
    # This one frame is written by another encoder: spaces after separators.
    assert stream.frames[0] == json.dumps(whole.json)


async def test_the_framework_answers_unknown_paths_and_methods(target: Target) -> None:
    missing = await target.send("GET", "/nope")
    assert (missing.status, missing.json) == (404, {"detail": "Not Found"})
    embeddings = await target.send("POST", "/v1/embeddings", {"input": "x"})
    assert (embeddings.status, embeddings.json) == (404, {"detail": "Not Found"})
    wrong = await target.send("GET", "/v1/completions")
    assert (wrong.status, wrong.json) == (405, {"detail": "Method Not Allowed"})
    assert wrong.header("allow") == "POST"
    slash = await target.send("GET", "/v1/models/")
    assert slash.status == 307
    assert slash.header("location") == f"{target.url}/v1/models"
    off = await target.send("POST", "/v1/completions/render", {"prompt": "x"})
    assert off.status == 403
    assert off.json["error"]["type"] == "PermissionDeniedError"


async def test_a_key_guards_v1_and_nothing_else(target: Target) -> None:
    refused = await target.send("GET", "/v1/models", key=False)
    assert (refused.status, refused.json) == (401, {"error": "Unauthorized"})
    assert refused.header("vary") is None
    assert refused.header("www-authenticate") is None
    wrong = {"authorization": "Bearer wrong"}
    assert (await target.send("GET", "/v1/models", key=False, headers=wrong)).status == 401
    lower = {"authorization": f"bearer {target.key}"}
    assert (await target.send("GET", "/v1/models", key=False, headers=lower)).status == 200
    for path in ("/health", "/metrics", "/version", "/load", "/is_sleeping", "/server_info"):
        assert (await target.send("GET", path, key=False)).status == 200, path
    open_tokens = await target.send("POST", "/tokenize", {"prompt": "x"}, key=False)
    assert open_tokens.status == 200
