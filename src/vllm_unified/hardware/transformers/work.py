"""One request at a model in this process: its jobs, and what comes of them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol, Self

from vllm_unified.errors import (
    Attempt,
    BackendError,
    BadRequestError,
    ClientClosedError,
    ContextLengthError,
    RequestTimeoutError,
    UnsupportedError,
)
from vllm_unified.hardware.request import EMBEDDING, InferenceRequest, are_messages
from vllm_unified.hardware.transformers.job import Job
from vllm_unified.hardware.transformers.model import Model
from vllm_unified.hardware.transformers.sampling import sampling
from vllm_unified.results import (
    ChatResult,
    Choice,
    GenerationResult,
    ResultMetadata,
    StreamChunk,
    Usage,
)


class Owner(Protocol):
    """The backend, as a request sees it."""

    @property
    def served(self) -> str:
        """The model's name in requests."""

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer; ``None``: the model's own."""

    @property
    def timeout(self) -> float:
        """Seconds for a request."""

    async def load(self) -> Model:
        """The model."""

    def put(self, job: Job) -> bool:
        """Have a job done; whether it will be."""


class Work:
    """One request: a job for each of its prompts."""

    def __init__(self, owner: Owner, request: InferenceRequest) -> None:
        self._owner = owner
        self._request = request
        self._jobs: list[Job] = []
        self._told: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
        self._started = time.monotonic()
        self._started_at = time.time()
        self._first: float | None = None
        self._device = ""
        seconds = request.parameters.get("timeout")
        self.seconds = owner.timeout if seconds is None else _seconds(seconds)

    async def begin(self) -> None:
        """Have the jobs in line."""
        request = self._request
        if request.task == EMBEDDING:
            raise UnsupportedError("the transformers backend makes no embeddings")
        model = await self._owner.load()
        self._device = model.device
        chosen = sampling(request.parameters, is_chat=request.is_chat, defaults=model.defaults)
        loop = asyncio.get_running_loop()
        prompts = await asyncio.to_thread(_prompts, model, request)
        limits = [self._limit(len(prompt), chosen.max_tokens, model) for prompt in prompts]
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            job = Job(
                prompt,
                chosen,
                limit=limit,
                ends=model.ends,
                decode=model.decode,
                tell=self._teller(loop, index),
            )
            self._jobs.append(job)
            if not self._owner.put(job):
                raise ClientClosedError("this backend is closed")

    def _teller(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[str | None], None]:
        def tell(text: str | None) -> None:
            try:
                loop.call_soon_threadsafe(self._told.put_nowait, (index, text))
            except RuntimeError:  # the loop is closed: nobody listens
                self._jobs[index].cancel()

        return tell

    def _limit(self, prompt: int, asked: int | None, model: Model) -> int:
        context = self._owner.context or model.context
        if context is None:
            return asked or 2048
        if prompt + (asked or 1) > context:
            raise ContextLengthError(
                f"{prompt} tokens of prompt and {asked or 1} of answer are more than the "
                f"{context} of this model's context"
            )
        return asked or context - prompt

    async def texts(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """Index, new text, and at the end of each answer its finish reason."""
        open_jobs = len(self._jobs)
        while open_jobs:
            index, text = await self._told.get()
            job = self._jobs[index]
            if self._first is None:
                self._first = time.monotonic() - self._started
            if text is not None:
                yield index, text, None
                continue
            if job.error is not None:
                if isinstance(job.error, ClientClosedError):
                    raise job.error
                raise foreign("the model failed", job.error)
            if job.finish_reason == "cancelled":
                raise ClientClosedError("the backend was closed before the answer was complete")
            open_jobs -= 1
            yield index, "", job.finish_reason

    def cancel(self) -> None:
        """Generate no more."""
        for job in self._jobs:
            job.cancel()

    def result(self) -> GenerationResult:
        """The whole answer."""
        duration = time.monotonic() - self._started
        place = f"transformers on {self._device}"
        attempt = Attempt(endpoint=place, started_at=self._started_at, duration=duration)
        prompt_tokens = sum(len(job.prompt) for job in self._jobs)
        answer_tokens = sum(len(job.tokens) for job in self._jobs)
        fields: dict[str, Any] = {
            "id": f"local-{os.urandom(8).hex()}",
            "model": self._owner.served,
            "created": int(self._started_at),
            "choices": tuple(
                Choice(
                    index=index,
                    text=job.text,
                    finish_reason=job.finish_reason,
                    stop_reason=job.stop_reason,
                )
                for index, job in enumerate(self._jobs)
            ),
            "usage": Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=answer_tokens,
                total_tokens=prompt_tokens + answer_tokens,
            ),
            "metadata": ResultMetadata(
                endpoint=place,
                duration=duration,
                time_to_first_token=self._first,
                attempts=(attempt,),
            ),
        }
        return ChatResult(**fields) if self._request.is_chat else GenerationResult(**fields)


class InProcessStream:
    """An async iterator of :class:`StreamChunk`."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._texts: AsyncIterator[tuple[int, str, str | None]] | None = None
        self._complete = False

    @property
    def result(self) -> GenerationResult | None:
        """The whole answer, once it is complete."""
        return self._work.result() if self._complete else None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamChunk:
        try:
            async with asyncio.timeout(self._work.seconds):
                if self._texts is None:
                    await self._work.begin()
                    self._texts = self._work.texts()
                index, text, reason = await anext(self._texts)
        except StopAsyncIteration:
            self._complete = True
            raise
        except TimeoutError:
            self._work.cancel()
            raise RequestTimeoutError(f"nothing came for {self._work.seconds:g} s") from None
        except BaseException:
            self._work.cancel()
            raise
        return StreamChunk(text=text, index=index, finish_reason=reason)

    async def close(self) -> None:
        """End the work."""
        self._work.cancel()


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise BadRequestError(f"timeout must be a number of seconds, not {value!r}")
    return float(value)


def _prompts(model: Model, request: InferenceRequest) -> list[list[int]]:
    """Token ids of each prompt."""
    asked = request.input
    if request.is_chat:
        return [model.encode_chat(request.messages)]
    prompts: Sequence[Any] = [asked] if isinstance(asked, str) or _are_ids(asked) else asked
    if not isinstance(prompts, Sequence) or not prompts or are_messages(prompts):
        raise BadRequestError(f"the prompt is neither text nor token ids: {str(asked)[:60]!r}")
    encoded = [model.encode(each) if isinstance(each, str) else list(each) for each in prompts]
    if not all(encoded):
        raise BadRequestError("a prompt is empty")
    return encoded


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(item, int) for item in value)
    )


def foreign(what: str, error: Exception) -> BackendError:
    """The error of another library, as one of ours."""
    failure = BackendError(f"{what}: {type(error).__name__}: {error}")
    failure.is_transient_error = True
    failure.__cause__ = error
    return failure
