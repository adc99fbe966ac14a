"""What the two generate endpoints have in common: from a checked request to a run of steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from vllm_unified.simulator.adapters import Adapter
from vllm_unified.simulator.engine import Generation, Job
from vllm_unified.simulator.errors import ApiError, invalid
from vllm_unified.simulator.http import Request
from vllm_unified.simulator.output import DecodedLogprob, Step
from vllm_unified.simulator.sampling import Sampling, check_by_engine
from vllm_unified.simulator.service import Service


class Plan(msgspec.Struct, kw_only=True):
    """A generate request that passed every check that comes before an answer starts."""

    body: dict[str, Any]
    request_id: str
    model: str
    adapter: Adapter | None
    priority: int
    prompts: list[list[int]]
    samplings: list[Sampling]

    @property
    def stream(self) -> bool:
        """Whether the answer is a stream."""
        return bool(self.body.get("stream"))

    @property
    def n(self) -> int:
        """Samples of every prompt."""
        return self.samplings[0].n


class Choice(msgspec.Struct, frozen=True):
    """One sequence of a request and its index in the answer."""

    index: int
    generation: Generation


def check_stream_options(body: Mapping[str, Any]) -> None:
    """Stream options need a stream.

    Raises:
        ApiError: without one.
    """
    if body.get("stream_options") and not body.get("stream"):
        raise invalid("Stream options can only be defined when `stream=True`.", "stream_options")


def check_response_format(body: Mapping[str, Any]) -> None:
    """A JSON schema needs its schema.

    Raises:
        ApiError: without one.
    """
    form = body.get("response_format")
    if isinstance(form, dict) and form.get("type") == "json_schema" and not form.get("json_schema"):
        raise invalid(
            "When response_format type is 'json_schema', the 'json_schema' field must be provided.",
            "response_format",
        )


def check_prompt_logprobs(body: Mapping[str, Any]) -> None:
    """Log probabilities of the prompt exclude a stream.

    Raises:
        ApiError: for both, or a negative number.
    """
    wanted = body.get("prompt_logprobs")
    if wanted is None:
        return
    if not isinstance(wanted, int | float):
        raise invalid("`prompt_logprobs` must be an integer.", "prompt_logprobs", wanted)
    if body.get("stream") and (wanted > 0 or wanted == -1):
        raise invalid("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if wanted < 0 and wanted != -1:
        message = "`prompt_logprobs` must be a positive value or -1."
        raise invalid(message, "prompt_logprobs", wanted)


def check_cache_salt(body: Mapping[str, Any]) -> None:
    """A cache salt is a short string without separators.

    Raises:
        ApiError: for anything else.
    """
    salt = body.get("cache_salt")
    if salt is None:
        return
    if not isinstance(salt, str) or not salt:
        message = "Parameter 'cache_salt' must be a non-empty string if provided."
        raise invalid(message, "cache_salt")
    if len(salt) > 128 or set(salt) & set("@/\\\x00"):
        raise invalid(
            "Parameter 'cache_salt' must be at most 128 characters and must not contain "
            "'@', '/', '\\\\', or NUL.",
            "cache_salt",
        )


def truncated(prompt: list[int], body: Mapping[str, Any], limit: int) -> list[int]:
    """The prompt, cut as ``truncate_prompt_tokens`` asks, at its start unless told otherwise."""
    keep = body.get("truncate_prompt_tokens")
    if keep is None:
        return prompt
    keep = limit - 1 if keep == -1 else keep
    if keep >= len(prompt):
        return prompt
    return prompt[:keep] if body.get("truncation_side") == "right" else prompt[len(prompt) - keep :]


def priority_of(request: Request, body: Mapping[str, Any]) -> int:
    """The priority, whose header beats the body; lower is earlier."""
    with contextlib.suppress(KeyError, ValueError):
        return int(request.headers["x-vllm-priority"])
    return int(body.get("priority", 0))


@contextlib.contextmanager
def running(service: Service, plan: Plan) -> Iterator[list[Choice]]:
    """Submit a plan to the engine and take everything back at the end, whatever happens.

    Raises:
        ApiError: what the engine finds wrong; a stream reports it after its headers.
    """
    choices: list[Choice] = []
    try:
        for place, (prompt, sampling) in enumerate(zip(plan.prompts, plan.samplings, strict=True)):
            check_by_engine(sampling, plan.body, prompt, service.config.max_logprobs)
            for generation in service.engine.submit(_jobs(plan, prompt, sampling)):
                index = place * sampling.n + generation.job.sample
                choices.append(Choice(index, generation))
        yield choices
    finally:
        for choice in choices:
            choice.generation.close()


def _jobs(plan: Plan, prompt: list[int], sampling: Sampling) -> list[Job]:
    adapter = plan.adapter
    return [
        Job(
            request_id=plan.request_id,
            prompt=prompt,
            sampling=sampling,
            lora=adapter.name if adapter else None,
            lora_path=adapter.path if adapter else None,
            priority=plan.priority,
            sample=sample,
            cache_salt=plan.body.get("cache_salt"),
        )
        for sample in range(sampling.n)
    ]


async def merged(choices: Sequence[Choice]) -> AsyncIterator[tuple[Choice, Step]]:
    """Steps of all sequences, as they come.

    Raises:
        ApiError: as soon as one of the sequences fails.
    """
    if len(choices) == 1:
        async for step in choices[0].generation.steps():
            yield choices[0], step
        return
    queue: asyncio.Queue[tuple[Choice, Step | ApiError]] = asyncio.Queue()
    tasks = [asyncio.create_task(_feed(choice, queue)) for choice in choices]
    try:
        unfinished = len(choices)
        while unfinished:
            choice, event = await queue.get()
            if isinstance(event, ApiError):
                raise event
            unfinished -= event.finish_reason is not None
            yield choice, event
    finally:
        for task in tasks:
            task.cancel()


async def _feed(choice: Choice, queue: asyncio.Queue[tuple[Choice, Step | ApiError]]) -> None:
    try:
        async for step in choice.generation.steps():
            queue.put_nowait((choice, step))
            await asyncio.sleep(0)
    except ApiError as error:
        queue.put_nowait((choice, error))


class Answer(msgspec.Struct, kw_only=True):
    """A finished sequence."""

    text: str
    tokens: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[tuple[DecodedLogprob, ...]]


async def collect(choices: Sequence[Choice]) -> list[Answer]:
    """Run all sequences to their end; the answers by index."""
    answers = {
        choice.index: Answer(text="", tokens=[], finish_reason="", stop_reason=None, logprobs=[])
        for choice in choices
    }
    async for choice, step in merged(choices):
        answer = answers[choice.index]
        answer.text += step.text
        if step.token is not None:
            answer.tokens.append(step.token)
        if step.logprobs is not None:
            answer.logprobs.append(step.logprobs)
        if step.finish_reason is not None:
            answer.finish_reason, answer.stop_reason = step.finish_reason, step.stop_reason
    return [answers[index] for index in sorted(answers)]


def usage_wanted(service: Service, body: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether every chunk has it."""
    if service.config.enable_force_include_usage:
        return True, True
    options = body.get("stream_options") or {}
    include = bool(options.get("include_usage"))
    return include, include and bool(options.get("continuous_usage_stats"))


def cached_tokens(service: Service, choices: Sequence[Choice]) -> int | None:
    """Cached prompt tokens, if this server tells them."""
    if not service.config.enable_prompt_tokens_details:
        return None
    return choices[-1].generation.cached_tokens


def request_metrics(service: Service, plan: Plan, choices: Sequence[Choice]) -> Any:
    """Timings of a request with one sequence, in milliseconds, if this server tells them."""
    if not service.config.enable_per_request_metrics or len(choices) != 1:
        return None
    generation = choices[0].generation
    scheduled, first, last = generation.scheduled, generation.first_token, generation.last_token
    if scheduled is None or first is None or last is None:
        return None
    count = len(generation.output.tokens)
    inference = last - scheduled
    return {
        "time_to_first_token_ms": (first - scheduled) * 1000,
        "generation_time_ms": (last - first) * 1000,
        "queue_time_ms": (scheduled - generation.arrived) * 1000,
        "mean_itl_ms": (last - first) / (count - 1) * 1000 if count > 1 else None,
        "tokens_per_second": count / inference if inference > 0 else None,
        "speculative_decoding": None,
    }
