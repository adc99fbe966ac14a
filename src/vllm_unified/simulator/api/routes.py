"""Which path is answered by what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from vllm_unified.simulator.api import (
    chat,
    chat_batch,
    completions,
    dev,
    embeddings,
    instruments,
    lora,
    tokens,
)
from vllm_unified.simulator.config import SimulatorConfig
from vllm_unified.simulator.errors import ApiError
from vllm_unified.simulator.http import Exchange, Request
from vllm_unified.simulator.service import Service

Endpoint = Callable[[Service, Request, Exchange], Awaitable[None]]
Routes = dict[str, dict[str, Endpoint]]
"""By path, then by method."""

LOAD_AWARE = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
"""Paths whose requests ``/load`` counts."""


async def _disabled(service: Service, request: Request, exchange: Exchange) -> None:
    raise ApiError(
        "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to "
        "enable them.",
        status=403,
        type="PermissionDeniedError",
    )


_ALWAYS: Routes = {
    "/health": {"GET": instruments.health},
    "/ping": {"GET": instruments.health, "POST": instruments.health},
    "/version": {"GET": instruments.version},
    "/load": {"GET": instruments.load},
    "/kv_event_sources": {"GET": instruments.kv_event_sources},
    "/metrics": {"GET": instruments.metrics},
    "/v1/models": {"GET": instruments.models},
    "/tokenize": {"POST": tokens.tokenize},
    "/detokenize": {"POST": tokens.detokenize},
}
_GENERATE: Routes = {
    "/v1/completions": {"POST": completions.create},
    "/v1/chat/completions": {"POST": chat.create},
    "/v1/chat/completions/batch": {"POST": chat_batch.create},
    "/v1/completions/render": {"POST": _disabled},
    "/v1/chat/completions/render": {"POST": _disabled},
    "/inference/v1/generate": {"POST": _disabled},
}
_EMBED: Routes = {"/v1/embeddings": {"POST": embeddings.create}}
_LORA: Routes = {
    "/v1/load_lora_adapter": {"POST": lora.load},
    "/v1/unload_lora_adapter": {"POST": lora.unload},
    "/adapters": {"POST": lora.register},
    "/adapters/{adapter_name}": {"DELETE": lora.unregister},
}
_DEV: Routes = {
    "/sleep": {"POST": dev.sleep},
    "/wake_up": {"POST": dev.wake_up},
    "/is_sleeping": {"GET": dev.is_sleeping},
    "/pause": {"POST": dev.pause},
    "/resume": {"POST": dev.resume},
    "/is_paused": {"GET": dev.is_paused},
    "/abort_requests": {"POST": dev.abort_requests},
    "/reset_prefix_cache": {"POST": dev.reset_prefix_cache},
    "/reset_mm_cache": {"POST": dev.nothing},
    "/reset_encoder_cache": {"POST": dev.nothing},
    "/release_kv_cache_memory": {"POST": dev.release_kv_cache_memory},
    "/collective_rpc": {"POST": dev.collective_rpc},
    "/server_info": {"GET": dev.server_info},
}


def routes_of(config: SimulatorConfig) -> Routes:
    """The routes that a server with this configuration registers."""
    routes = dict(_ALWAYS)
    if "generate" in config.tasks:
        routes |= _GENERATE
    if "embed" in config.tasks:
        routes |= _EMBED
    if config.allow_runtime_lora:
        routes |= _LORA
    if config.dev_mode:
        routes |= _DEV
    return routes


def route_of(routes: Routes, path: str) -> str | None:
    """The route that a path belongs to; ``None`` if there is none."""
    if path in routes:
        return path
    if path.startswith("/adapters/") and "/adapters/{adapter_name}" in routes:
        return "/adapters/{adapter_name}"
    return None
