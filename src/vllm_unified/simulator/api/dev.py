"""The routes of ``VLLM_SERVER_DEV_MODE``: sleep, pause, abort, caches, server_info."""

from __future__ import annotations

import json
from typing import Any

from vllm_unified.simulator.errors import ApiError
from vllm_unified.simulator.fields import Check, boolean, check_fields, integer, literal
from vllm_unified.simulator.http import Exchange, Request
from vllm_unified.simulator.service import Service, send_json

_MODE = literal("abort", "wait", "keep")
_TAGS = ("weights", "kv_cache", "scheduling")


def _query(request: Request, **fields: Check) -> dict[str, Any]:
    return check_fields(dict(request.query), fields, prefix="query")


async def sleep(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /sleep?level=0|1|2&mode=abort|wait|keep."""
    query = _query(request, level=integer(0, 2), mode=_MODE)
    level = query.get("level", 1)
    service.engine.sleep(level, query.get("mode", "abort"))
    await send_json(exchange, {"status": "sleeping", "level": level})


async def wake_up(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /wake_up?tags=...; with some of the tags it stays asleep."""
    tags = [value for name, value in request.query if name == "tags"] or None
    if tags is None or set(tags) >= set(_TAGS):
        service.engine.resume()
    status = "sleeping" if service.engine.paused else "awake"
    await send_json(exchange, {"status": status, "tags": tags})


async def is_sleeping(service: Service, request: Request, exchange: Exchange) -> None:
    """GET /is_sleeping: true as well for an engine that is only paused."""
    await send_json(exchange, {"is_sleeping": service.engine.paused})


async def pause(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /pause?mode=abort|wait|keep."""
    query = _query(request, mode=_MODE, clear_cache=boolean)
    service.engine.pause(query.get("mode", "abort"))
    await send_json(exchange, {"status": "paused"})


async def resume(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /resume."""
    service.engine.resume()
    await send_json(exchange, {"status": "resumed"})


async def is_paused(service: Service, request: Request, exchange: Exchange) -> None:
    """GET /is_paused: true for a sleeping engine as well."""
    await send_json(exchange, {"is_paused": service.engine.paused})


async def abort_requests(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /abort_requests {request_ids}: all of them without ids.

    The number in the answer is that of the ids sent, known or not.
    """
    body = _plain_object(request, "Invalid JSON format")
    ids = body.get("request_ids")
    hit = service.engine.abort(ids or None)
    await send_json(exchange, {"status": "aborted", "aborted": len(ids) if ids else hit})


async def reset_prefix_cache(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /reset_prefix_cache: 200 with false while blocks are in use."""
    _query(request, reset_running_requests=boolean, reset_external=boolean)
    await send_json(exchange, {"success": service.engine.cache.reset()})


async def nothing(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /reset_mm_cache and /reset_encoder_cache."""
    await exchange.respond(200)


async def release_kv_cache_memory(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /release_kv_cache_memory."""
    await send_json(exchange, {"status": "kv_cache_released"})


async def collective_rpc(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /collective_rpc: the one worker returns nothing."""
    body = _plain_object(request, "JSON decode error")
    if body.get("method") is None:
        raise ApiError("Missing 'method' in request body", type="Bad Request")
    await send_json(exchange, {"results": [None]})


async def server_info(service: Service, request: Request, exchange: Exchange) -> None:
    """GET /server_info?config_format=text|json."""
    query = _query(request, config_format=literal("text", "json"))
    as_json = query.get("config_format") == "json"
    config = _config(service) if as_json else _config_text(service)
    await send_json(exchange, {"vllm_config": config, "vllm_env": {}, "system_env": {}})


def _plain_object(request: Request, complaint: str) -> dict[str, Any]:
    try:
        body = json.loads(request.body)
    except ValueError:
        raise ApiError(complaint, type="Bad Request") from None
    if not isinstance(body, dict):
        raise ApiError("Request body must be a JSON object", type="Bad Request")
    return body


def _config(service: Service) -> dict[str, Any]:
    config = service.config
    lora = {"max_loras": config.max_loras, "max_lora_rank": 16} if config.enable_lora else None
    return {
        "model_config": {
            "model": config.model,
            "served_model_name": config.names[0],
            "dtype": "torch.bfloat16",
            "seed": config.seed,
            "max_model_len": config.max_model_len,
            "quantization": None,
            "quantization_config": None,
            "enforce_eager": True,
            "max_logprobs": config.max_logprobs,
            "multimodal_config": None,
        },
        "cache_config": {
            "block_size": config.block_size,
            "gpu_memory_utilization": 0.92,
            "cache_dtype": "auto",
            "num_gpu_blocks": config.num_blocks,
            "kv_cache_size_tokens": config.num_blocks * config.block_size,
            "enable_prefix_caching": config.enable_prefix_caching,
        },
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "tensor_parallel_size": 1,
            "data_parallel_size": 1,
            "world_size": 1,
        },
        "scheduler_config": {
            "max_num_seqs": config.max_num_seqs,
            "max_num_queued_reqs": config.max_num_queued_reqs,
            "max_num_queued_tokens": config.max_num_queued_tokens,
            "policy": config.scheduling_policy,
        },
        "device_config": {"device": "cpu"},
        "lora_config": lora,
    }


def _config_text(service: Service) -> str:
    config = service.config
    return (
        f"model='{config.model}', speculative_config=None, tokenizer='{config.model}', "
        f"dtype=torch.bfloat16, max_seq_len={config.max_model_len}, tensor_parallel_size=1, "
        f"pipeline_parallel_size=1, data_parallel_size=1, quantization=None, "
        f"enforce_eager=True, kv_cache_dtype=auto, device_config=cpu, seed={config.seed}, "
        f"served_model_name={config.names[0]}, "
        f"enable_prefix_caching={config.enable_prefix_caching}"
    )
