"""The part of the clients' surface that answers many prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

from vllm_unified.balancer import Balanced, Where
from vllm_unified.batch.requests import RequestMaker
from vllm_unified.batch.runner import BatchRun
from vllm_unified.batch.source import Prompts, Source
from vllm_unified.batch.stream import BatchStream
from vllm_unified.batch.texts import BatchResult, OnError, collect_texts
from vllm_unified.errors import VllmError
from vllm_unified.fleet.directory import Directory


class Batching:
    """The methods of a client that answer many prompts."""

    _directory: Directory

    def stream_batch(
        self,
        prompts: Prompts,
        params: Mapping[str, Any] | None = None,
        *,
        endpoint_url: Where = None,
        ordered: bool = False,
        patience: float | None = None,
        pack: int | None = None,
        **more: Any,
    ) -> BatchStream:
        """The answers to many prompts, each as soon as it is there.

        As many are under way as the servers take, of all servers of a fleet. A prompt that fails
        has its error in its answer, and never ends the others. One that fails for a passing reason
        is tried again.

        Args:
            prompts: Each as ``data`` of :meth:`make_request`: text, token ids, a list of messages,
                or a dict with ``prompt`` or ``messages`` and parameters of its own. Any iterable,
                also an asynchronous one; it is read no further than is needed. Of a list, those
                with an urgent ``priority`` go first, unless ``ordered``.
            params: For all prompts, ``model`` and ``response_model`` among them; those of a prompt
                win. ``timeout`` is for each prompt, in seconds: 300 where the client has its
                default.
            ordered: In the order of the prompts.
            patience: Seconds in which nothing succeeds after which it is given up; by default 60,
                and 10 before the first success.
            pack: How many prompts share a request; those with parameters of their own, and
                messages, never do. ``None``: as many as is found to pay, and mostly one.

        Raises:
            BatchStoppedError: while it is read: it was given up.
            BadRequestError, ConfigurationError: a parameter for all prompts is wrong.
        """
        where = self._directory.route(
            endpoint_url.fleet if isinstance(endpoint_url, Balanced) else endpoint_url
        )
        requests = RequestMaker(where.settings, {**(params or {}), **more})
        source = Source(prompts, by_priority=not ordered)
        run = BatchRun(where, source, requests, ordered=ordered, patience=patience, pack=pack)
        return BatchStream(run)

    @overload
    async def process_batch(
        self,
        endpoint_url: Where,
        prompts: Prompts,
        model: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        on_error: Literal["raise"] = "raise",
        on_progress: Callable[[int], object] | None = None,
        patience: float | None = None,
        **more: Any,
    ) -> list[str]: ...

    @overload
    async def process_batch(
        self,
        endpoint_url: Where,
        prompts: Prompts,
        model: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        on_error: Literal["return"],
        on_progress: Callable[[int], object] | None = None,
        patience: float | None = None,
        **more: Any,
    ) -> list[str | VllmError]: ...

    @overload
    async def process_batch(
        self,
        endpoint_url: Where,
        prompts: Prompts,
        model: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        on_error: OnError,
        on_progress: Callable[[int], object] | None = None,
        patience: float | None = None,
        **more: Any,
    ) -> list[str | VllmError]: ...

    async def process_batch(
        self,
        endpoint_url: Where,
        prompts: Prompts,
        model: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        on_error: OnError = "raise",
        on_progress: Callable[[int], object] | None = None,
        patience: float | None = None,
        **more: Any,
    ) -> Any:
        """The texts that answer many prompts, in order; arguments as for :meth:`stream_batch`.

        Args:
            on_error: ``raise`` after the rest is done, with the texts that there are; or
                ``return``: a prompt's error stands in the place of its text.
            on_progress: Called with the number of prompts that are done, after each.

        Raises:
            BatchError: some failed; has the answers of the others. Or all of it was given up.
        """
        shared = {"model": model, **(params or {}), **more}
        stream = self.stream_batch(prompts, shared, endpoint_url=endpoint_url, patience=patience)
        return await collect_texts(stream, prompts, on_error=on_error, on_progress=on_progress)

    @overload
    async def process_batch_with_metrics(
        self,
        endpoint_url: Where,
        prompts: Prompts,
        model: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        on_error: Literal["raise"] = "raise",
        on_progress: Callable[[int], object] | None = None,
        patience: float | None = None,
        **more: Any,
    ) -> BatchResult[str]: ...

    @overload
    async def process_batch_with_metrics(
        self,
        endpoint_url: Where,
        prompts: Prompts,
        model: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        on_error: Literal["return"],
        on_progress: Callable[[int], object] | None = None,
        patience: float | None = None,
        **more: Any,
    ) -> BatchResult[str | VllmError]: ...

    @overload
    async def process_batch_with_metrics(
        self,
        endpoint_url: Where,
        prompts: Prompts,
        model: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        on_error: OnError,
        on_progress: Callable[[int], object] | None = None,
        patience: float | None = None,
        **more: Any,
    ) -> BatchResult[str | VllmError]: ...

    async def process_batch_with_metrics(
        self,
        endpoint_url: Where,
        prompts: Prompts,
        model: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        on_error: OnError = "raise",
        on_progress: Callable[[int], object] | None = None,
        patience: float | None = None,
        **more: Any,
    ) -> Any:
        """The texts of :meth:`process_batch`, and what they took: time, tokens, requests."""
        shared = {"model": model, **(params or {}), **more}
        stream = self.stream_batch(prompts, shared, endpoint_url=endpoint_url, patience=patience)
        texts = await collect_texts(stream, prompts, on_error=on_error, on_progress=on_progress)
        return BatchResult(texts=texts, metrics=stream.metrics)

    @overload
    async def batch(
        self, prompts: Prompts, *, on_error: Literal["raise"] = "raise", **params: Any
    ) -> list[str]: ...

    @overload
    async def batch(
        self, prompts: Prompts, *, on_error: Literal["return"], **params: Any
    ) -> list[str | VllmError]: ...

    @overload
    async def batch(
        self, prompts: Prompts, *, on_error: OnError, **params: Any
    ) -> list[str | VllmError]: ...

    async def batch(self, prompts: Prompts, *, on_error: OnError = "raise", **params: Any) -> Any:
        """The texts that answer many prompts at the default server; see :meth:`process_batch`."""
        arguments = {**params, "on_error": on_error}
        return await self.process_batch(None, prompts, **arguments)
