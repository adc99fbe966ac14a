"""/v1/chat/completions and its batch."""

from __future__ import annotations

import json

from tests.contract.wire import Target

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


async def test_a_whole_answer_has_every_field_in_order(target: Target) -> None:
    body = (await target.chat(return_token_ids=True)).json
    assert list(body) == [
        *("id", "object", "created", "model", "choices", "service_tier", "system_fingerprint"),
        *("usage", "prompt_logprobs", "prompt_token_ids", "prompt_text"),
        *("kv_transfer_params", "ec_transfer_params", "metrics"),
    ]
    choice = body["choices"][0]
    assert list(choice) == [
        *("index", "message", "logprobs", "finish_reason", "stop_reason", "token_ids"),
        "routed_experts",
    ]
    assert list(choice["message"]) == [
        *("role", "content", "refusal", "annotations", "audio", "function_call", "reasoning"),
    ]
    assert choice["message"]["role"] == "assistant"
    assert body["usage"]["prompt_tokens"] == len(body["prompt_token_ids"])
    assert body["id"].startswith("chatcmpl-")


async def test_a_stream_opens_with_the_role(target: Target) -> None:
    first, *tokens = (await target.chat(stream=True)).chunks
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert list(first)[-2:] == ["prompt_token_ids", "prompt_text"]
    assert len(tokens) == 3
    assert list(tokens[0]["choices"][0]) == [
        *("index", "delta", "logprobs", "finish_reason", "token_ids"),
    ]
    assert list(tokens[-1]["choices"][0]) == [
        *("index", "delta", "logprobs", "finish_reason", "stop_reason", "token_ids"),
    ]
    assert list(tokens[0]["choices"][0]["delta"]) == ["content"]
    assert "system_fingerprint" in tokens[-1]


async def test_usage_in_every_chunk_tells_completion_details(target: Target) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    first, *_, last = (await target.chat(stream=True, stream_options=options)).chunks
    assert list(first["usage"]) == [
        *("prompt_tokens", "total_tokens", "completion_tokens", "completion_tokens_details"),
    ]
    assert first["usage"]["completion_tokens"] == 0
    assert list(last["usage"]) == ["prompt_tokens", "total_tokens", "completion_tokens"]


async def test_a_chat_goes_on_through_its_token_ids(target: Target) -> None:
    chunks = (await target.chat(stream=True, return_token_ids=True, max_tokens=4)).chunks
    prompt = chunks[0]["prompt_token_ids"]
    tokens = [token for chunk in chunks[1:] for token in chunk["choices"][0]["token_ids"]]
    continued = await target.complete(
        prompt=prompt + tokens[:2], max_tokens=2, return_token_ids=True
    )
    assert len(continued.json["choices"][0]["token_ids"]) == 2


async def test_logprobs_have_tokens_bytes_and_alternatives(target: Target) -> None:
    choice = (await target.chat(logprobs=True, top_logprobs=2)).json["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    for entry in entries:
        assert list(entry) == ["token", "logprob", "bytes", "top_logprobs"]
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert len(entry["top_logprobs"]) == 2


async def test_without_a_limit_a_chat_may_fill_the_context(target: Target) -> None:
    messages = [{"role": "user", "content": "Say hi"}]
    body = {"messages": messages, "temperature": 0, "ignore_eos": True, "stop": ["e"]}
    reply = await target.send("POST", "/v1/chat/completions", body)
    assert reply.status == 200
    assert reply.json["choices"][0]["stop_reason"] == "e"


async def test_a_json_schema_gives_json(target: Target) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}},
        "required": ["age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    choice = (await target.chat(max_tokens=60, response_format=form)).json["choices"][0]
    assert isinstance(json.loads(choice["message"]["content"])["age"], int)


async def test_a_batch_answers_every_conversation(target: Target) -> None:
    talks = [[{"role": "user", "content": "Say hi"}], [{"role": "user", "content": "Say ho"}]]
    body = {"messages": talks, "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    reply = (await target.send("POST", "/v1/chat/completions/batch", body)).json
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert reply["usage"]["completion_tokens"] == 6
    single = await target.chat(ignore_eos=True)
    # A real model may round differently in a batch, so only the shape is compared.
    assert list(reply) == list(single.json)


async def test_tools_are_refused_without_a_parser(target: Target) -> None:
    auto = await target.chat(tools=TOOLS)
    assert auto.json["error"]["message"] == (
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    )
    required = await target.chat(tools=TOOLS, tool_choice="required")
    assert required.json["error"]["message"] == (
        'tool_choice="required" requires --tool-call-parser to be set'
    )
    assert (await target.chat(tools=TOOLS, tool_choice="none")).status == 200
