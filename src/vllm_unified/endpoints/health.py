"""Whether one server is well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.errors import ConfigurationError, RequestTimeoutError, VllmError
from vllm_unified.results import ResultMetadata
from vllm_unified.wire.requests import WireRequest, generation_request, get_request
from vllm_unified.wire.responses import decode_generation

Decode = Callable[[bytes, ResultMetadata], object]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What a look at a server found. True in a condition if the server is well."""

    endpoint: str
    healthy: bool
    proven: bool
    """Whether a token was generated, or ``/health`` was only asked."""
    duration: float
    """Seconds that the look took."""
    error: VllmError | None = None
    """Why it is not well."""

    def __bool__(self) -> bool:
        return self.healthy


async def check_health(
    endpoint: Endpoint, *, probe: bool, timeout: float, model: str | None = None
) -> Health:
    """Ask ``/health``, and with ``probe`` generate a token. ``timeout`` is in seconds.

    It goes past this client's own line: a full line says nothing about the server. It is counted
    in no statistics.
    """
    started = time.monotonic()
    error = await _trouble(endpoint, probe, timeout, model or endpoint.settings.model)
    return Health(
        endpoint=endpoint.url,
        healthy=error is None,
        proven=probe and error is None,
        duration=time.monotonic() - started,
        error=error,
    )


async def best_health(endpoints: Sequence[Endpoint], *, probe: bool, timeout: float) -> Health:
    """The health of the one that is well, or of the first, if none is.

    Raises:
        ConfigurationError: there is no endpoint.
    """
    if not endpoints:
        raise ConfigurationError("there is no endpoint to look at")
    found = await asyncio.gather(
        *(check_health(endpoint, probe=probe, timeout=timeout) for endpoint in endpoints)
    )
    return next((health for health in found if health), found[0])


async def _trouble(
    endpoint: Endpoint, probe: bool, timeout: float, model: str | None
) -> VllmError | None:
    settings = endpoint.settings
    requests: list[tuple[WireRequest, Decode]] = [(get_request("/health"), _ignore)]
    if probe:
        fields = {"prompt": "1", "max_tokens": 1, "model": model}
        requests.append((generation_request(fields), decode_generation))
    call = Call(requests[0][0], settings)
    try:
        async with asyncio.timeout(timeout):
            for request, decode in requests:
                call = Call(request, settings)
                call.begin_attempt(endpoint, time.monotonic())
                await endpoint.exchange(call, decode)
    except VllmError as error:
        call.end_attempt(error)
        return call.complete_error(error)
    except TimeoutError:
        late = RequestTimeoutError(f"no answer within {timeout:g} s")
        call.end_attempt(late)
        return call.complete_error(late)
    return None


def _ignore(body: bytes, metadata: ResultMetadata) -> None:
    """``/health`` has an empty body."""
