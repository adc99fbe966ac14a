"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from vllm_unified.simulator.api.messages import (
    check_generation_prompt,
    check_template,
    prompt_tokens,
)
from vllm_unified.simulator.errors import ApiError, validation_error
from vllm_unified.simulator.fields import (
    INT64,
    boolean,
    check_fields,
    integer,
    list_of,
    message,
    text,
)
from vllm_unified.simulator.http import Exchange, Request
from vllm_unified.simulator.service import Service, json_object, send_json
from vllm_unified.simulator.tokenizer import decode, encode, token_strings

_SHARED = {"model": text, "add_special_tokens": boolean, "return_token_strs": boolean}
_PROMPT_FIELDS = {**_SHARED, "prompt": text}
_CHAT_FIELDS = {**_SHARED, "messages": list_of(message), "add_generation_prompt": boolean}
_DETOKENIZE_FIELDS = {"model": text, "tokens": list_of(integer(0, INT64 - 1))}


async def tokenize(service: Service, request: Request, exchange: Exchange) -> None:
    """Token ids of a prompt or of a conversation."""
    body = json_object(request)
    tokens = _chat_tokens(service, body) if _is_chat(body) else _prompt_tokens(service, body)
    payload = {
        "count": len(tokens),
        "max_model_len": service.config.max_model_len,
        "tokens": tokens,
        "token_strs": token_strings(tokens) if body.get("return_token_strs") else None,
    }
    await send_json(exchange, payload)


async def detokenize(service: Service, request: Request, exchange: Exchange) -> None:
    """Text of token ids; ids outside the vocabulary have none."""
    body = check_fields(json_object(request), _DETOKENIZE_FIELDS, required=("tokens",))
    service.models.find(body.get("model"))
    await send_json(exchange, {"prompt": decode(body["tokens"])})


def _is_chat(body: dict[str, Any]) -> bool:
    if "prompt" not in body and "messages" not in body:
        raise _missing_both(body)
    return "prompt" not in body


def _prompt_tokens(service: Service, body: dict[str, Any]) -> list[int]:
    body = check_fields(body, _PROMPT_FIELDS, required=("prompt",))
    service.models.find(body.get("model"))
    tokens = encode(body["prompt"])
    if not tokens:
        raise ApiError("The decoder prompt cannot be empty")
    return tokens


def _chat_tokens(service: Service, body: dict[str, Any]) -> list[int]:
    check_generation_prompt(body)
    body = check_fields(body, _CHAT_FIELDS, required=("messages",))
    service.models.find(body.get("model"))
    check_template(body)
    return prompt_tokens(body, body["messages"], service.config.names[0])


def _missing_both(body: dict[str, Any]) -> ApiError:
    errors = [
        {"type": "missing", "loc": f"body.{name}", "msg": "Field required", "input": body}
        for name in ("prompt", "messages")
    ]
    return validation_error(errors)
