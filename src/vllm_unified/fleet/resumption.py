"""Whether a broken stream can go on, and how the rest of it is asked for."""

from __future__ import annotations

import msgspec

from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.endpoints.verdict import verdict_of
from vllm_unified.errors import RequestTimeoutError, StreamStalledError, VllmError
from vllm_unified.fleet.continuation import Continuation
from vllm_unified.results import StreamChunk
from vllm_unified.wire.requests import (
    WireRequest,
    detokenize_request,
    encode,
    generation_request,
    get_request,
)
from vllm_unified.wire.responses import decode_detokenization, decode_models


class NotResumableError(VllmError):
    """The stream cannot go on exactly; the message says why. It never leaves the fleet."""


def with_token_ids(request: WireRequest) -> WireRequest:
    """The request, with the token ids that a continuation is made of."""
    body = encode({**request.fields, "return_token_ids": True})
    return msgspec.structs.replace(request, body=body)


def is_the_servers_fault(error: VllmError) -> bool:
    """Whether another server may do better. When the call's own time is over, none does."""
    out_of_time = isinstance(error, RequestTimeoutError)
    if out_of_time and not isinstance(error, StreamStalledError):
        return False
    return verdict_of(error) in ("failed", "overloaded")


def stayed(reason: VllmError) -> str:
    """The hint of an error after which a stream did not go on."""
    if isinstance(reason, NotResumableError):
        return f"It could not go on at another server: {reason.message}."
    return f"It could not go on at another server: {type(reason).__name__}: {reason.message}"


async def rest_of(
    continuation: Continuation, endpoint: Endpoint, call: Call
) -> WireRequest | StreamChunk:
    """The request for the rest, or the last chunk if nothing is left to be asked for.

    Raises:
        NotResumableError: it cannot go on exactly.
        VllmError: this endpoint does not answer what has to be known for it.
    """
    model, settings = call.request.model, call.settings
    while (token_ids := continuation.question()) is not None:
        asked = Call(detokenize_request(token_ids, model), settings)
        continuation.answer(await endpoint.exchange(asked, lambda body, _: _text(body)))
    context = await _context(continuation, endpoint, call)
    reason = continuation.obstacle(max_model_len=context)
    if reason is not None:
        raise NotResumableError(reason)
    last = continuation.ending(max_model_len=context)
    if last is not None:
        return last
    return generation_request(continuation.request(max_model_len=context), stream=True)


def _text(body: bytes) -> str:
    return decode_detokenization(body)


async def _context(continuation: Continuation, endpoint: Endpoint, call: Call) -> int | None:
    """The server's context in tokens, if it matters."""
    if continuation.obstacle(max_model_len=None) is None:
        return None
    if endpoint.models is None:
        asked = Call(get_request("/v1/models"), call.settings)
        endpoint.serve(await endpoint.exchange(asked, lambda body, _: decode_models(body)))
    models = endpoint.models or {}
    model = call.request.model
    return models.get(model) if model is not None else next(iter(models.values()), None)
