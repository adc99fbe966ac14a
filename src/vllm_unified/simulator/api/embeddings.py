"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import math
import random
import struct
import time
from collections.abc import Mapping
from typing import Any

from vllm_unified.simulator.api.messages import prompt_tokens
from vllm_unified.simulator.errors import ApiError, invalid
from vllm_unified.simulator.fields import (
    any_of,
    check_fields,
    integer,
    list_of,
    literal,
    message,
    text,
)
from vllm_unified.simulator.http import Exchange, Request
from vllm_unified.simulator.model import weights
from vllm_unified.simulator.sampling import check_length
from vllm_unified.simulator.service import Service, json_object, request_id, send_json
from vllm_unified.simulator.tokenizer import encode

_TOKEN = integer(0)
_FIELDS = {
    "model": text,
    "input": any_of(list_of(_TOKEN), list_of(list_of(_TOKEN)), text, list_of(text)),
    "messages": list_of(message),
    "encoding_format": literal("float", "base64", "bytes", "bytes_only"),
    "dimensions": integer(),
}


async def create(service: Service, request: Request, exchange: Exchange) -> None:
    """Unit vectors that depend on the tokens alone."""
    body = json_object(request)
    needed = () if "messages" in body else ("input",)
    body = check_fields(body, _FIELDS, required=needed)
    service.models.find(body.get("model"))
    service.engine.check(1)
    if body.get("dimensions") is not None:
        raise invalid(
            f'Model "{service.config.model}" does not support matryoshka representation, '
            "changing output dimensions will lead to poor results.",
            "dimensions",
        )
    inputs = _inputs(service, body)
    prompt = sum(map(len, inputs))
    payload = {
        "id": f"embd-{request_id(request, body)}",
        "object": "list",
        "created": int(time.time()),
        "model": service.config.names[0],
        "data": [_item(service, body, index, tokens) for index, tokens in enumerate(inputs)],
        "usage": {
            "prompt_tokens": prompt,
            "total_tokens": prompt,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
    }
    await send_json(exchange, payload)


def _inputs(service: Service, body: Mapping[str, Any]) -> list[list[int]]:
    limit = service.config.max_model_len
    if "messages" in body:
        chat = {"add_generation_prompt": False, **body}
        inputs = [prompt_tokens(chat, body["messages"], service.config.names[0])]
    else:
        given = body["input"]
        if given == []:
            raise ApiError("You must pass at least one prompt")
        single = isinstance(given, str) or isinstance(given[0], int)
        items = [given] if single else given
        inputs = [encode(item) if isinstance(item, str) else item for item in items]
    for tokens in inputs:
        check_length(len(tokens), limit, from_text=False)
        if not tokens:
            raise ApiError("The decoder prompt cannot be empty")
    return inputs


def _item(
    service: Service, body: Mapping[str, Any], index: int, tokens: list[int]
) -> dict[str, Any]:
    vector = embedding(tokens, service.config.embedding_size, weights(service.config.model))
    value: list[float] | str = vector
    if body.get("encoding_format") == "base64":
        value = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return {"index": index, "object": "embedding", "embedding": value}


def embedding(tokens: list[int], size: int, salt: int) -> list[float]:
    """A unit vector; texts that share tokens point in like directions."""
    total = [0.0] * size
    for token in tokens:
        source = random.Random(salt ^ token * 0x9E3779B1)
        for index in range(size):
            total[index] += source.uniform(-1.0, 1.0)
    length = math.sqrt(sum(value * value for value in total)) or 1.0
    return [value / length for value in total]
