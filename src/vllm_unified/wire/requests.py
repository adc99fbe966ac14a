"""Requests: prompt, messages and parameters become the body of one HTTP request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vllm_unified.errors import BadRequestError
from vllm_unified.settings import priority_number
from vllm_unified.wire.parameters import check_names
from vllm_unified.wire.structure import OutputStructure

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
"""Text, token ids, a list of texts, or a list of token id lists."""
Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}`` and what else the OpenAI chat format has."""
GenerationInput = Prompt | Mapping[str, Any] | Sequence[Message]
"""A prompt, a list of messages, or a dict with ``prompt`` or ``messages`` and parameters."""

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
_ENGINE_PATHS = frozenset({COMPLETIONS, CHAT, EMBEDDINGS})

# Text and token ids, checked when they are counted.
_NOTHING: Mapping[str, Any] = {}
_FIELDS = dict[str, msgspec.Raw]
_LONG_LISTS = frozenset({"prompt", "input", "tokens"})


class WireRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One HTTP request, ready to be sent, as often as need be."""

    method: str
    path: str
    body: bytes | None = None
    model: str | None = None
    """The model that was asked for."""
    stream: bool = False
    choices: int = 1
    """How many choices a complete answer has: prompts times ``n``."""
    structure: OutputStructure | None = None
    """What the text has to parse as."""
    request_id: str | None = None
    """The caller's own; otherwise one is made when it is sent."""
    priority: int = 0
    """In our line and, under its priority policy, in the server's; lower is earlier."""
    session: str | None = None
    """The conversation it belongs to, for routing."""
    tokens: int = 0
    """About how many it takes, prompt and answer, for a quota; 4 bytes are a token."""
    fields: Mapping[str, Any] = msgspec.field(default_factory=dict)
    """The body of a stream, before it became JSON: what a continuation is made of."""

    @property
    def generates(self) -> bool:
        """Whether the engine has work with it."""
        return self.path in _ENGINE_PATHS

    @property
    def is_chat(self) -> bool:
        """Whether the answer comes as messages."""
        return self.path == CHAT


class RequestTemplate:
    """Requests that are all alike but for their prompt, or their messages.

    Parameters are checked and encoded once, which is most of what a request costs.
    """

    __slots__ = ("_asked_for", "_beginning", "_is_chat", "_start", "like")

    def __init__(self, like: WireRequest, beginning: bytes) -> None:
        self.like = like
        """What it was made of."""
        self._beginning = beginning
        self._is_chat = like.is_chat
        self._start = len(beginning)
        self._asked_for = like.tokens - len(like.body or b"") // 4

    @classmethod
    def of(
        cls, fields: Mapping[str, Any], *, structure: OutputStructure | None = None
    ) -> RequestTemplate | None:
        """A template of a request with one prompt, or messages, in these fields; ``None`` where
        requests cannot be made by it.

        Raises:
            BadRequestError: a parameter cannot be sent.
        """
        name = "messages" if "messages" in fields else "prompt"
        like = generation_request(fields, structure=structure)
        ending = encode({name: fields[name]})[1:]
        if like.body is None or not like.body.endswith(ending):
            return None  # extra_body comes last, and may replace anything
        return cls(like, like.body[: -len(ending)] + b'"' + name.encode() + b'":')

    def request(self, value: Any) -> WireRequest:
        """The request with this prompt (text or token ids), or these messages.

        Raises:
            BadRequestError: it cannot be sent.
        """
        like = self.like
        if self._is_chat:
            _check_messages(value)
        elif not isinstance(value, str) and not _are_token_ids(value):
            raise _no_prompt(value)
        body = self._beginning + encode_value(value) + b"}"
        return WireRequest(
            method="POST",
            path=like.path,
            body=body,
            model=like.model,
            choices=like.choices,
            structure=like.structure,
            request_id=like.request_id,
            priority=like.priority,
            session=like.session,
            tokens=len(body) // 4 + self._asked_for,
        )

    def joined(self, requests: Sequence[WireRequest]) -> WireRequest:
        """One request for the prompts of these, which this template has made: all text, or all
        token ids. Its answer has the token ids of each."""
        like = self.like
        prompts = b",".join([(request.body or b"")[self._start : -1] for request in requests])
        body = b'{"return_token_ids":true,' + self._beginning[1:] + b"[" + prompts + b"]}"
        return WireRequest(
            method="POST",
            path=like.path,
            body=body,
            model=like.model,
            choices=like.choices * len(requests),
            priority=like.priority,
            session=like.session,
            tokens=len(body) // 4 + self._asked_for * len(requests),
        )


def generation_fields(data: GenerationInput) -> dict[str, Any]:
    """The fields of a request that ``data`` stands for: its own, ``messages`` or ``prompt``."""
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, Sequence) and data and all(isinstance(item, Mapping) for item in data):
        return {"messages": data}
    return {"prompt": data}


def generation_request(
    fields: Mapping[str, Any], *, stream: bool = False, structure: OutputStructure | None = None
) -> WireRequest:
    """A chat if the fields have ``messages``, a completion otherwise.

    Args:
        structure: What the answer has to be; for chats only.

    Raises:
        BadRequestError: the prompt or a parameter cannot be sent.
    """
    rest = dict(fields)
    has_prompt = "prompt" in rest or rest.get("prompt_embeds") is not None
    if ("messages" in rest) == has_prompt:
        raise BadRequestError(
            "the request has both a prompt and messages"
            if has_prompt
            else "the request has neither a prompt nor messages"
        )
    if "messages" in rest:
        return chat_request(rest.pop("messages"), rest, stream=stream, structure=structure)
    if structure is not None:
        raise BadRequestError(
            "response_model is for messages, and this is a prompt",
            hint='Give [{"role": "user", "content": ...}], or structured_outputs={...}.',
        )
    return _completion(rest.pop("prompt", None), rest, stream=stream)


def _completion(prompt: Any, params: Mapping[str, Any], *, stream: bool) -> WireRequest:
    body = dict(params)
    prompts = 1
    if prompt is not None or "prompt_embeds" not in body:
        prompts = _count_prompts(prompt)
        body["prompt"] = prompt
    return _build(COMPLETIONS, body, prompts=prompts, stream=stream)


def _count_prompts(prompt: Any) -> int:
    """How many prompts it holds; raises where it is none."""
    if isinstance(prompt, str):
        return 1
    if isinstance(prompt, Sequence) and prompt:
        if _are_token_ids(prompt):
            return 1
        if all(isinstance(item, str) for item in prompt):
            return len(prompt)
        if all(isinstance(item, Sequence) and item and _are_token_ids(item) for item in prompt):
            return len(prompt)
    raise _no_prompt(prompt)


def _no_prompt(prompt: object) -> BadRequestError:
    return BadRequestError(
        f"the prompt cannot be sent: {_shown(prompt)}",
        hint="A prompt is a string, a list of token ids, a list of strings or a list of "
        "token id lists, and not empty.",
    )


def _are_token_ids(items: Sequence[Any]) -> bool:
    return not isinstance(items, str | bytes | bytearray) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def chat_request(
    messages: Sequence[Message] | str,
    params: Mapping[str, Any],
    *,
    stream: bool = False,
    structure: OutputStructure | None = None,
) -> WireRequest:
    """A chat. A plain string is one user message.

    Raises:
        BadRequestError: the messages or a parameter cannot be sent.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    _check_messages(messages)
    body = dict(params)
    if structure is not None:
        if body.get("response_format") is not None:
            raise BadRequestError("give response_model or response_format, not both")
        body["response_format"] = structure.response_format
    if body.get("tools") == []:
        del body["tools"]
    body["messages"] = messages  # last, where a template looks for them
    return _build(CHAT, body, prompts=1, stream=stream, structure=structure)


def _check_messages(messages: Any) -> None:
    if not messages or not (type(messages) is list or isinstance(messages, Sequence)):
        raise BadRequestError(
            "messages must be a list with at least one message",
            hint='For example [{"role": "user", "content": "Hello"}].',
        )
    for index, message in enumerate(messages):
        is_mapping = type(message) is dict or isinstance(message, Mapping)
        if not is_mapping or not isinstance(message.get("role"), str):
            raise BadRequestError(
                f"messages[{index}] is not a message: {_shown(message)}",
                hint='A message looks like {"role": "user", "content": "Hello"}.',
            )


def _build(
    path: str,
    body: dict[str, Any],
    *,
    prompts: int,
    stream: bool,
    structure: OutputStructure | None = None,
) -> WireRequest:
    extra = body.pop("extra_body", None)
    if "stream" in body and bool(body.pop("stream")) != stream:
        raise BadRequestError(
            f"this call {'streams' if stream else 'does not stream'}; stream= cannot change that",
            hint="stream() and stream_chat() stream; generate() and chat() do not.",
        )
    check_names(body)
    body = {name: value for name, value in body.items() if value is not None}
    if extra is not None:
        if not isinstance(extra, Mapping):
            raise BadRequestError("extra_body must be a mapping")
        body.update(extra)
    model, request_id = body.get("model"), body.pop("request_id", None)
    for name, value in (("model", model), ("request_id", request_id)):
        if value is not None and not (isinstance(value, str) and value.isprintable()):
            raise BadRequestError(f"{name} must be a string in one line, not {_shown(value)}")
    priority = 0
    if "priority" in body:
        priority = body["priority"] = priority_number("priority", body["priority"])
    if stream:
        body["stream"] = True
        body.setdefault("stream_options", {"include_usage": True})
    encoded = encode(body)
    choices = prompts * _samples(body)
    return WireRequest(
        method="POST",
        path=path,
        body=encoded,
        model=model,
        stream=stream,
        choices=choices,
        structure=structure,
        request_id=request_id,
        priority=priority,
        session=_session(body),
        tokens=len(encoded) // 4 + _asked_for(body) * choices,
        fields=body if stream else _NOTHING,
    )


def _asked_for(body: Mapping[str, Any]) -> int:
    tokens = body.get("max_completion_tokens", body.get("max_tokens"))
    return tokens if isinstance(tokens, int) else 0


def _session(body: Mapping[str, Any]) -> str | None:
    session = body.get("session_id")
    return session if isinstance(session, str) else None


def _samples(body: Mapping[str, Any]) -> int:
    n = body.get("n", 1)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise BadRequestError(f"n must be a whole number of at least 1, not {n!r}")
    return n


def tokenize_request(
    data: str | Sequence[Message], model: str | None, params: Mapping[str, Any]
) -> WireRequest:
    """Token ids of a text, or of messages under the model's chat template."""
    if isinstance(data, str):
        body: dict[str, Any] = {"prompt": data}
    else:
        _check_messages(data)
        body = {"messages": data}
    return _post("/tokenize", {**body, "model": model, **params})


def detokenize_request(tokens: Sequence[int], model: str | None) -> WireRequest:
    """The text of token ids."""
    if not isinstance(tokens, Sequence) or not _are_token_ids(tokens):
        raise BadRequestError(f"tokens must be a list of token ids, not {_shown(tokens)}")
    return _post("/detokenize", {"tokens": tokens, "model": model})


def embedding_request(data: Prompt, model: str | None, params: Mapping[str, Any]) -> WireRequest:
    """Embeddings of one input or of several."""
    check_names(params, also=frozenset({"encoding_format", "dimensions", "embed_dtype"}))
    count = _count_prompts(data)
    return _post(
        EMBEDDINGS,
        {"input": data, "model": model, "encoding_format": "float", **params},
        choices=count,
    )


def with_model(request: WireRequest, model: str) -> bytes:
    """The request's body, for another model."""
    fields: dict[str, msgspec.Raw] = msgspec.json.decode(request.body or b"{}", type=_FIELDS)
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def get_request(path: str) -> WireRequest:
    """A GET without a body."""
    return WireRequest(method="GET", path=path)


def _post(path: str, body: dict[str, Any], *, choices: int = 1) -> WireRequest:
    body = {name: value for name, value in body.items() if value is not None}
    return WireRequest(
        method="POST", path=path, body=encode(body), model=body.get("model"), choices=choices
    )


def encode(body: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8.

    Raises:
        BadRequestError: a value has no place in JSON, is NaN or infinite, or holds half of a
            surrogate pair.
    """
    return encode_value(body, check=body)


def encode_value(value: Any, *, check: Mapping[str, Any] = _NOTHING) -> bytes:
    """As :func:`encode`, for any value; the numbers in ``check`` have to be finite."""
    try:
        encoded = _ENCODER.encode(value)
        # msgspec sends null for NaN and infinity.
        if b"null" in encoded:
            for name, field in check.items():
                if name not in _LONG_LISTS:
                    _check_finite(name, field)
        return encoded
    except BadRequestError:
        raise
    except UnicodeEncodeError as error:
        raise BadRequestError(
            f"the text cannot be sent as UTF-8: {error.reason} at character {error.start}",
            hint="It holds half of a surrogate pair: decode its source with the right encoding.",
        ) from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadRequestError(f"the request cannot be sent as JSON: {error}") from None


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRequestError(f"{name} must be a finite number, not {value}")
    elif isinstance(value, Mapping):
        for inner in value.values():
            _check_finite(name, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_finite(name, inner)


def _encode_foreign(value: Any) -> Any:
    """Pydantic models and numpy values stand for what they hold."""
    for method in ("model_dump", "tolist"):
        dump = getattr(value, method, None)
        if callable(dump):
            return dump()
    raise TypeError(f"a {type(value).__name__} has no place in JSON")


_ENCODER = msgspec.json.Encoder(enc_hook=_encode_foreign)
