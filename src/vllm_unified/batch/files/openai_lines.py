"""OpenAI's batch format, as ``vllm run-batch`` reads and writes it.

A line of input is ``{"custom_id", "method", "url", "body"}``, a line of output ``{"id",
"custom_id", "response": {"status_code", "request_id", "body"}, "error"}``. Source: vLLM 0.32,
``entrypoints/launchers/run_batch.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_unified.errors import BadRequestError, VllmError
from vllm_unified.results import EmbeddingResult, GenerationResult
from vllm_unified.wire.requests import CHAT, COMPLETIONS, EMBEDDINGS

_SUBJECTS = {CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input"}
"""Addresses, and what each of their bodies must have."""


def is_openai_line(fields: Mapping[str, Any]) -> bool:
    """Whether it looks like a line of input."""
    return {"custom_id", "url", "body"} <= fields.keys()


def openai_item(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the request that a line asks for.

    Raises:
        BadRequestError: it is no line of input, or asks for something else.
    """
    if not isinstance(fields.get("custom_id"), str):
        raise BadRequestError("the line has no custom_id")
    if fields.get("method", "POST") != "POST":
        raise BadRequestError(f"the method must be POST, not {fields['method']!r}")
    url, body = fields.get("url"), fields.get("body")
    subject = _SUBJECTS.get(url) if isinstance(url, str) else None
    if subject is None:
        raise BadRequestError(f"the url must be one of {', '.join(_SUBJECTS)}, not {url!r}")
    if not isinstance(body, Mapping):
        raise BadRequestError("the body must be an object")
    if body.get("stream"):
        raise BadRequestError("a request of a batch cannot stream")
    if body.get(subject) is None:
        raise BadRequestError(f"the body for {url} has no {subject!r}")
    if url == EMBEDDINGS and body.get("encoding_format", "float") != "float":
        raise BadRequestError("the encoding_format of embeddings must be float")
    others = set(_SUBJECTS.values()) - {subject}
    return {name: value for name, value in body.items() if name not in others | {"stream"}}


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw | None


class _Line(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response
    error: Any


def openai_answer(custom_id: str, outcome: GenerationResult | EmbeddingResult | VllmError) -> bytes:
    """The line of output, with the server's own answer in it."""
    if isinstance(outcome, VllmError):
        request_id, status = outcome.request_id or "", outcome.status_code or 400
        error = {
            "message": outcome.message,
            "type": type(outcome).__name__,
            "param": None,
            "code": status,
        }
        line = _Line(
            _id(request_id), custom_id, _Response(status, request_id, None), {"error": error}
        )
    else:
        request_id = outcome.metadata.request_id
        body = msgspec.Raw(outcome.body)
        line = _Line(_id(request_id), custom_id, _Response(200, request_id, body), None)
    return msgspec.json.encode(line)


def _id(request_id: str) -> str:
    return f"batch_req_{request_id}"
