"""What a batch took, counted while it runs. Pure."""

from __future__ import annotations

import msgspec

from vllm_unified.endpoints.histogram import Distribution, Histogram
from vllm_unified.errors import VllmError
from vllm_unified.results import GenerationResult


class BatchMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """A batch in figures. Times are in seconds."""

    prompts: int
    """That were read so far."""
    succeeded: int
    failed: int
    duration: float
    """From the first prompt to the last answer, or until now."""
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float
    """Generated tokens in each second of the duration."""
    prompts_per_second: float
    """Answers in each second of the duration."""
    latency: Distribution | None
    """From sending a prompt to its answer, waiting and retries of the call included; of those that
    succeeded. ``None`` where none did."""
    requests: int
    """HTTP requests that were sent."""
    packed: int
    """Prompts that came in one request with others."""
    retries: int
    """HTTP requests that were sent because another had failed."""


class Counter:
    """The figures of a batch that runs."""

    __slots__ = (
        "_completion_tokens",
        "_ended",
        "_failed",
        "_latency",
        "_packed",
        "_prompt_tokens",
        "_requests",
        "_retries",
        "_started",
        "_succeeded",
        "prompts",
    )

    def __init__(self) -> None:
        self.prompts = 0
        """That were read so far."""
        self._succeeded = self._failed = 0
        self._prompt_tokens = self._completion_tokens = 0
        self._requests = self._retries = self._packed = 0
        self._latency = Histogram()
        self._started: float | None = None
        self._ended: float | None = None

    def begin(self, now: float) -> None:
        """The first prompt is about to be read; in monotonic seconds."""
        self._started = now

    def end(self, now: float) -> None:
        """The last answer has come."""
        if self._ended is None:
            self._ended = now

    def sent(self, attempts: int, *, again: bool) -> None:
        """A call ended after so many HTTP requests; ``again``: it was not its prompts' first."""
        self._requests += attempts
        self._retries += attempts if again else max(attempts - 1, 0)

    def succeeded(self, result: GenerationResult, duration: float) -> None:
        """A prompt was answered; ``duration`` in seconds."""
        self._succeeded += 1
        self._prompt_tokens += result.usage.prompt_tokens
        self._completion_tokens += result.usage.completion_tokens
        self._latency.record(duration)

    def failed(self, error: VllmError) -> None:
        """A prompt gets an error for an answer."""
        self._failed += 1

    def packed(self, prompts: int) -> None:
        """So many prompts were answered by one request."""
        self._packed += prompts

    @property
    def done(self) -> int:
        """Prompts that have their answer, or their error."""
        return self._succeeded + self._failed

    def snapshot(self, now: float) -> BatchMetrics:
        """The figures at this moment, in monotonic seconds."""
        end = now if self._ended is None else self._ended
        duration = 0.0 if self._started is None else max(end - self._started, 0.0)
        return BatchMetrics(
            prompts=self.prompts,
            succeeded=self._succeeded,
            failed=self._failed,
            duration=duration,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            tokens_per_second=self._completion_tokens / duration if duration else 0.0,
            prompts_per_second=self._succeeded / duration if duration else 0.0,
            latency=self._latency.distribution(),
            requests=self._requests,
            packed=self._packed,
            retries=self._retries,
        )
