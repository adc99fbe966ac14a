"""A fleet as its user sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from vllm_unified.batch.source import Prompts
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.fleet.directory import Directory, EndpointInput
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.fleet.stream import GenerationStream
from vllm_unified.results import ChatResult, GenerationResult
from vllm_unified.wire.requests import GenerationInput, Message, Prompt

if TYPE_CHECKING:
    from vllm_unified.client import AsyncVllmUnified

T = TypeVar("T")
Params = Mapping[str, Any]


class Balanced:
    """Several endpoints that are used as one: what both load balancers have."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The members."""
        return self.fleet.endpoints

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.fleet!r}>"


Where = str | Endpoint | Balanced | None
"""An address, an endpoint or a load balancer; ``None`` for the client's default."""


class LoadBalancer(Balanced):
    """Several endpoints used as one, made by ``create_load_balancer``.

    A request goes to one that serves its model, is not shut out and has room, as the strategy
    chooses; an attempt that fails is followed by one at another endpoint. A context manager.
    """

    def __init__(self, client: AsyncVllmUnified, fleet: Fleet, directory: Directory) -> None:
        super().__init__(fleet)
        self._client = client
        self._directory = directory

    async def generate(self, prompt: Prompt, **params: Any) -> GenerationResult:
        """Generate; see :meth:`AsyncVllmUnified.make_request`."""
        return await self._client.make_request(self, prompt, **params)

    @overload
    async def chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: type[T],
        **params: Any,
    ) -> ChatResult[T]: ...

    @overload
    async def chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: None = None,
        **params: Any,
    ) -> ChatResult[None]: ...

    async def chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: Any = None,
        **params: Any,
    ) -> ChatResult[Any]:
        """Chat; see :meth:`AsyncVllmUnified.chat`."""
        params = {**params, "endpoint_url": self}
        result: ChatResult[Any] = await self._client.chat(
            messages, options, response_model=response_model, **params
        )
        return result

    def stream(self, prompt: GenerationInput, **params: Any) -> GenerationStream[GenerationResult]:
        """Generate piece by piece; a stream that loses its server goes on at another."""
        return self._client.stream_generation(self, prompt, **params)

    @overload
    def stream_chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: type[T],
        **params: Any,
    ) -> GenerationStream[ChatResult[T]]: ...

    @overload
    def stream_chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: None = None,
        **params: Any,
    ) -> GenerationStream[ChatResult[None]]: ...

    def stream_chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: Any = None,
        **params: Any,
    ) -> GenerationStream[ChatResult[Any]]:
        """Chat piece by piece; a stream that loses its server goes on at another."""
        params = {**params, "endpoint_url": self}
        return self._client.stream_chat(messages, options, response_model=response_model, **params)

    async def batch(self, prompts: Prompts, **params: Any) -> list[str]:
        """The texts that answer many prompts; see :meth:`AsyncVllmUnified.process_batch`."""
        texts: list[str] = await self._client.process_batch(self, prompts, **params)
        return texts

    def add_endpoint(self, endpoint: EndpointInput) -> Endpoint:
        """Take an endpoint in, or make one from an address or a dict."""
        return self._directory.add_member(self.fleet, endpoint)

    def remove_endpoint(self, endpoint: Endpoint) -> None:
        """Send nothing more there from here; what is in flight goes on. The endpoint stays."""
        self.fleet.remove(endpoint)

    async def close(self) -> None:
        """End the health check and turn away who waits. The endpoints stay."""
        await self._directory.close_fleet(self.fleet)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
