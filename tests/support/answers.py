"""What a vLLM 0.32 says, word for word, and HTTP around it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

MODEL = "SmolLM2"
BUSY = (
    "The engine is currently busy and cannot accept new requests. "
    "Please try again later or on a different instance."
)
ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
CONTEXT_LENGTH = (
    "This model's maximum context length is 2048 tokens. However, you requested 0 output tokens "
    "and your prompt contains at least 2049 input tokens, for a total of at least 2049 tokens. "
    "Please reduce the length of the input prompt or the number of requested output tokens."
)
UNKNOWN_MODEL = "The model `nope` does not exist."


def response(
    body: bytes | str | Mapping[str, Any] = b"",
    *,
    status: str = "200 OK",
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A whole answer with its length."""
    if isinstance(body, Mapping):
        body = json.dumps(body)
    if isinstance(body, str):
        body = body.encode()
    head = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
    return _head(status, head) + body


def _head(status: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def error(
    status: str,
    message: str,
    *,
    kind: str = "BadRequestError",
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """An error answer in vLLM's usual shape."""
    code = int(status.split()[0])
    return response(
        {"error": error_body(message, kind, param, code)}, status=status, headers=headers
    )


def error_body(
    message: str, kind: str = "InternalServerError", param: str | None = None, code: int = 500
) -> dict[str, Any]:
    """The value of ``"error"``."""
    return {"message": message, "type": kind, "param": param, "code": code}


BUSY_ANSWER = error("503 Service Unavailable", BUSY, kind="Service Unavailable")


def usage(prompt: int = 5, completion: int = 2) -> dict[str, Any]:
    """The token counts of an answer."""
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": None,
    }


def completion_body(*texts: str, finish_reason: str = "stop", **fields: Any) -> dict[str, Any]:
    """The body of a completion; one choice for each text."""
    return {
        "id": "cmpl-1b2f",
        "object": "text_completion",
        "created": 1780000000,
        "model": MODEL,
        "choices": [
            {
                "index": index,
                "text": text,
                "logprobs": None,
                "finish_reason": finish_reason,
                "stop_reason": None,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
            }
            for index, text in enumerate(texts)
        ],
        "service_tier": None,
        "system_fingerprint": "vllm-0.32.0-1234abcd",
        "usage": usage(),
        "kv_transfer_params": None,
        **fields,
    }


def completion(*texts: str, **fields: Any) -> bytes:
    """A completion as a whole answer."""
    return response(completion_body(*texts, **fields))


def chat_body(
    content: str | None, *, finish_reason: str = "stop", **message: Any
) -> dict[str, Any]:
    """The body of a chat completion; ``message`` has more of the message's fields."""
    return {
        "id": "chatcmpl-1b2f",
        "object": "chat.completion",
        "created": 1780000000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": content,
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "tool_calls": [],
                    "reasoning": None,
                    **message,
                },
                "logprobs": None,
                "finish_reason": finish_reason,
                "stop_reason": None,
                "token_ids": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": "vllm-0.32.0-1234abcd",
        "usage": usage(),
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "kv_transfer_params": None,
    }


def chat(content: str | None, **message: Any) -> bytes:
    """A chat completion as a whole answer."""
    return response(chat_body(content, **message))


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"
"""The end of a chunked body."""


def chunked(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(data: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def text_event(
    text: str, *, index: int = 0, finish_reason: str | None = None, **choice: Any
) -> bytes:
    """An event of a completion's stream."""
    return event(
        {
            "id": "cmpl-1b2f",
            "object": "text_completion",
            "created": 1780000000,
            "model": MODEL,
            "choices": [
                {
                    "index": index,
                    "text": text,
                    "logprobs": None,
                    "finish_reason": finish_reason,
                    "stop_reason": None,
                    **choice,
                }
            ],
        }
    )


def delta_event(
    delta: Mapping[str, Any], *, index: int = 0, finish_reason: str | None = None, **choice: Any
) -> bytes:
    """An event of a chat's stream."""
    return event(
        {
            "id": "chatcmpl-1b2f",
            "object": "chat.completion.chunk",
            "created": 1780000000,
            "model": MODEL,
            "choices": [
                {
                    "index": index,
                    "delta": delta,
                    "logprobs": None,
                    "finish_reason": finish_reason,
                    **choice,
                }
            ],
        }
    )


ROLE_EVENT = delta_event({"role": "assistant", "content": ""})


def usage_event(prompt: int = 5, completion: int = 2) -> bytes:
    """The event that ``include_usage`` adds."""
    return event(
        {
            "id": "cmpl-1b2f",
            "object": "text_completion",
            "created": 1780000000,
            "model": MODEL,
            "choices": [],
            "usage": usage(prompt, completion),
        }
    )


def error_event(
    message: str = ENGINE_DEAD, *, kind: str = "InternalServerError", code: int = 500
) -> bytes:
    """The error frame that vLLM sends inside a 200."""
    return event({"error": error_body(message, kind, None, code)})


def events(*frames: bytes) -> list[bytes]:
    """A stream of these events, each in a packet of its own, that ends as vLLM ends one."""
    return [STREAM_HEAD, *map(chunked, frames), chunked(DONE) + END]


def texts(pieces: Iterable[str]) -> list[bytes]:
    """The stream of a completion in these pieces."""
    *first, last = pieces
    frames = [text_event(piece) for piece in first]
    return events(*frames, text_event(last, finish_reason="stop"), usage_event())


def sse(*frames: bytes) -> bytes:
    """Events in one packet, with the stream left open: no ``[DONE]``, no end."""
    return STREAM_HEAD + chunked(b"".join(frames))
