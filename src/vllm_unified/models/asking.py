"""One question to one server, beside its traffic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.errors import ConnectionLostError, RequestTimeoutError, VllmError
from vllm_unified.models.metrics import Scrape, read_metrics
from vllm_unified.wire.requests import get_request

T = TypeVar("T")


async def ask(endpoint: Endpoint, path: str, decode: Callable[[bytes], T], timeout: float) -> T:
    """``GET path``, past this client's own line, and counted in no statistics.

    It is asked a second time if the connection breaks: one that was kept may be of a server that
    was restarted since.

    Args:
        decode: Makes something of the answer's body.
        timeout: Seconds that the server has.

    Raises:
        VllmError: complete, as the error of a call.
    """
    call = Call(get_request(path), endpoint.settings)

    async def attempt() -> T:
        call.begin_attempt(endpoint, time.monotonic())
        return await endpoint.exchange(call, lambda body, _: decode(body))

    try:
        async with asyncio.timeout(timeout):
            try:
                return await attempt()
            except ConnectionLostError as error:
                call.end_attempt(error)
                return await attempt()
    except VllmError as error:
        call.end_attempt(error)
        raise call.complete_error(error) from error.__cause__
    except TimeoutError:
        late = RequestTimeoutError(f"no answer to GET {path} within {timeout:g} s")
        call.end_attempt(late)
        raise call.complete_error(late) from None


def read_page(body: bytes) -> Scrape:
    """The answer of ``/metrics``, now.

    Raises:
        ProtocolError: it is not Prometheus' text format.
    """
    text = body.decode("utf-8", "replace")
    return read_metrics(text, clock=time.monotonic(), unix=time.time())
