"""Error answers: status, headers and body become one error of the tree.

vLLM has five shapes of error body (and gateways before it have their own); all are understood.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from datetime import UTC
from http import HTTPStatus
from typing import Any

import msgspec

from vllm_unified.errors import (
    AuthenticationError,
    BadRequestError,
    ContextLengthError,
    EngineDeadError,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    ServerError,
    UnsupportedError,
    VllmError,
)

_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_CONTEXT_LENGTH = re.compile(
    r"maximum context length|max_model_len|maximum model length|longer than the maximum",
    re.IGNORECASE,
)
_ENGINE_DEAD = re.compile(r"EngineCore encountered an issue|EngineDeadError|engine is dead", re.I)
_MAX_QUOTED = 1000


def error_in_answer(
    status: int, headers: Mapping[str, str], body: bytes, *, path: str, now: float | None = None
) -> VllmError:
    """The error that an answer other than 2xx stands for.

    ``now`` is the time that a ``Retry-After`` date is compared with, in seconds since the epoch.
    """
    message, param = _message(body, headers)
    if 300 <= status < 400:
        error: VllmError = ProtocolError(
            f"the server redirects to {headers.get('location', 'nowhere')}",
            hint="Use that address; requests with a prompt or a key are not sent on by themselves.",
        )
    elif not message and status == 404:
        error = NotFoundError(f"the server has no {path}")
    else:
        error = _classify(status, message or _phrase(status), param, path)
    error.status_code = status
    error.retry_after = retry_after(headers, time.time() if now is None else now)
    return error


def error_in_body(error: bytes) -> VllmError:
    """The error in an error frame of a stream, or in a 200 that is none.

    ``error`` is the JSON of the value of ``"error"``.
    """
    message, param = _message(b'{"error":' + error + b"}", {})
    code = _code(error)
    found = _classify(code, message or "the server reports an error without a message", param, "")
    found.status_code = code
    return found


def _code(error: bytes) -> int:
    try:
        value = msgspec.json.decode(error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 500
    code = value.get("code") if isinstance(value, dict) else None
    if isinstance(code, str) and code.isdigit():
        code = int(code)
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _classify(status: int, message: str, param: str | None, path: str) -> VllmError:
    if status in (400, 413, 422):
        if _CONTEXT_LENGTH.search(message):
            return ContextLengthError(message)
        return BadRequestError(message)
    if status == 401:
        return AuthenticationError(f"the server does not accept the key: {message}")
    if status == 403:
        return PermissionDeniedError(message)
    if status in (404, 405):
        return _not_found(message, param, path)
    if status == 429:
        return RateLimitError(message)
    if status == 501:
        return UnsupportedError(message)
    if _ENGINE_DEAD.search(message):
        return EngineDeadError(message)
    if status == 503:
        return OverloadedError(message)
    if status >= 500 or status == 408:
        return ServerError(message)
    return ProtocolError(f"the server answers with the unexpected status {status}: {message}")


def _not_found(message: str, param: str | None, path: str) -> NotFoundError:
    if param == "model" or re.search(r"\bmodel\b.*does not exist", message):
        return ModelNotFoundError(message)
    if message in ("Not Found", "Method Not Allowed"):
        return NotFoundError(
            f"the server has no {path}",
            hint="The address is not a vLLM server's, or the model that it serves cannot do this, "
            "or the feature is not switched on.",
        )
    return NotFoundError(message)


def _message(body: bytes, headers: Mapping[str, str]) -> tuple[str, str | None]:
    """What the server says, and the parameter it blames."""
    if not body:
        return "", None
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _prose(body, headers), None
    if not isinstance(value, dict):
        return _quoted(str(value)), None
    error = value.get("error", value.get("detail", value))
    if error is None:
        return "", None
    if not isinstance(error, dict):
        return _quoted(error if isinstance(error, str) else str(error)), None
    message, param = error.get("message"), error.get("param")
    text = message if isinstance(message, str) else str(value) if message is None else str(message)
    return _quoted(text), param if isinstance(param, str) else None


def _prose(body: bytes, headers: Mapping[str, str]) -> str:
    text = body[: 64 * 1024].decode("utf-8", "replace")
    kind = headers.get("content-type", "").partition(";")[0].strip()
    title = _TITLE.search(text)
    if title is not None or kind == "text/html":
        said = " ".join((title[1] if title else "").split())
        return f"an HTML page in place of vLLM's answer, perhaps of a proxy: {_quoted(said)!r}"
    return _quoted(" ".join(text.split()))


def _quoted(text: str) -> str:
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}... ({len(text)} characters)"


def _phrase(status: int) -> str:
    try:
        return f"{HTTPStatus(status).phrase}, without a message"
    except ValueError:
        return "no message"


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait, from ``retry-after-ms`` or ``Retry-After`` (seconds, or an HTTP date).

    ``None`` where the server does not say, or says what cannot be read.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None or text is None:
        return seconds
    try:
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, date.replace(tzinfo=date.tzinfo or UTC).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _number(text: Any) -> float | None:
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number < float("inf") else None
