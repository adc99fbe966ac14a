"""What a hardware layer is asked: a task, an input, a model and parameters. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vllm_unified.errors import BadRequestError

CHAT = "chat"
EMBEDDING = "embedding"
LLM = "llm"
_INPUTS = ("input", "prompt", "messages")
_NEED_INPUT = frozenset({CHAT, EMBEDDING, LLM})
# Of English text, in common vocabularies. An estimate only ranks backends, it shuts none out.
_CHARACTERS_PER_TOKEN = 4


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One inference, as backends get it."""

    task: str
    """``llm``, ``chat``, ``embedding``, or a name of the user's."""
    input: Any = None
    """A prompt (text or token ids), several prompts, or messages; for a task of the user's,
    anything."""
    model: str | None = None
    """``None``: whatever the backend serves."""
    parameters: dict[str, Any] = {}
    """Everything else: sampling parameters and settings of the call."""

    @property
    def is_chat(self) -> bool:
        """Whether the input is a conversation."""
        return self.task == CHAT or (self.task != EMBEDDING and are_messages(self.input))

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """The input as a conversation: a text is one message of the user."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        messages: Sequence[Mapping[str, Any]] = self.input
        return messages

    @property
    def fields(self) -> dict[str, Any]:
        """The request as a dict, as the user may have written it."""
        named = {"input": self.input, "model": self.model}
        return {**{name: value for name, value in named.items() if value is not None}} | (
            self.parameters
        )

    def tokens(self) -> tuple[int, bool]:
        """How many tokens prompt and answer take, and whether that is exact or estimated."""
        answer = self.parameters.get("max_completion_tokens", self.parameters.get("max_tokens"))
        prompt, exact = _prompt_tokens(self.input)
        return prompt + (answer if isinstance(answer, int) else 0), exact


def inference_request(task: str, request: Any, params: Mapping[str, Any]) -> InferenceRequest:
    """The request that a task, what was given for it, and keywords stand for; keywords win.

    Raises:
        BadRequestError: there is no input, or more than one.
    """
    if isinstance(request, InferenceRequest):
        return msgspec.structs.replace(
            request, task=task, parameters={**request.parameters, **params}
        )
    fields = {**request, **params} if isinstance(request, Mapping) else {"input": request, **params}
    given = [name for name in _INPUTS if fields.get(name) is not None]
    if len(given) > 1:
        raise BadRequestError(f"the request has {' and '.join(given)}: only one can be the input")
    if not given and task in _NEED_INPUT:
        raise BadRequestError(
            f"the request for {task!r} has no input",
            hint='Such as {"input": "Hello, world!"}; "prompt" and "messages" will do as well.',
        )
    found = next((fields[name] for name in given), None)
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequestError(f"model must be a name, not {model!r}")
    rest = {name: value for name, value in fields.items() if name not in (*_INPUTS, "model")}
    return InferenceRequest(task=task, input=found, model=model, parameters=rest)


def are_messages(value: object) -> bool:
    """Whether this is a conversation."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(item, Mapping) for item in value)
    )


def _prompt_tokens(value: object) -> tuple[int, bool]:
    if isinstance(value, str):
        return len(value) // _CHARACTERS_PER_TOKEN, False
    if isinstance(value, Sequence) and value and all(isinstance(item, int) for item in value):
        return len(value), True
    if are_messages(value):
        assert isinstance(value, Sequence)
        contents = (message.get("content") for message in value)
        texts = [content for content in contents if isinstance(content, str)]
        return sum(map(len, texts)) // _CHARACTERS_PER_TOKEN, False
    if isinstance(value, Sequence):
        return max((_prompt_tokens(item)[0] for item in value if item != value), default=0), False
    return 0, False
