"""The server itself: models, tokens, health, metrics, adapters, sleep, cancellation, admission."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.contract.wire import Target


async def test_models_lists_the_base_model(target: Target) -> None:
    body = (await target.send("GET", "/v1/models")).json
    card = body["data"][0]
    assert body["object"] == "list"
    assert list(card) == [
        *("id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"),
    ]
    assert (card["id"], card["owned_by"], card["parent"]) == (target.model, "vllm", None)
    assert card["max_model_len"] == 2048
    assert card["permission"][0]["id"].startswith("modelperm-")


async def test_tokens_are_reversible(target: Target) -> None:
    text = "Hi there, 你好 😀!\n"
    body = (
        await target.send("POST", "/tokenize", {"prompt": text, "return_token_strs": True})
    ).json
    assert list(body) == ["count", "max_model_len", "tokens", "token_strs"]
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) > 8
    back = await target.send("POST", "/detokenize", {"tokens": body["tokens"]})
    assert back.json == {"prompt": text}


async def test_a_conversation_can_be_tokenized_as_the_chat_would(target: Target) -> None:
    messages = [{"role": "user", "content": "Say hi"}]
    tokens = (await target.send("POST", "/tokenize", {"messages": messages})).json["tokens"]
    chat = await target.chat(return_token_ids=True)
    assert tokens == chat.json["prompt_token_ids"]


async def test_tokenize_and_detokenize_refuse(target: Target) -> None:
    neither = (await target.send("POST", "/tokenize", {})).json["error"]
    assert neither["message"].startswith("2 validation errors:\n  {'type': 'missing', ")
    negative = (await target.send("POST", "/detokenize", {"tokens": [-1]})).json["error"]
    assert negative["param"] == "body.tokens.0"
    unknown = await target.send("POST", "/detokenize", {"tokens": [99999999]})
    assert unknown.json == {"prompt": ""}


async def test_health_is_empty_and_version_is_json(target: Target) -> None:
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        reply = await target.send(method, path)
        assert (reply.status, reply.body) == (200, b"")
        assert reply.header("content-type") is None
    assert (await target.send("GET", "/version")).json == {"version": "0.32.0"}
    assert (await target.send("GET", "/load")).json == {"server_load": 0}


async def test_metrics_count_what_was_served(target: Target) -> None:
    before = await target.metrics()
    body = (await target.complete(max_tokens=5, ignore_eos=True)).json
    after = await target.metrics()

    def grown(name: str, *labels: str) -> float:
        matching = [key for key in after if key.partition("{")[0] == name]
        matching = [key for key in matching if all(label in key for label in labels)]
        assert matching, name
        return sum(after[key] - before.get(key, 0.0) for key in matching)

    assert grown("vllm:prompt_tokens_total") == body["usage"]["prompt_tokens"]
    assert grown("vllm:generation_tokens_total") == 5
    assert grown("vllm:request_success_total", 'finished_reason="length"') == 1
    assert grown("vllm:request_success_total") == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert grown(f"vllm:{name}_seconds_count") == 1, name
    assert grown("vllm:inter_token_latency_seconds_count") == 4
    labels = ('handler="/v1/completions"', 'method="POST"', 'status="2xx"')
    assert grown("http_requests_total", *labels) == 1
    assert grown("http_request_duration_seconds_count", *labels[:2]) == 1


NAMES = (
    *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason"),
    *("engine_sleep_state", "kv_cache_usage_perc", "prefix_cache_queries_total"),
    *("prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total"),
    *("prompt_tokens_by_source_total", "prompt_tokens_cached_total", "generation_tokens_total"),
    *("request_success_total", "admission_rejections_total", "cache_config_info"),
    *("iteration_tokens_total_bucket", "request_prompt_tokens_bucket"),
    *("request_generation_tokens_sum", "request_params_n_count", "request_params_max_tokens_sum"),
    *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"),
    *("request_time_per_output_token_seconds_count", "e2e_request_latency_seconds_sum"),
    *("request_queue_time_seconds_sum", "request_prefill_time_seconds_sum"),
    *("request_decode_time_seconds_sum", "request_inference_time_seconds_sum"),
    *("request_num_preemptions_count", "request_prefill_kv_computed_tokens_sum"),
)


async def test_metrics_have_the_names_and_labels(target: Target) -> None:
    reply = await target.send("GET", "/metrics")
    assert reply.header("content-type") == "text/plain; version=1.0.0; charset=utf-8"
    samples = await target.metrics()
    names = {sample.partition("{")[0] for sample in samples}
    assert {f"vllm:{name}" for name in NAMES} <= names
    assert "process_start_time_seconds" in names
    assert f'vllm:num_requests_running{{engine="0",model_name="{target.model}"}}' in samples
    reasons = [key for key in samples if key.startswith("vllm:request_success_total")]
    assert [key.split('finished_reason="')[1].split('"')[0] for key in reasons] == [
        *("stop", "length", "abort", "error", "repetition"),
    ]


async def test_a_prefix_that_was_seen_is_found_again(target: Target) -> None:
    await target.send("POST", "/reset_prefix_cache")
    prompt = [7 + index % 40 for index in range(300)]
    before = await target.sample("vllm:prefix_cache_hits_total")
    await target.complete(prompt=prompt, max_tokens=1)
    first = await target.sample("vllm:prefix_cache_hits_total")
    await target.complete(prompt=prompt, max_tokens=1)
    second = await target.sample("vllm:prefix_cache_hits_total")
    assert first == before
    assert second == before + 256, "two blocks of 128 tokens"


async def test_an_adapter_lives_and_dies(target: Target) -> None:
    load = {"lora_name": "tuned", "lora_path": target.adapter}
    loaded = await target.send("POST", "/v1/load_lora_adapter", load)
    assert (loaded.status, loaded.text) == (
        200,
        "Success: LoRA adapter 'tuned' added successfully.",
    )
    assert loaded.header("content-type") is None
    again = await target.send("POST", "/v1/load_lora_adapter", load)
    assert again.json["error"]["type"] == "InvalidUserInput"
    assert again.json["error"]["message"] == (
        "The lora adapter 'tuned' has already been loaded. If you want to load the adapter in "
        "place, set 'load_inplace' to True."
    )
    in_place = await target.send("POST", "/v1/load_lora_adapter", load | {"load_inplace": True})
    assert in_place.status == 200
    card = (await target.send("GET", "/v1/models")).json["data"][1]
    assert (card["id"], card["root"], card["parent"]) == ("tuned", target.adapter, target.model)
    assert card["max_model_len"] is None
    answer = (await target.complete(model="tuned")).json
    assert answer["model"] == "tuned"
    unload = {"lora_name": "tuned"}
    gone = await target.send("POST", "/v1/unload_lora_adapter", unload)
    assert (gone.status, gone.text) == (
        200,
        "Success: LoRA adapter 'tuned' removed successfully.",
    )
    missing = await target.send("POST", "/v1/unload_lora_adapter", unload)
    assert missing.status == 404
    assert missing.json["error"]["message"] == "The lora adapter 'tuned' cannot be found."
    assert (await target.complete(model="tuned")).status == 404


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"lora_name": "", "lora_path": ""}, 400, "Both 'lora_name' and 'lora_path' must be"),
        ({"lora_name": "contract", "lora_path": "x"}, 400, "The lora adapter 'contract' conflicts"),
        ({"lora_name": "x"}, 400, "1 validation error:\n  {'type': 'missing', 'loc': 'body.lora_"),
        (
            {"lora_name": "x", "lora_path": "/opt/nonexistent/adapter"},
            404,
            "Loading lora x failed: No adapter found for <path>",
        ),
    ],
)
async def test_an_adapter_is_refused(
    target: Target, body: dict[str, Any], status: int, message: str
) -> None:
    reply = await target.send("POST", "/v1/load_lora_adapter", body)
    assert reply.status == status
    assert reply.json["error"]["message"].startswith(message)


async def test_a_paused_engine_takes_requests_and_holds_them(target: Target) -> None:
    assert (await target.send("POST", "/pause")).json == {"status": "paused"}
    try:
        assert (await target.send("GET", "/is_paused")).json == {"is_paused": True}
        assert (await target.send("GET", "/is_sleeping")).json == {"is_sleeping": True}
        assert (await target.send("GET", "/health")).status == 200
        held = asyncio.create_task(target.complete())
        done, _ = await asyncio.wait({held}, timeout=0.3)
        assert not done
    finally:
        assert (await target.send("POST", "/resume")).json == {"status": "resumed"}
    assert (await held).status == 200


async def test_sleep_and_wake_up_tell_their_state(target: Target) -> None:
    sleeping = await target.send("POST", "/sleep?level=1")
    assert sleeping.json == {"status": "sleeping", "level": 1}
    partly = await target.send("POST", "/wake_up?tags=weights")
    assert partly.json == {"status": "sleeping", "tags": ["weights"]}
    awake = await target.send("POST", "/wake_up")
    assert awake.json == {"status": "awake", "tags": None}
    assert (await target.send("GET", "/is_sleeping")).json == {"is_sleeping": False}
    bad = await target.send("POST", "/sleep?level=5")
    assert bad.json["error"]["param"] == "query.level"


async def test_pausing_aborts_what_runs(target: Target) -> None:
    body = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    async with target.open("POST", "/v1/completions", body) as response:
        await response.content.readuntil(b"\n\n")
        await target.send("POST", "/pause?mode=abort")
        rest = await response.read()
    await target.send("POST", "/resume")
    assert b'"finish_reason":"abort"' in rest
    assert rest.endswith(b"data: [DONE]\n\n")


CONFIGURED = (
    ("model_config", "dtype", "torch.bfloat16"),
    ("model_config", "quantization", None),
    ("model_config", "multimodal_config", None),
    ("cache_config", "cache_dtype", "auto"),
    ("cache_config", "gpu_memory_utilization", 0.92),
    ("cache_config", "enable_prefix_caching", True),
    ("cache_config", "kv_cache_size_tokens", 46592),
    ("parallel_config", "tensor_parallel_size", 1),
    ("parallel_config", "pipeline_parallel_size", 1),
    ("parallel_config", "data_parallel_size", 1),
    ("device_config", "device", "cpu"),
    ("lora_config", "max_loras", 2),
)


async def test_the_metrics_tell_the_cache_and_the_adapters(target: Target) -> None:
    page = (await target.send("GET", "/metrics")).text
    [cache] = [line for line in page.splitlines() if line.startswith("vllm:cache_config_info{")]
    for label in (
        *('block_size="128"', 'num_gpu_blocks="364"', 'kv_cache_size_tokens="46592"'),
        *('gpu_memory_utilization="0.92"', 'cache_dtype="auto"', 'enable_prefix_caching="True"'),
    ):
        assert label in cache
    adapters = [line for line in page.splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert adapters
    assert all('max_lora="2"' in line for line in adapters)


async def test_server_info_tells_the_configuration(target: Target) -> None:
    info = (await target.send("GET", "/server_info?config_format=json")).json
    assert list(info) == ["vllm_config", "vllm_env", "system_env"]
    assert info["vllm_config"]["model_config"]["max_model_len"] == 2048
    assert info["vllm_config"]["cache_config"]["block_size"] == 128
    for section, name, expected in CONFIGURED:
        assert info["vllm_config"][section][name] == expected, name
    assert info["vllm_config"]["model_config"]["served_model_name"] == target.model
    text = (await target.send("GET", "/server_info")).json["vllm_config"]
    assert "max_seq_len=2048" in text
    bad = await target.send("GET", "/server_info?config_format=xml")
    assert bad.json["error"]["param"] == "query.config_format"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_aborts_its_request(target: Target, stream: bool) -> None:
    before = await target.sample("vllm:request_success_total")
    body = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": stream}
    if stream:
        async with target.open("POST", "/v1/completions", body) as response:
            await response.content.readuntil(b"\n\n")
    else:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(target.send("POST", "/v1/completions", body), 0.3)
    async with asyncio.timeout(30):
        # The page is all there is to watch; the timeout bounds the number of looks.
        while await target.sample("vllm:num_requests_running") > 0:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    produced = await target.sample("vllm:generation_tokens_total")
    await target.complete(ignore_eos=True)
    assert await target.sample("vllm:generation_tokens_total") == produced + 3
    # Nobody counts the request that was left: the engine reports only aborts of its own.
    assert await target.sample("vllm:request_success_total") == before + 1


async def test_a_full_queue_is_a_503_before_any_answer(target: Target) -> None:
    body = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    url = target.busy_url
    async with (
        target.open("POST", "/v1/completions", body, url=url) as one,
        target.open("POST", "/v1/completions", body, url=url) as two,
    ):
        await one.content.readuntil(b"\n\n")
        await two.content.readuntil(b"\n\n")
        refused = await target.send("POST", "/v1/completions", body, url=url)
        several = await target.send("POST", "/v1/chat/completions", CHAT | {"n": 3}, url=url)
        metrics = (await target.send("GET", "/metrics", url=url)).text
    for reply in (refused, several):
        assert reply.status == 503
        assert reply.header("retry-after") is None
        message = (
            "The engine is currently busy and cannot accept new requests. "
            "Please try again later or on a different instance."
        )
        expected = {"type": "Service Unavailable", "param": None, "code": 503}
        assert reply.json == {"error": {"message": message, **expected}}
    counted = [line for line in metrics.splitlines() if line.startswith("vllm:admission_rejec")]
    assert any('reason="max_num_queued_reqs"} 2.0' in line for line in counted)


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Say hi"}]}
