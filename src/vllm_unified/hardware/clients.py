"""What users register, as backends: clients of this library, and plain callables."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar, cast

from vllm_unified.balancer import LoadBalancer, Where
from vllm_unified.blocking import BlockingLoadBalancer, VllmUnified
from vllm_unified.bridge import LoopThread
from vllm_unified.client import AsyncVllmUnified
from vllm_unified.errors import BadRequestError, ClientClosedError, ConfigurationError, VllmError
from vllm_unified.fleet.stream import GenerationStream
from vllm_unified.handler import EndpointHandler
from vllm_unified.hardware.backend import Backend, Capabilities
from vllm_unified.hardware.request import EMBEDDING, InferenceRequest
from vllm_unified.results import StreamChunk
from vllm_unified.wire.requests import generation_fields

T = TypeVar("T")

_ASK_SECONDS = 5.0
_PROBE_SECONDS = 30.0
# A server in development mode takes seconds to tell its device for the first time. No request waits
# for that: it is asked for again, so often at most.
_DEVICE_SECONDS = 1.0
_DEVICE_TRIES = 3


def as_backend(value: Any) -> Backend:
    """A client, a load balancer, a handler or a callable as a backend; a backend as it is.

    Raises:
        ConfigurationError: it is none of these.
    """
    match value:
        case type():
            raise ConfigurationError(f"{value.__name__} is a class: register one that was made")
        case AsyncVllmUnified():
            return ClientBackend(value, None)
        case LoadBalancer():
            return ClientBackend(value._client, value)
        case VllmUnified():
            return BlockingClientBackend(value, ClientBackend(value._client, None), value._thread)
        case BlockingLoadBalancer():
            inner = ClientBackend(value._balancer._client, value._balancer)
            return BlockingClientBackend(value, inner, value._thread)
        case EndpointHandler():
            return CallableBackend(lambda request: value(_generation_fields(request)))
        case Backend():
            return value
    if callable(value):
        return CallableBackend(lambda request: value(request.fields), value)
    raise ConfigurationError(
        f"a {type(value).__name__} is no backend",
        hint="A backend is a client, a load balancer, a callable, or has `async def infer`.",
    )


def default_name(value: Any) -> str:
    """What a backend is called where its user does not say."""
    if isinstance(value, AsyncVllmUnified | VllmUnified | LoadBalancer | BlockingLoadBalancer):
        return "vllm"
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    if isinstance(name, str) and name.isprintable() and not name.startswith("<"):
        return name
    return type(value).__name__ if not inspect.isroutine(value) else "callable"


class ClientBackend:
    """A client, at its default server or at a load balancer."""

    def __init__(self, client: AsyncVllmUnified, where: Where) -> None:
        self._client = client
        self._where = where
        self._device: str | None = None
        self._device_tries = 0

    @property
    def appetite(self) -> int:
        return self._client._route(self._where).appetite

    async def infer(self, request: InferenceRequest) -> Any:
        if request.task == EMBEDDING:
            return await self._client.embed(
                request.input, model=request.model, endpoint_url=self._where, **request.parameters
            )
        if request.is_chat:
            return await self._client.chat(request.messages, None, **self._chat(request))
        fields = _generation_fields(request)
        return await self._client.make_request(self._where, fields)

    def stream(self, request: InferenceRequest) -> GenerationStream[Any]:
        if request.task == EMBEDDING:
            raise BadRequestError("embeddings cannot be streamed")
        if request.is_chat:
            return self._client.stream_chat(request.messages, None, **self._chat(request))
        return self._client.stream_generation(self._where, _generation_fields(request))

    async def health(self) -> bool:
        """Have its servers generate a token; those that do are let in by the client, too."""
        looks = (
            self._client.check_endpoint(endpoint, timeout=_PROBE_SECONDS)
            for endpoint in self._client._route(self._where).endpoints
        )
        return any(await asyncio.gather(*looks))

    async def capabilities(self) -> Capabilities:
        cards = await self._client.list_models(self._where, timeout=_ASK_SECONDS)
        models = {card.id: card.max_model_len for card in cards}
        for endpoint in self._client._route(self._where).endpoints:
            # Known where a health check looks; each member of a fleet may serve something else.
            models = {**(endpoint.models or {}), **models}
        if self._device is None and self._device_tries < _DEVICE_TRIES:
            self._device_tries += 1
            self._device = await self._ask_device()
        return Capabilities(models=models, device=self._device)

    async def _ask_device(self) -> str | None:
        try:
            info = await self._client.get_model_info(self._where, timeout=_DEVICE_SECONDS)
        except VllmError:
            return None
        return info.device

    def _chat(self, request: InferenceRequest) -> dict[str, Any]:
        fields = {**request.parameters, "endpoint_url": self._where}
        return fields if request.model is None else {**fields, "model": request.model}


class BlockingClientBackend:
    """A blocking client: its calls run on its own event loop, and can be cancelled from ours."""

    def __init__(self, owner: object, inner: ClientBackend, thread: LoopThread) -> None:
        """``owner`` ends the thread when it is collected, so it is held here."""
        self._owner = owner
        self._inner = inner
        self._thread = thread

    @property
    def appetite(self) -> int:
        return self._inner.appetite

    async def infer(self, request: InferenceRequest) -> Any:
        return await _elsewhere(self._thread, lambda: self._inner.infer(request))

    def stream(self, request: InferenceRequest) -> _StreamElsewhere:
        return _StreamElsewhere(self._inner.stream(request), self._thread)

    async def health(self) -> bool:
        return await _elsewhere(self._thread, self._inner.health)

    async def capabilities(self) -> Capabilities:
        return await _elsewhere(self._thread, self._inner.capabilities)


class CallableBackend:
    """A function of the request's dict. One that is not asynchronous runs in a thread."""

    def __init__(self, function: Callable[[InferenceRequest], Any], said: Any = None) -> None:
        self._function = function
        self._is_async = inspect.iscoroutinefunction(said) or inspect.iscoroutinefunction(
            getattr(said, "__call__", None)  # noqa: B004 - of an object, not whether there is one
        )

    async def infer(self, request: InferenceRequest) -> Any:
        if self._is_async:
            return await self._function(request)
        found = await asyncio.to_thread(self._function, request)
        return await found if inspect.isawaitable(found) else found


class _StreamElsewhere:
    """A stream that lives on the loop of a blocking client."""

    def __init__(self, stream: GenerationStream[Any], thread: LoopThread) -> None:
        self._stream = stream
        self._thread = thread
        self._ready: list[StreamChunk] = []

    @property
    def result(self) -> Any:
        return self._stream.result

    def __aiter__(self) -> AsyncIterator[StreamChunk]:
        return self

    async def __anext__(self) -> StreamChunk:
        if not self._ready:
            ready = await _elsewhere(self._thread, self._stream.read_ready)
            self._ready = ready[::-1]
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.pop()

    async def close(self) -> None:
        if not self._thread.closed:
            await _elsewhere(self._thread, self._stream.close)


async def _elsewhere(thread: LoopThread, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    outcome = thread.submit(call)
    try:
        return await asyncio.wrap_future(outcome)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ClientClosedError("this client was closed before the call was done") from None


def _generation_fields(request: InferenceRequest) -> dict[str, Any]:
    if request.input is None:
        raise BadRequestError(f"the request for {request.task!r} has no input to generate from")
    if request.is_chat:
        fields = {"messages": request.messages}
    else:
        fields = generation_fields(cast("Any", request.input))
    fields |= request.parameters
    return fields if request.model is None else {**fields, "model": request.model}
