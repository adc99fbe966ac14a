"""Both clients behind the asynchronous surface, so that a scenario is written once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self, cast

from vllm_unified import AsyncVllmUnified, BlockingLoadBalancer, BlockingStream, VllmUnified

Kind = Literal["async", "blocking"]
KINDS: tuple[Kind, ...] = ("async", "blocking")

_END = object()
_PLAIN = "settings server create_endpoint list_endpoints get_stats reset_stats on once off".split()
"""Not asynchronous in either client."""


def make_client(kind: Kind, **settings: Any) -> AsyncVllmUnified:
    """A client; the blocking one does its waiting in threads and looks like the other."""
    if kind == "async":
        return AsyncVllmUnified(**settings)
    return cast("AsyncVllmUnified", _Blocking(VllmUnified(**settings)))


class _Blocking:
    def __init__(self, client: VllmUnified) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.client, name)
        if name in _PLAIN:
            return attribute
        if "stream" in name:
            return _stream_of(attribute)
        if name == "create_load_balancer":
            return lambda *args, **kwargs: _BlockingBalancer(attribute(*args, **kwargs))
        if name.startswith("create_"):
            return lambda *args, **kwargs: _in_thread(attribute(*args, **kwargs))
        return _in_thread(attribute)

    async def __aenter__(self) -> Self:
        self.client.__enter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.client.__exit__, kind, error, traceback)


class _BlockingBalancer:
    def __init__(self, balancer: BlockingLoadBalancer) -> None:
        self.balancer = balancer

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.balancer, name)
        if name in ("endpoints", "fleet", "add_endpoint", "remove_endpoint"):
            return attribute
        return _stream_of(attribute) if "stream" in name else _in_thread(attribute)

    async def __aenter__(self) -> Self:
        self.balancer.__enter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.balancer.__exit__, kind, error, traceback)


class _BlockingStream:
    def __init__(self, stream: BlockingStream[Any]) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.stream, name)
        return _in_thread(attribute) if name in ("close", "collect") else attribute

    async def texts(self) -> Any:
        texts = self.stream.texts()
        while (text := await asyncio.to_thread(next, texts, _END)) is not _END:
            yield text

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        chunk = await asyncio.to_thread(next, self.stream, _END)
        if chunk is _END:
            raise StopAsyncIteration
        return chunk

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.stream.__enter__)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.stream.__exit__, kind, error, traceback)


def _in_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(function, *map(_bare, args), **kwargs)

    return call


def _stream_of(function: Callable[..., Any]) -> Callable[..., _BlockingStream]:
    return lambda *args, **kwargs: _BlockingStream(function(*map(_bare, args), **kwargs))


def _bare(argument: object) -> object:
    """A load balancer as the blocking client knows it, or anything else as it is."""
    return argument.balancer if isinstance(argument, _BlockingBalancer) else argument
