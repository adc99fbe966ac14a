"""POST /v1/chat/completions/batch: several conversations, one choice for each."""

from __future__ import annotations

from typing import Any

from vllm_unified.simulator.api.chat import conversation, whole
from vllm_unified.simulator.api.generation import Plan, collect, priority_of, running
from vllm_unified.simulator.errors import invalid
from vllm_unified.simulator.fields import check_fields, list_of, message
from vllm_unified.simulator.http import Exchange, Request
from vllm_unified.simulator.sampling import CHAT_FIELDS
from vllm_unified.simulator.service import Service, json_object, request_id, send_json

_FIELDS = CHAT_FIELDS | {"messages": list_of(list_of(message, low=1), low=1)}


async def create(service: Service, request: Request, exchange: Exchange) -> None:
    """Answer all conversations at once; a ``stream`` is ignored, as the real server does."""
    body = json_object(request)
    _check_batch(body)
    body = check_fields(body, _FIELDS, required=("messages",))
    body.pop("stream", None)
    adapter = service.models.find(body.get("model"))
    service.engine.check(1)
    pairs = [conversation(service, body, messages) for messages in body["messages"]]
    plan = Plan(
        body=body,
        request_id=f"chatcmpl-{request_id(request, body)}",
        model=adapter.name if adapter else service.config.names[0],
        adapter=adapter,
        priority=priority_of(request, body),
        prompts=[prompt for prompt, _ in pairs],
        samplings=[sampling for _, sampling in pairs],
    )
    with running(service, plan) as choices:
        answers = await collect(choices)
        payload = whole(service, plan, choices, answers)
    await send_json(exchange, payload)


def _check_batch(body: dict[str, Any]) -> None:
    if body.get("use_beam_search"):
        raise invalid(
            "Batch chat completions do not support beam search. "
            "Please set `use_beam_search` to False.",
            "use_beam_search",
        )
    if (n := body.get("n", 1)) not in (None, 1):
        message = "Batch chat completions do not support `n > 1`. Please set `n` to 1."
        raise invalid(message, "n", n)
