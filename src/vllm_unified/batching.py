"""The part of the clients' surface that answers many prompts."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from vllm_unified.balancer import Balanced, Where
from vllm_unified.batch.requests import RequestMaker
from vllm_unified.batch.runner import BatchRun
from vllm_unified.batch.source import Prompts, Source
from vllm_unified.batch.stream import BatchStream
from vllm_unified.batch.texts import BatchResult, OnError, collect_texts
from vllm_unified.errors import ConfigurationError, VllmError
from vllm_unified.fleet.directory import Directory
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.wire.requests import GenerationInput

if TYPE_CHECKING:
    from vllm_unified.batch.jobs.on_ray import RayStream
    from vllm_unified.batch.jobs.summary import BatchProgress, BatchSummary


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
        fleet = self._fleet(endpoint_url)
        requests = RequestMaker(fleet.settings, {**(params or {}), **more})
        source = Source(prompts, by_priority=not ordered)
        run = BatchRun(fleet, source, requests, ordered=ordered, patience=patience, pack=pack)
        return BatchStream(run)

    async def run_batch(
        self,
        input: str | os.PathLike[str],
        output: str | os.PathLike[str],
        params: Mapping[str, Any] | None = None,
        *,
        prompt: str | None = None,
        system: str | None = None,
        messages: str | None = None,
        chat: bool = False,
        params_column: str | None = None,
        model: str | None = None,
        response_model: Any = None,
        columns: Sequence[str] | None = None,
        keep: Sequence[str] | None = None,
        input_format: str | None = None,
        output_format: str | None = None,
        unordered: bool = False,
        retry_failed: bool = False,
        overwrite: bool = False,
        strict: bool = False,
        ledger: str | os.PathLike[str] | None = None,
        endpoint_url: Where = None,
        patience: float | None = None,
        ray: str | None = None,
        ray_workers: int = 2,
        on_progress: Callable[[BatchProgress], object] | None = None,
        **more: Any,
    ) -> BatchSummary:
        """The rows of a file, answered into another one; the same call goes on after whatever
        ended it.

        Formats are JSON lines, CSV, TSV, Parquet and OpenAI's batch format, by suffix; ``.gz`` and
        ``.zst`` after it are compressed. ``"-"`` is a standard stream. The output has one row for
        each of the input, in its order, and appears when it is complete. What is done until then is
        in the ledger, a file beside it.

        With ``ray``, ``input`` may be a folder, or the address of one (``s3://...``); the output is
        a folder of parts then, whose rows have their position in the column ``index``.

        Args:
            params: For all rows; a row's own win.
            prompt: A template over the columns, ``"Q: {question}"``. Without it, the column
                ``messages`` or ``prompt`` is asked.
            system: A template for a system message; it makes a chat of a prompt, as ``chat`` does.
            messages: The column that has messages.
            params_column: The column that has parameters of the row's own.
            response_model: What each answer has to be, as for :meth:`chat`; in the column
                ``parsed``.
            columns: Of the answers: ``text``, ``finish_reason``, ``usage`` and ``error``, or any of
                :data:`vllm_unified.batch.jobs.columns.COLUMNS`; ``column=name`` renames.
            keep: Columns of the input that the output has; by default all.
            unordered: Write rows as they are answered; those without an answer come last.
            retry_failed: Ask again the rows that have no answer.
            overwrite: Begin anew, and drop what an earlier job has done.
            strict: Read all rows first, and send nothing if one of them cannot be asked. By default
                such a row gets an error, and the others their answers.
            ledger: Its file; by default ``output`` with ``.ledger``, and none for ``"-"``.
            patience: Seconds without any success before it ends; by default 60, and 10 before the
                first success.
            ray: The address of a Ray cluster whose workers ask the servers, ``"auto"`` or
                ``"local"``. This package has to be installed on its nodes.
            ray_workers: How many, each on a CPU of its own. Together they have no more in flight at
                a server than ``max_concurrent_requests``.
            on_progress: Called about twice a second.

        Raises:
            ConfigurationError: it cannot be run so, or the ledger is of another job.
            BadRequestError: a parameter is wrong; nothing was sent.
            JobStoppedError: servers or disk failed; what is done is kept.
        """
        from vllm_unified.batch.folders.place import is_folder
        from vllm_unified.batch.jobs.job import run_job
        from vllm_unified.batch.jobs.plan import Job
        from vllm_unified.batch.jobs.question import Asking

        fleet = self._fleet(endpoint_url)
        shared = {**(params or {}), **more}
        job = Job(
            input=os.fspath(input),
            output=os.fspath(output),
            asking=Asking(
                prompt=prompt,
                system=system,
                messages=messages,
                chat=chat,
                params_column=params_column,
            ),
            model=model or shared.pop("model", None) or fleet.settings.model,
            params=shared,
            response_model=response_model,
            columns=columns,
            keep=keep,
            input_format=input_format,
            output_format=output_format,
            unordered=unordered,
            retry_failed=retry_failed,
            overwrite=overwrite,
            strict=strict,
            ledger=None if ledger is None else os.fspath(ledger),
        )

        if is_folder(job.input):
            if ray is None:
                raise ConfigurationError(
                    f"{job.input} is a folder, and those take a Ray cluster",
                    hint="ray='local' (--ray local) makes one on this machine.",
                )
            from vllm_unified.batch.folders.job import run_folder_job
            from vllm_unified.batch.jobs.on_ray import recipe

            return await run_folder_job(
                job,
                recipe(fleet, patience, ray_workers),
                address=ray,
                actors=ray_workers,
                on_progress=on_progress,
            )

        def ask(
            prompts: AsyncIterator[GenerationInput], shared: Mapping[str, Any], pack: int | None
        ) -> BatchStream | RayStream:
            if ray is not None:
                from vllm_unified.batch.jobs.on_ray import RayStream, recipe

                made_of = recipe(fleet, patience, ray_workers)
                RequestMaker(fleet.settings, shared)  # raises for what is wrong for all
                return RayStream(ray, made_of, prompts, shared, pack, workers=ray_workers)
            requests = RequestMaker(fleet.settings, shared, embeddings=True)
            source = Source(prompts, by_priority=False)
            run = BatchRun(fleet, source, requests, ordered=False, patience=patience, pack=pack)
            return BatchStream(run)

        return await run_job(job, ask, on_progress=on_progress)

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
        pack: int | None = None,
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
        pack: int | None = None,
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
        pack: int | None = None,
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
        pack: int | None = None,
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
        stream = self.stream_batch(
            prompts, shared, endpoint_url=endpoint_url, patience=patience, pack=pack
        )
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
        pack: int | None = None,
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
        pack: int | None = None,
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
        pack: int | None = None,
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
        pack: int | None = None,
        **more: Any,
    ) -> Any:
        """The texts of :meth:`process_batch`, and what they took: time, tokens, requests."""
        shared = {"model": model, **(params or {}), **more}
        stream = self.stream_batch(
            prompts, shared, endpoint_url=endpoint_url, patience=patience, pack=pack
        )
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

    def _fleet(self, where: Where) -> Fleet:
        return self._directory.route(where.fleet if isinstance(where, Balanced) else where)
