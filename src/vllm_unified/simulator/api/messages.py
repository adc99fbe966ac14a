"""The chat template: messages to token ids, in the ChatML form. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_unified.simulator.errors import ApiError, invalid
from vllm_unified.simulator.tokenizer import encode

_NO_TEMPLATE = (
    "Chat template is passed with request, but --trust-request-chat-template is not set. "
    "Refused request with untrusted chat template."
)


def check_template(body: Mapping[str, Any]) -> None:
    """A request may not bring a template of its own.

    Raises:
        ApiError: when it does.
    """
    if body.get("chat_template") or "chat_template" in (body.get("chat_template_kwargs") or {}):
        raise ApiError(_NO_TEMPLATE)


def check_generation_prompt(body: Mapping[str, Any]) -> None:
    """A final message is continued or answered, not both.

    Raises:
        ApiError: for both.
    """
    if body.get("continue_final_message") and body.get("add_generation_prompt"):
        raise invalid(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
        )


def render(body: Mapping[str, Any], messages: list[Any], model: str) -> str:
    """The text that the model reads for a conversation.

    Raises:
        ApiError: no messages, or images for a model of text.
    """
    if not messages:
        raise ApiError(
            "Cannot apply chat template to an empty conversation. Provide at least one message."
        )
    parts = [f"<|im_start|>tools\n{_names(body)}<|im_end|>\n"] if _names(body) else []
    for message in messages:
        text = content_text(message.get("content"), model)
        parts.append(f"<|im_start|>{message.get('role', '')}\n{text}<|im_end|>\n")
    if body.get("continue_final_message"):
        parts[-1] = parts[-1].removesuffix("<|im_end|>\n")
    elif body.get("add_generation_prompt", True):
        parts.append("<|im_start|>assistant\n")
    return "".join(parts)


def prompt_tokens(body: Mapping[str, Any], messages: list[Any], model: str) -> list[int]:
    """Token ids of a conversation.

    Raises:
        ApiError: as :func:`render`.
    """
    return encode(render(body, messages, model))


def content_text(content: Any, model: str) -> str:
    """The text of a message's content, parts joined by newlines.

    Raises:
        ApiError: a part that is no text.
    """
    if not isinstance(content, list):
        return content or ""
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type", "text") in ("text", "input_text", "output_text", "refusal"):
            texts.append(part.get("text") or part.get("refusal") or "")
        else:
            raise ApiError(f"{model} is not a multimodal model")
    return "\n".join(texts)


def _names(body: Mapping[str, Any]) -> str:
    return ", ".join(tool["function"]["name"] for tool in body.get("tools") or ())
