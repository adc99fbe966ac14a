"""The errors of the server, in the words and shapes of vLLM."""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import Any

BUSY = (
    "The engine is currently busy and cannot accept new requests. "
    "Please try again later or on a different instance."
)
"""Message of the admission 503 for ``max_num_queued_reqs``."""
BACKLOG = (
    "The engine has reached its prefill token backlog limit. "
    "Please try again later or on a different instance."
)
"""Message of the admission 503 for ``max_num_queued_tokens``."""
ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
"""Message of every request that a dead engine fails."""


class ApiError(Exception):
    """An error in the standard body; raised anywhere in a handler."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.message = _sanitize(message)

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.status,
            }
        }

    def frame(self) -> bytes:
        """The error as an event of a stream; this one has spaces and ASCII escapes, as vLLM's."""
        return f"data: {json.dumps(self.body())}\n\n".encode()


def _sanitize(message: str) -> str:
    """Hide file system paths, with the patterns of ``exception_handling/utils.py``."""
    message = re.sub(r"/(?:home|usr|opt|var|tmp|root|lib|mnt|srv)(?:/[\w.\-]+)+", "<path>", message)
    return re.sub(r"(?:/[\w\-]+)+/[\w\-]+\.\w+", "<path>", message).strip()


def invalid(message: str, parameter: str | None = None, value: object = None) -> ApiError:
    """A ``VLLMValidationError``: a 400 that names the parameter and its value."""
    extras = [f"parameter={parameter}"] if parameter is not None else []
    if value is not None:
        extras.append(f"value={value}")
    text = f"{message} ({', '.join(extras)})" if extras else message
    return ApiError(text, param=parameter)


def unknown_model(name: object, served: tuple[str, ...]) -> ApiError:
    """404 for a model that is not served."""
    return ApiError(
        f"The model `{name}` does not exist. Valid aliases: {', '.join(served)}.",
        status=404,
        type="NotFoundError",
        param="model",
    )


def busy(message: str = BUSY) -> ApiError:
    """503 of admission control."""
    return ApiError(message, status=503, type=HTTPStatus(503).phrase)


def engine_dead() -> ApiError:
    """500 of a dead engine."""
    return ApiError(ENGINE_DEAD, status=500, type="InternalServerError")


_MAX_REPORTED = 10
_MAX_INPUT = 200


def validation_error(errors: list[dict[str, Any]] | list[str]) -> ApiError:
    """A pydantic validation error, 400, as ``handlers/validation.py`` words it.

    Args:
        errors: pydantic's error dicts, ``loc`` already a dotted path, or plain messages.
    """
    label = "error" if len(errors) == 1 else "errors"
    lines = [f"{len(errors)} validation {label}:"]
    lines += [f"  {_render(error)}" for error in errors[:_MAX_REPORTED]]
    if len(errors) > _MAX_REPORTED:
        lines.append(f"  ...and {len(errors) - _MAX_REPORTED} more {label}")
    first = errors[0]
    param = first["loc"] if isinstance(first, dict) else None
    return ApiError("\n".join(lines), type="Bad Request", param=param)


def _render(error: dict[str, Any] | str) -> str:
    if isinstance(error, dict) and "input" in error:
        error = error | {"input": _summarize(error["input"])}
    return str(error)


def _summarize(value: object) -> object:
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    text = str(value)
    return text if len(text) <= _MAX_INPUT else text[:_MAX_INPUT] + "...[truncated]"
