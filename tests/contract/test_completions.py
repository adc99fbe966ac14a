"""/v1/completions, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.wire import Target

USAGE = ["prompt_tokens", "total_tokens", "completion_tokens"]
DETAILED_USAGE = [*USAGE, "prompt_tokens_details", "completion_tokens_details"]


async def test_a_whole_answer_has_every_field_in_order(target: Target) -> None:
    reply = await target.complete(return_token_ids=True)
    body = reply.json
    assert reply.status == 200
    assert reply.header_names == [
        *("date", "server", "content-length", "content-type", "vary"),
    ]
    assert reply.header("server") == "uvicorn"
    assert reply.header("vary") == "Origin"
    assert list(body) == [
        *("id", "object", "created", "model", "choices", "service_tier", "system_fingerprint"),
        *("usage", "kv_transfer_params", "ec_transfer_params", "metrics"),
    ]
    assert list(body["choices"][0]) == [
        *("index", "text", "logprobs", "finish_reason", "stop_reason", "token_ids"),
        *("prompt_logprobs", "prompt_token_ids", "routed_experts"),
    ]
    assert list(body["usage"]) == DETAILED_USAGE
    assert body["usage"]["completion_tokens"] == len(body["choices"][0]["token_ids"]) == 3
    assert body["usage"]["prompt_tokens"] == len(body["choices"][0]["prompt_token_ids"])
    assert body["id"].startswith("cmpl-")
    assert len(body["id"]) == len("cmpl-") + 16
    assert body["system_fingerprint"].startswith("vllm-0.32.0-")


async def test_max_tokens_defaults_to_sixteen(target: Target) -> None:
    for absent in ({}, {"max_tokens": None}):
        body = {"prompt": "Hi", "ignore_eos": True, **absent}
        reply = await target.send("POST", "/v1/completions", body)
        assert reply.json["usage"]["completion_tokens"] == 16


async def test_a_stream_gives_one_chunk_per_token(target: Target) -> None:
    reply = await target.complete(stream=True, return_token_ids=True)
    assert reply.header("content-type") == "text/event-stream; charset=utf-8"
    assert reply.header_names == [
        *("date", "server", "content-type", "vary", "transfer-encoding"),
    ]
    first, second, last = reply.chunks
    assert list(first) == ["id", "object", "created", "model", "choices"]
    assert list(first["choices"][0]) == [
        *("index", "text", "logprobs", "finish_reason", "stop_reason"),
        *("prompt_token_ids", "token_ids"),
    ]
    assert first["object"] == "text_completion"
    assert first["choices"][0]["prompt_token_ids"]
    assert second["choices"][0]["prompt_token_ids"] is None
    assert [len(c["choices"][0]["token_ids"]) for c in (first, second, last)] == [1, 1, 1]
    assert last["choices"][0]["finish_reason"] == "length"
    assert list(last)[-1] == "system_fingerprint"


async def test_a_stream_and_a_whole_answer_have_the_same_text(target: Target) -> None:
    whole = await target.complete(max_tokens=8, return_token_ids=True)
    stream = await target.complete(max_tokens=8, stream=True, return_token_ids=True)
    choices = [chunk["choices"][0] for chunk in stream.chunks]
    assert "".join(c["text"] for c in choices) == whole.json["choices"][0]["text"]
    tokens = [token for c in choices for token in c["token_ids"]]
    assert tokens == whole.json["choices"][0]["token_ids"]


async def test_usage_comes_last_and_in_every_chunk_if_asked(target: Target) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *tokens, last = (await target.complete(stream=True, stream_options=options)).chunks
    assert [chunk["usage"]["completion_tokens"] for chunk in tokens] == [1, 2, 3]
    assert all(list(chunk["usage"]) == USAGE for chunk in [*tokens, last])
    assert all("system_fingerprint" not in chunk for chunk in tokens)
    assert last["choices"] == []
    assert list(last) == [
        *("id", "object", "created", "model", "choices", "usage", "system_fingerprint"),
    ]


async def test_token_ids_are_a_prompt_and_continue_the_text(target: Target) -> None:
    full = (await target.complete(max_tokens=6, return_token_ids=True)).json["choices"][0]
    prompt = full["prompt_token_ids"] + full["token_ids"][:3]
    rest = (await target.complete(prompt=prompt, max_tokens=1, return_token_ids=True)).json
    assert rest["choices"][0]["prompt_token_ids"] == prompt
    assert rest["usage"]["prompt_tokens"] == len(prompt)


async def test_prompts_and_samples_are_numbered_prompt_first(target: Target) -> None:
    fields = {"prompt": ["Hello", "Bye"], "n": 2, "temperature": 1, "seed": 1, "ignore_eos": True}
    body = (await target.complete(**fields)).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == 12
    chunks = (await target.complete(**fields, stream=True)).chunks
    assert sorted(chunk["choices"][0]["index"] for chunk in chunks) == sorted([0, 1, 2, 3] * 3)
    ended = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(ended) == [0, 1, 2, 3]


async def test_a_stop_string_is_cut_off_and_named(target: Target) -> None:
    text = (await target.complete(max_tokens=8, ignore_eos=True)).json["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    fields = {"max_tokens": 30, "ignore_eos": True, "stop": [stop]}
    choice = (await target.complete(**fields)).json["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop
    assert choice["text"] == text[: text.index(stop)]
    kept = (await target.complete(**fields, include_stop_str_in_output=True)).json["choices"][0]
    assert kept["text"] == text[: text.index(stop)] + stop
    chunks = (await target.complete(**fields, stream=True)).chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]


async def test_a_stop_token_ends_without_its_text(target: Target) -> None:
    full = (await target.complete(max_tokens=4, return_token_ids=True)).json["choices"][0]
    stop = full["token_ids"][2]
    fields = {"max_tokens": 8, "stop_token_ids": [stop], "return_token_ids": True}
    choice = (await target.complete(**fields)).json["choices"][0]
    end = full["token_ids"].index(stop) + 1
    assert choice["token_ids"] == full["token_ids"][:end]
    assert choice["stop_reason"] == stop
    assert choice["finish_reason"] == "stop"
    assert full["text"].startswith(choice["text"])


async def test_logprobs_have_the_token_first_and_offsets_into_the_text(target: Target) -> None:
    choice = (await target.complete(logprobs=2)).json["choices"][0]
    logprobs = choice["logprobs"]
    assert list(logprobs) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    lengths = [len(token) for token in logprobs["tokens"]]
    assert logprobs["text_offset"] == [0, lengths[0], lengths[0] + lengths[1]]
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == value <= 0


async def test_echo_repeats_the_prompt(target: Target) -> None:
    plain = (await target.complete()).json["choices"][0]["text"]
    echo = (await target.complete(echo=True)).json["choices"][0]
    assert echo["text"] == "Once upon a time" + plain
    only = (await target.complete(echo=True, max_tokens=0)).json
    assert only["choices"][0]["text"] == "Once upon a time"
    assert only["usage"]["completion_tokens"] == 1


async def test_a_request_names_its_id(target: Target) -> None:
    body = (await target.complete(request_id="mine")).json
    assert body["id"] == "cmpl-mine"
    body = {"prompt": "Hi", "max_tokens": 1, "request_id": "mine"}
    headers = {"X-Request-Id": "theirs"}
    reply = await target.send("POST", "/v1/completions", body, headers=headers)
    assert reply.json["id"] == "cmpl-theirs"


async def test_an_incomplete_character_is_held_back_and_dropped_at_the_end(target: Target) -> None:
    tokenized = await target.send("POST", "/tokenize", {"prompt": "😀"})
    head = tokenized.json["tokens"][0]
    fields: dict[str, Any] = {"allowed_token_ids": [head], "max_tokens": 2}
    choice = (await target.complete(**fields, return_token_ids=True)).json["choices"][0]
    assert choice["token_ids"] == [head, head]
    chunks = (await target.complete(**fields, stream=True)).chunks
    # Whether the first of two heads becomes U+FFFD is the tokenizer's business; nothing more is.
    assert set("".join(chunk["choices"][0]["text"] for chunk in chunks)) <= {"\ufffd"}
    assert len(chunks) == 2


async def test_after_a_prompt_that_ends_inside_a_character_the_prompt_comes_back(
    target: Target,
) -> None:
    tokens = (await target.send("POST", "/tokenize", {"prompt": "Hi 😀"})).json["tokens"]
    fields = {"prompt": tokens[:-1], "allowed_token_ids": [tokens[-1]], "max_tokens": 1}
    chunks = (await target.complete(**fields, stream=True)).chunks
    assert chunks[0]["choices"][0]["text"] == "Hi 😀"


async def test_truncation_keeps_the_end_of_the_prompt(target: Target) -> None:
    fields = {"prompt": [5, 6, 7, 8], "truncate_prompt_tokens": 2, "return_token_ids": True}
    assert (await target.complete(**fields)).json["choices"][0]["prompt_token_ids"] == [7, 8]
    fields["truncation_side"] = "right"
    assert (await target.complete(**fields)).json["choices"][0]["prompt_token_ids"] == [5, 6]


@pytest.mark.parametrize(
    ("constraint", "allowed"),
    [({"choice": ["yes", "no"]}, {"yes", "no"}), ({"regex": "(north|south)"}, {"north", "south"})],
)
async def test_structured_outputs_constrain_the_text(
    target: Target, constraint: dict[str, Any], allowed: set[str]
) -> None:
    choice = (await target.complete(max_tokens=20, structured_outputs=constraint)).json["choices"]
    assert choice[0]["text"] in allowed
    assert choice[0]["finish_reason"] == "stop"


async def test_the_load_report_comes_as_a_header(target: Target) -> None:
    body = {"prompt": "Hi", "max_tokens": 1}
    headers = {"endpoint-load-metrics-format": "TEXT"}
    reply = await target.send("POST", "/v1/completions", body, headers=headers)
    report = reply.header("endpoint-load-metrics")
    assert report is not None
    assert report.startswith("TEXT named_metrics.num_requests_waiting=0.0, ")
