"""POST /v1/chat/completions."""

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
from vllm_unified.simulator.api.messages import (
    check_generation_prompt,
    check_template,
    content_text,
    prompt_tokens,
    render,
)
from vllm_unified.simulator.api.tools import call_id, check_parser, check_tools, forced_call
from vllm_unified.simulator.errors import ApiError, invalid
from vllm_unified.simulator.fields import check_fields
from vllm_unified.simulator.http import Exchange, Request
from vllm_unified.simulator.model import weights
from vllm_unified.simulator.output import DecodedLogprob, Step
from vllm_unified.simulator.sampling import (
    CHAT_FIELDS,
    Sampling,
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
from vllm_unified.simulator.structured import apply_constraint, check_count, force

NO_MESSAGE = {
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "reasoning": None,
}
"""Fields of a message that the simulator never fills."""


async def create(service: Service, request: Request, exchange: Exchange) -> None:
    """Answer one chat request, as a whole or as a stream."""
    plan = _plan(service, request)
    if plan.stream:
        await _stream(service, plan, exchange)
        return
    with running(service, plan) as choices:
        answers = await collect(choices)
        payload = whole(service, plan, choices, answers)
        payload["prompt_token_ids"] = plan.prompts[0] if plan.body.get("return_token_ids") else None
        payload["prompt_text"] = prompt_text(plan)
    await send_json(exchange, payload, headers=load_header(service, request))


def _plan(service: Service, request: Request) -> Plan:
    """Everything that vLLM checks before it answers, in its order."""
    body = json_object(request)
    check_combinations(body)
    body = check_fields(body, CHAT_FIELDS, required=("messages",))
    adapter = service.models.find(body.get("model"))
    service.engine.check(body.get("n", 1))
    check_parser(body, service.config)
    check_template(body)
    prompt, sampling = conversation(service, body, body["messages"])
    return Plan(
        body=body,
        request_id=f"chatcmpl-{request_id(request, body)}",
        model=adapter.name if adapter else service.config.names[0],
        adapter=adapter,
        priority=priority_of(request, body),
        prompts=[prompt],
        samplings=[sampling],
    )


def check_combinations(body: dict[str, Any]) -> None:
    """Rules between fields, which come before the types of single fields.

    Raises:
        ApiError: for the first rule that is broken.
    """
    check_generation_prompt(body)
    check_tools(body)
    check_count(body, None)
    check_prompt_logprobs(body)
    _check_logprobs(body)
    check_stream_options(body)
    check_response_format(body)
    check_cache_salt(body)


def _check_logprobs(body: Mapping[str, Any]) -> None:
    top = body.get("top_logprobs")
    if top is None:
        return
    if not isinstance(top, int | float):
        raise invalid("`top_logprobs` must be an integer.", "top_logprobs", top)
    if top < 0 and top != -1:
        raise invalid("`top_logprobs` must be a positive value or -1.", "top_logprobs", top)
    if top and not body.get("logprobs"):
        message = "when using `top_logprobs`, `logprobs` must be set to true."
        raise invalid(message, "top_logprobs")


def conversation(
    service: Service, body: dict[str, Any], messages: list[Any]
) -> tuple[list[int], Sampling]:
    """Prompt and sampling of one conversation.

    Raises:
        ApiError: a prompt that does not fit, or parameters out of range.
    """
    limit = service.config.max_model_len
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    wanted = body.get(name)
    check_max_tokens(wanted, name, limit)
    tokens = truncated(prompt_tokens(body, messages, service.config.names[0]), body, limit)
    check_length(len(tokens), limit, from_text=True)
    room = limit - len(tokens)
    logprobs = body.get("top_logprobs", 0) if body.get("logprobs") else None
    sampling = sampling_of(body, room if wanted is None else min(wanted, room), logprobs)
    if (call := forced_call(body)) is not None:
        return tokens, force(sampling, call["arguments"])
    return tokens, apply_constraint(sampling, body, weights(*tokens[-8:]))


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
    include_usage, continuous = usage_wanted(service, plan.body)
    base: dict[str, Any] = {"id": plan.request_id, "object": "chat.completion.chunk"}
    base |= {"created": int(time.time()), "model": plan.model}
    prompt = len(plan.prompts[0])
    produced = dict.fromkeys((choice.index for choice in choices), 0)
    opened = False
    async for choice, step in merged(choices):
        if not opened:
            opened = True
            for chunk in _opening(plan, choices, base, prompt if continuous else None):
                await exchange.event(_event(chunk))
        first = produced[choice.index] == 0
        produced[choice.index] += step.token is not None
        chunk = {**base, "choices": [_delta(plan, choice, step, first=first)]}
        if step.finish_reason is not None and not include_usage:
            chunk["system_fingerprint"] = service.system_fingerprint
        if continuous:
            chunk["usage"] = _usage_so_far(prompt, produced[choice.index])
        await exchange.event(_event(chunk), tokens=1)
    if include_usage:
        total = usage(
            prompt, sum(produced.values()), cached_tokens(service, choices), details=False
        )
        last = {**base, "choices": [], "usage": total}
        last["system_fingerprint"] = service.system_fingerprint
        if (metrics := request_metrics(service, plan, choices)) is not None:
            last["metrics"] = {name: value for name, value in metrics.items() if value is not None}
        await exchange.event(_event(last))


def _event(chunk: Any) -> bytes:
    return b"data: %b\n\n" % encode_json(chunk)


def _usage_so_far(prompt: int, completion: int) -> dict[str, Any]:
    return usage(prompt, completion, details=False) | {"completion_tokens_details": None}


def _opening(
    plan: Plan, choices: Sequence[Choice], base: dict[str, Any], prompt: int | None
) -> list[dict[str, Any]]:
    """The chunks before the first token: the role, and the echo if asked for."""
    role, body = role_of(plan.body, plan.body["messages"]), plan.body
    chunks = []
    for choice in choices:
        delta = {"role": role, "content": ""}
        opening = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = {**base, "choices": [opening]}
        if prompt is not None:
            chunk["usage"] = _usage_so_far(prompt, 0)
        chunk["prompt_token_ids"] = plan.prompts[0] if body.get("return_token_ids") else None
        chunk["prompt_text"] = prompt_text(plan)
        chunks.append(chunk)
    if echo := echoed(plan.body, plan.body["messages"], plan.model):
        for choice in choices:
            delta = {"content": echo}
            entry = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            chunks.append({**base, "choices": [entry]})
    return chunks


def _delta(plan: Plan, choice: Choice, step: Step, *, first: bool) -> dict[str, Any]:
    body = plan.body
    call = forced_call(body)
    delta: dict[str, Any] = {"content": step.text}
    if call is not None:
        delta = _call_delta(call, step, first=first)
    entry: dict[str, Any] = {"index": choice.index, "delta": delta}
    entry["logprobs"] = None
    if step.logprobs is not None:
        entry["logprobs"] = _logprobs(body, [step.logprobs])
    entry["finish_reason"] = step.finish_reason
    if step.finish_reason is not None:
        entry["finish_reason"] = _finish(body, step.finish_reason)
        entry["stop_reason"] = step.stop_reason
    tokens = [] if step.token is None else [step.token]
    entry["token_ids"] = tokens if body.get("return_token_ids") else None
    return entry


def _call_delta(call: dict[str, str], step: Step, *, first: bool) -> dict[str, Any]:
    if first:
        function = {"name": call["name"], "arguments": step.text}
        opening = {"id": call_id(), "type": "function", "index": 0, "function": function}
        return {"tool_calls": [opening]}
    if not step.text:
        return {}
    return {"tool_calls": [{"index": 0, "function": {"arguments": step.text}}]}


def _finish(body: Mapping[str, Any], reason: str) -> str:
    required = body.get("tool_choice") == "required" and reason == "stop"
    return "tool_calls" if required else reason


def whole(
    service: Service, plan: Plan, choices: Sequence[Choice], answers: Sequence[Answer]
) -> dict[str, Any]:
    """The body of an answer that is no stream; the batch endpoint has the same."""
    prompt = sum(map(len, plan.prompts))
    completion = sum(len(answer.tokens) for answer in answers)
    return {
        "id": plan.request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": plan.model,
        "choices": [_choice(plan, index, answer) for index, answer in enumerate(answers)],
        "service_tier": None,
        "system_fingerprint": service.system_fingerprint,
        "usage": usage(prompt, completion, cached_tokens(service, choices)),
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": request_metrics(service, plan, choices),
    }


def _choice(plan: Plan, index: int, answer: Answer) -> dict[str, Any]:
    body = plan.body
    messages = body["messages"]
    if messages and isinstance(messages[0], list):
        messages = messages[index]
    content = echoed(body, messages, plan.model) + answer.text
    role = role_of(body, messages)
    message: dict[str, Any] = {"role": role, "content": content, **NO_MESSAGE}
    if (call := forced_call(body)) is not None:
        function = {"name": call["name"], "arguments": answer.text}
        message = {"role": role, "content": "", **NO_MESSAGE}
        message |= {"tool_calls": [{"id": call_id(), "type": "function", "function": function}]}
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(body, answer.logprobs) if body.get("logprobs") else None,
        "finish_reason": _finish(body, answer.finish_reason),
        "stop_reason": answer.stop_reason,
        "token_ids": answer.tokens if body.get("return_token_ids") else None,
        "routed_experts": None,
    }


def role_of(body: Mapping[str, Any], messages: list[Any]) -> str:
    """Whose message is being written."""
    if body.get("add_generation_prompt", True):
        return "assistant"
    return str(messages[-1].get("role"))


def echoed(body: Mapping[str, Any], messages: list[Any], model: str) -> str:
    """The text of the last message that an answer repeats, if it is asked to."""
    if not body.get("echo") or messages[-1].get("role") != role_of(body, messages):
        return ""
    return content_text(messages[-1].get("content"), model)


def prompt_text(plan: Plan) -> str | None:
    """The rendered prompt, if asked for."""
    if not plan.body.get("return_prompt_text"):
        return None
    return render(plan.body, plan.body["messages"], plan.model)


def _logprobs(
    body: Mapping[str, Any], entries: Sequence[tuple[DecodedLogprob, ...]]
) -> dict[str, Any]:
    as_ids = bool(body.get("return_tokens_as_token_ids"))
    count = body.get("top_logprobs", 0)
    content = []
    for entry in entries:
        alternatives = entry if count == -1 else entry[:count]
        own = _token(entry[0], as_ids=as_ids)
        content.append(
            own | {"top_logprobs": [_token(other, as_ids=as_ids) for other in alternatives]}
        )
    return {"content": content}


def _token(entry: DecodedLogprob, *, as_ids: bool) -> dict[str, Any]:
    text = f"token_id:{entry.token}" if as_ids else entry.text
    return {"token": text, "logprob": entry.logprob, "bytes": list(entry.text.encode())}
