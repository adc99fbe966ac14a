"""One running server's state, which every endpoint works on."""

from __future__ import annotations

import secrets
import time
import zlib
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from vllm_unified.simulator.adapters import Models
from vllm_unified.simulator.config import VERSION, SimulatorConfig
from vllm_unified.simulator.engine import Engine
from vllm_unified.simulator.errors import ApiError, validation_error
from vllm_unified.simulator.fields import check_object, parse_body
from vllm_unified.simulator.http import Exchange, Header, Request
from vllm_unified.simulator.metrics import HttpMetrics

JSON_TYPE: Header = ("content-type", "application/json")
STREAM_TYPE: Header = ("content-type", "text/event-stream; charset=utf-8")
encode_json = msgspec.json.Encoder().encode
"""Compact JSON with characters as they are, as Starlette and pydantic write it."""


class Service:
    """Config, engine, models and counters of one server."""

    def __init__(self, config: SimulatorConfig) -> None:
        self.config = config
        self.engine = Engine(config)
        self.models = Models(config)
        self.http = HttpMetrics()
        self.started = time.time()
        """Seconds since the epoch."""
        self.load = 0
        """Requests that ``/load`` reports."""
        fingerprint = zlib.crc32(msgspec.json.encode(config.model))
        self.system_fingerprint = f"vllm-{VERSION}-{fingerprint:08x}"


def random_id() -> str:
    """Sixteen hexadecimal digits, as vLLM's ``random_uuid``."""
    return secrets.token_hex(8)


async def send_json(
    exchange: Exchange, payload: Any, status: int = 200, headers: Sequence[Header] = ()
) -> None:
    """Send a JSON answer."""
    await exchange.respond(status, encode_json(payload), [*headers, JSON_TYPE])


async def send_error(exchange: Exchange, error: ApiError) -> None:
    """Send an error as a whole answer."""
    await send_json(exchange, error.body(), error.status)


async def send_detail(exchange: Exchange, status: HTTPStatus, headers: Sequence[Header]) -> None:
    """Send one of the framework's own errors."""
    await send_json(exchange, {"detail": status.phrase}, status, headers)


def json_object(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        ApiError: another content type, malformed JSON, or no object.
    """
    content_type = request.headers.get("content-type", "").lower().partition(";")[0]
    if content_type != "application/json":
        raise validation_error(["Unsupported Media Type: Only 'application/json' is allowed"])
    return check_object(parse_body(request.body))


def usage(
    prompt: int, completion: int, cached: int | None = None, *, details: bool = True
) -> dict[str, Any]:
    """The ``usage`` of an answer, in tokens.

    Args:
        prompt: tokens of the prompts.
        completion: tokens generated.
        cached: prompt tokens that were cached, if the server tells.
        details: whether the two detail fields are there, ``null`` or not.
    """
    result: dict[str, Any] = {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
    }
    if cached is not None:
        result["prompt_tokens_details"] = {
            "cached_tokens": cached,
            "created_cache_tokens": None,
            "multimodal_tokens": None,
        }
    if details:
        result.setdefault("prompt_tokens_details", None)
        result["completion_tokens_details"] = None
    return result


def request_id(request: Request, body: Mapping[str, Any]) -> str:
    """The caller's request id, from header or body, or a new one."""
    return request.headers.get("x-request-id") or body.get("request_id") or random_id()


def load_header(service: Service, request: Request) -> list[Header]:
    """The ORCA load report, if the request asks for it."""
    form = request.headers.get("endpoint-load-metrics-format", "").lower()
    engine = service.engine
    report = {
        "num_requests_waiting": float(engine.waiting),
        "kv_cache_usage_perc": float(engine.cache.usage),
    }
    if form == "text":
        pairs = ", ".join(f"named_metrics.{name}={value}" for name, value in report.items())
        return [("endpoint-load-metrics", f"TEXT {pairs}")]
    if form == "json":
        pairs = ", ".join(f'"{name}": {value}' for name, value in report.items())
        return [("endpoint-load-metrics", f'JSON {{"named_metrics": {{{pairs}}}}}')]
    return []
