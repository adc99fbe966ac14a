"""What a failed attempt says about its server. Pure."""

from __future__ import annotations

import re
from typing import Literal

from vllm_unified.errors import (
    ConnectError,
    ConnectionLostError,
    OverloadedError,
    ProtocolError,
    RateLimitError,
    RequestTimeoutError,
    ResponseTooLargeError,
    ServerError,
    UnsupportedError,
    VllmError,
)

Verdict = Literal["overloaded", "failed", "answered", "unknown"]

# vLLM's admission control (v1/engine/async_llm.py). A gateway's 503 means that nobody is there.
_BUSY = re.compile(r"currently busy|token backlog limit", re.IGNORECASE)


def verdict_of(error: VllmError) -> Verdict:
    """``overloaded``: it is alive, and full. ``failed``: it, or the way to it, is broken.
    ``answered``: it did what it should, and the request was wrong. ``unknown``: nothing."""
    match error:
        case RateLimitError():
            return "overloaded"
        case OverloadedError():
            return "overloaded" if _BUSY.search(error.message) else "failed"
        case ResponseTooLargeError() | UnsupportedError():
            return "answered"
        case ServerError() | ConnectError() | ConnectionLostError() | ProtocolError():
            return "failed"
        case RequestTimeoutError():
            return "failed"
    return "answered" if error.status_code is not None else "unknown"
