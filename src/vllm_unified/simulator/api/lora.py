"""LoRA adapters: /v1/load_lora_adapter, /v1/unload_lora_adapter and their SageMaker twins."""

from __future__ import annotations

from vllm_unified.simulator.fields import boolean, check_fields, text
from vllm_unified.simulator.http import Exchange, Request
from vllm_unified.simulator.service import Service, json_object

_LOAD = {
    "lora_name": text,
    "lora_path": text,
    "load_inplace": boolean,
    "is_3d_lora_weight": boolean,
}
_UNLOAD = {"lora_name": text}


async def load(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /v1/load_lora_adapter; success is plain text without a content type."""
    body = check_fields(json_object(request), _LOAD, required=("lora_name", "lora_path"))
    in_place = bool(body.get("load_inplace"))
    words = service.models.load(body["lora_name"], body["lora_path"], in_place=in_place)
    await exchange.respond(200, words.encode())


async def unload(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /v1/unload_lora_adapter."""
    body = check_fields(json_object(request), _UNLOAD, required=("lora_name",))
    await exchange.respond(200, service.models.unload(body["lora_name"]).encode())


async def register(service: Service, request: Request, exchange: Exchange) -> None:
    """POST /adapters, which no API key guards."""
    body = json_object(request)
    renamed = {"lora_name": body.get("name"), "lora_path": body.get("src")}
    body = check_fields(renamed, _LOAD, required=("lora_name", "lora_path"))
    service.models.load(body["lora_name"], body["lora_path"], in_place=False)
    await exchange.respond(200, f"Adapter {body['lora_name']} registered".encode())


async def unregister(service: Service, request: Request, exchange: Exchange) -> None:
    """DELETE /adapters/{name}, which no API key guards."""
    name = request.path.removeprefix("/adapters/")
    service.models.unload(name)
    await exchange.respond(200, f"Adapter {name} unregistered".encode())
