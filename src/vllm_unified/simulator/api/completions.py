"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_unified.simulator.api.generation import (
    Answer,
    Choice,
    Plan,
    cached_tokens,
    check_cache_salt,
    check_prompt_logprobs,
    check_response_format,
    check_stream_options,
    collect,
    merged,
    priority_of,
    request_metrics,
    running,
    truncated,
    usage_wanted,
)
from vllm_unified.simulator.errors import ApiError, invalid
from vllm_unified.simulator.fields import check_fields
from vllm_unified.simulator.http import Exchange, Request
from vllm_unified.simulator.model import weights
from vllm_unified.simulator.output import DecodedLogprob, Step
from vllm_unified.simulator.sampling import (
    COMPLETION_FIELDS,
    Sampling,
    check_characters,
    check_length,
    check_max_tokens,
    sampling_of,
)
from vllm_unified.simulator.service import (
    STREAM_TYPE,
    Service,
    encode_json,
    json_object,
    load_header,
    request_id,
    send_json,
    usage,
)
from vllm_unified.simulator.structured import apply_constraint, check_count
from vllm_unified.simulator.tokenizer import decode, encode

DEFAULT_MAX_TOKENS = 16
"""Tokens generated when a completion names no number."""


async def create(service: Service, request: Request, exchange: Exchange) -> None:
    """Answer one completion request, as a whole or as a stream."""
    plan = _plan(service, request)
    if plan.stream:
        await _stream(service, plan, exchange)
        return
    with running(service, plan) as choices:
        answers = await collect(choices)
        payload = _whole(service, plan, choices, answers)
    await send_json(exchange, payload, headers=load_header(service, request))


def _plan(service: Service, request: Request) -> Plan:
    """Everything that vLLM checks before it answers, in its order."""
    body = json_object(request)
    _check_combinations(body)
    body = check_fields(body, COMPLETION_FIELDS)
    body.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    if body.get("stream") and body.get("use_beam_search"):
        raise ApiError("Streaming is not currently supported with beam search")
    adapter = service.models.find(body.get("model"))
    service.engine.check(body.get("n", 1))
    prompts = _prompts(service, body)
    samplings = [_sampling(service, body, prompt) for prompt in prompts]
    return Plan(
        body=body,
        request_id=f"cmpl-{request_id(request, body)}",
        model=adapter.name if adapter else service.config.names[0],
        adapter=adapter,
        priority=priority_of(request, body),
        prompts=prompts,
        samplings=samplings,
    )


def _check_combinations(body: dict[str, Any]) -> None:
    """Pydantic runs these validators last to first, before it looks at single fields."""
    if not body.get("prompt") and body.get("prompt") != [] and not body.get("prompt_embeds"):
        raise invalid("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    check_stream_options(body)
    check_prompt_logprobs(body)
    logprobs = body.get("logprobs")
    if logprobs is not None and not isinstance(logprobs, int | float):
        raise invalid("`logprobs` must be an integer.", "logprobs", logprobs)
    if logprobs is not None and logprobs < 0 and logprobs != -1:
        raise invalid("`logprobs` must be a positive value or -1.", "logprobs", logprobs)
    check_count(body, "structured_outputs")
    check_response_format(body)
    check_cache_salt(body)


def _prompts(service: Service, body: Mapping[str, Any]) -> list[list[int]]:
    limit = service.config.max_model_len
    if body.get("suffix") is not None:
        message = "suffix is only supported for models with FIM completion rendering"
        raise ApiError(message, param="suffix")
    check_max_tokens(body["max_tokens"], "max_tokens", limit)
    prompt = body["prompt"]
    if prompt == []:
        raise ApiError("You must pass at least one prompt")
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [_tokens(item, body, limit) for item in ([prompt] if single else prompt)]


def _tokens(prompt: str | list[int], body: Mapping[str, Any], limit: int) -> list[int]:
    from_text = isinstance(prompt, str)
    if isinstance(prompt, str):
        check_characters(prompt, limit)
    tokens = truncated(encode(prompt) if isinstance(prompt, str) else prompt, body, limit)
    check_length(len(tokens), limit, from_text=from_text)
    if not tokens:
        raise ApiError("The decoder prompt cannot be empty")
    return tokens


def _sampling(service: Service, body: dict[str, Any], prompt: list[int]) -> Sampling:
    room = service.config.max_model_len - len(prompt)
    only_echo = body.get("echo") and body["max_tokens"] == 0
    max_tokens = 1 if only_echo else min(body["max_tokens"], room)
    sampling = sampling_of(body, max_tokens, body.get("logprobs"))
    return apply_constraint(sampling, body, weights(*prompt[-8:]))


async def _stream(service: Service, plan: Plan, exchange: Exchange) -> None:
    await exchange.start(200, [STREAM_TYPE])
    try:
        with running(service, plan) as choices:
            await _send_events(service, plan, choices, exchange)
    except ApiError as error:
        await exchange.event(error.frame())
    await exchange.event(b"data: [DONE]\n\n")
    await exchange.end()


async def _send_events(
    service: Service, plan: Plan, choices: list[Choice], exchange: Exchange
) -> None:
    created = int(time.time())
    include_usage, continuous = usage_wanted(service, plan.body)
    base: dict[str, Any] = {"id": plan.request_id, "object": "text_completion"}
    base |= {"created": created, "model": plan.model}
    offsets = dict.fromkeys((choice.index for choice in choices), 0)
    produced = dict(offsets)
    async for choice, step in merged(choices):
        first = produced[choice.index] == 0
        produced[choice.index] += step.token is not None
        chunk = {**base, "choices": [_delta(plan, choice, step, offsets, first=first)]}
        if continuous:
            prompt = len(choice.generation.job.prompt)
            chunk["usage"] = usage(prompt, produced[choice.index], details=False)
        if step.finish_reason is not None and not include_usage:
            chunk["system_fingerprint"] = service.system_fingerprint
        await exchange.event(_event(chunk), tokens=1)
    if include_usage:
        await exchange.event(_event(_last_chunk(service, plan, choices, base, produced)))


def _event(chunk: Any) -> bytes:
    return b"data: %b\n\n" % encode_json(chunk)


def _delta(
    plan: Plan, choice: Choice, step: Step, offsets: dict[int, int], *, first: bool
) -> dict[str, Any]:
    body, prompt = plan.body, choice.generation.job.prompt
    tokens = [] if step.token is None else [step.token]
    text, echoed = step.text, first and body.get("echo")
    if echoed:
        text = _echo(body, prompt) + ("" if body["max_tokens"] == 0 else text)
    logprobs = None
    if step.logprobs is not None:
        entries: list[tuple[DecodedLogprob, ...] | None] = [step.logprobs]
        if echoed:
            entries = [*_prompt_entries(prompt), step.logprobs]
        shown = [*prompt, *tokens] if echoed else tokens
        logprobs = _logprobs(body, shown, entries, offsets[choice.index])
        offsets[choice.index] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
    return {
        "index": choice.index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": step.finish_reason,
        "stop_reason": step.stop_reason,
        "prompt_token_ids": prompt if first and body.get("return_token_ids") else None,
        "token_ids": tokens if body.get("return_token_ids") else None,
    }


def _last_chunk(
    service: Service,
    plan: Plan,
    choices: Sequence[Choice],
    base: dict[str, Any],
    produced: dict[int, int],
) -> dict[str, Any]:
    prompt = sum(map(len, plan.prompts))
    cached = cached_tokens(service, choices)
    total = usage(prompt, sum(produced.values()), cached, details=False)
    chunk = {**base, "choices": [], "usage": total}
    chunk["system_fingerprint"] = service.system_fingerprint
    if (metrics := request_metrics(service, plan, choices)) is not None:
        chunk["metrics"] = {name: value for name, value in metrics.items() if value is not None}
    return chunk


def _whole(
    service: Service, plan: Plan, choices: Sequence[Choice], answers: Sequence[Answer]
) -> dict[str, Any]:
    prompt = sum(map(len, plan.prompts))
    completion = sum(len(answer.tokens) for answer in answers)
    return {
        "id": plan.request_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": plan.model,
        "choices": [
            _choice(plan, choice, answer) for choice, answer in zip(choices, answers, strict=True)
        ],
        "service_tier": None,
        "system_fingerprint": service.system_fingerprint,
        "usage": usage(prompt, completion, cached_tokens(service, choices)),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": request_metrics(service, plan, choices),
    }


def _choice(plan: Plan, choice: Choice, answer: Answer) -> dict[str, Any]:
    body, prompt = plan.body, choice.generation.job.prompt
    text, tokens = answer.text, answer.tokens
    entries: list[tuple[DecodedLogprob, ...] | None] = list(answer.logprobs)
    if body.get("echo"):
        only_prompt = body["max_tokens"] == 0
        text = _echo(body, prompt) + ("" if only_prompt else text)
        tokens = prompt if only_prompt else [*prompt, *tokens]
        entries = [*_prompt_entries(prompt), *([] if only_prompt else entries)]
    wanted = body.get("logprobs") is not None
    return {
        "index": choice.index,
        "text": text,
        "logprobs": _logprobs(body, tokens, entries, 0) if wanted else None,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "token_ids": answer.tokens if body.get("return_token_ids") else None,
        "prompt_logprobs": _prompt_logprobs(body, prompt),
        "prompt_token_ids": prompt if body.get("return_token_ids") else None,
        "routed_experts": None,
    }


def _echo(body: Mapping[str, Any], prompt: list[int]) -> str:
    """The prompt's text, which vLLM leaves out when it returns token ids."""
    return "" if body.get("return_token_ids") else decode(prompt, skip_special=False)


def _prompt_entries(prompt: list[int]) -> list[tuple[DecodedLogprob, ...] | None]:
    """Log probabilities of a prompt: none for its first token, -1 for the others."""
    known = [(DecodedLogprob(token, decode([token]), -1.0),) for token in prompt[1:]]
    return [None, *known]


def _prompt_logprobs(body: Mapping[str, Any], prompt: list[int]) -> list[Any] | None:
    wanted = body.get("prompt_logprobs")
    if wanted is None and body.get("echo"):
        wanted = body.get("logprobs")
    if wanted is None:
        return None
    result: list[Any] = []
    for entry in _prompt_entries(prompt):
        if entry is None:
            result.append(None)
        else:
            own = entry[0]
            value = {"logprob": own.logprob, "rank": 1, "decoded_token": own.text}
            result.append({str(own.token): value})
    return result


def _logprobs(
    body: Mapping[str, Any],
    tokens: Sequence[int],
    entries: Sequence[tuple[DecodedLogprob, ...] | None],
    offset: int,
) -> dict[str, list[Any]]:
    as_ids = bool(body.get("return_tokens_as_token_ids"))
    result: dict[str, list[Any]] = {
        "text_offset": [],
        "token_logprobs": [],
        "tokens": [],
        "top_logprobs": [],
    }
    for token, entry in zip(tokens, entries, strict=True):
        text = f"token_id:{token}" if as_ids else entry[0].text if entry else decode([token])
        result["text_offset"].append(offset)
        result["tokens"].append(text)
        result["token_logprobs"].append(entry[0].logprob if entry else None)
        result["top_logprobs"].append(_top(entry, as_ids=as_ids) if entry else None)
        offset += len(text)
    return result


def _top(entry: tuple[DecodedLogprob, ...], *, as_ids: bool) -> dict[str, float]:
    return {f"token_id:{o.token}" if as_ids else o.text: o.logprob for o in entry}
