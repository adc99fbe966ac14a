"""What is asked about the server itself: health, version, load, models, metrics."""

from __future__ import annotations

import time
from typing import Any

from vllm_unified.simulator.config import VERSION
from vllm_unified.simulator.exposition import CONTENT_TYPE, render
from vllm_unified.simulator.http import Exchange, Request
from vllm_unified.simulator.service import Service, random_id, send_json


async def health(service: Service, request: Request, exchange: Exchange) -> None:
    """GET /health and /ping: 200 as long as the engine's process lives, even if it hangs."""
    await exchange.respond(503 if service.engine.dead else 200)


async def version(service: Service, request: Request, exchange: Exchange) -> None:
    """GET /version."""
    await send_json(exchange, {"version": VERSION})


async def load(service: Service, request: Request, exchange: Exchange) -> None:
    """GET /load: requests under way, if the server counts them."""
    counted = service.load if service.config.enable_server_load_tracking else 0
    await send_json(exchange, {"server_load": counted})


async def kv_event_sources(service: Service, request: Request, exchange: Exchange) -> None:
    """GET /kv_event_sources: none here."""
    await send_json(exchange, {})


async def metrics(service: Service, request: Request, exchange: Exchange) -> None:
    """GET /metrics."""
    page = render(service.engine, service.http, service.started)
    await exchange.respond(200, page.encode(), [("content-type", CONTENT_TYPE)])


async def models(service: Service, request: Request, exchange: Exchange) -> None:
    """GET /v1/models: the base model under each of its names, then the adapters."""
    config = service.config
    cards = [_card(name, config.model, None, config.max_model_len) for name in config.names]
    cards += [
        _card(adapter.name, adapter.path, config.names[0], None)
        for adapter in service.models.adapters.values()
    ]
    await send_json(exchange, {"object": "list", "data": cards})


def _card(name: str, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
    now = int(time.time())
    permission = {
        "id": f"modelperm-{random_id()}",
        "object": "model_permission",
        "created": now,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": now,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
    }
