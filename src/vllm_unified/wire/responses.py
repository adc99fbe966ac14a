"""Answers: bytes become typed results.

The structs here have the shape of vLLM's JSON; what callers get is in ``results``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from vllm_unified.errors import GenerationAbortedError, ProtocolError
from vllm_unified.results import (
    ChatResult,
    Choice,
    EmbeddingResult,
    GenerationResult,
    ModelCard,
    ResultMetadata,
    Tokenization,
    TokenLogprob,
    ToolCall,
    Usage,
)
from vllm_unified.wire.failures import error_in_body
from vllm_unified.wire.requests import EMBEDDINGS, WireRequest
from vllm_unified.wire.structure import OutputStructure

T = TypeVar("T")
R = TypeVar("R", bound=GenerationResult)


# None of these can refer back to itself, so the collector need not look at them: gc=False.


class WireLogprobs(msgspec.Struct, gc=False):
    """Both shapes of logprobs: of completions (parallel lists) and of chat (``content``)."""

    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float | None] | None] | None = None
    content: list[WireTokenLogprob] | None = None


class WireTokenLogprob(msgspec.Struct, gc=False):
    token: str
    logprob: float | None = None
    top_logprobs: list[WireTokenLogprob] | None = None


class WireFunction(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class WireToolCall(msgspec.Struct, gc=False):
    id: str | None = None
    index: int = 0
    function: WireFunction | None = None


class WireMessage(msgspec.Struct, gc=False):
    """A chat's message, or its delta in a stream."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[WireToolCall] | None = None


class WireChoice(msgspec.Struct, gc=False):
    index: int = 0
    text: str | None = None
    message: WireMessage | None = None
    delta: WireMessage | None = None
    logprobs: WireLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None


class WirePromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class WireCompletionDetails(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class WireUsage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: WirePromptDetails | None = None
    completion_tokens_details: WireCompletionDetails | None = None


_NO_ERROR = msgspec.Raw(b"null")


class WireGeneration(msgspec.Struct, gc=False):
    """A completion, a chat completion, or a chunk of either's stream."""

    id: str | None = None
    model: str | None = None
    created: int | None = None
    system_fingerprint: str | None = None
    choices: list[WireChoice] | None = None
    usage: WireUsage | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    error: msgspec.Raw = _NO_ERROR


class _WireModels(msgspec.Struct):
    data: list[ModelCard]


class _WireEmbedding(msgspec.Struct):
    index: int
    embedding: tuple[float, ...]


class _WireEmbeddings(msgspec.Struct):
    data: list[_WireEmbedding]
    model: str = ""
    usage: WireUsage | None = None


class _WireDetokenization(msgspec.Struct):
    prompt: str


_GENERATION = msgspec.json.Decoder(WireGeneration)
_MODELS = msgspec.json.Decoder(_WireModels)
_TOKENIZATION = msgspec.json.Decoder(Tokenization)
_DETOKENIZATION = msgspec.json.Decoder(_WireDetokenization)
_EMBEDDINGS = msgspec.json.Decoder(_WireEmbeddings)


def decode_wire(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode JSON of a known shape.

    Raises:
        ProtocolError: not JSON, or of another shape; the message quotes its beginning.
    """
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        start = body[:120].decode("utf-8", "replace")
        raise ProtocolError(f"the answer cannot be read: {error}; it begins {start!r}") from error


def decode_generation(body: bytes, metadata: ResultMetadata) -> GenerationResult:
    """The answer of ``/v1/completions``."""
    return _decode(GenerationResult, None, 1, body, metadata)


def decode_chat(body: bytes, metadata: ResultMetadata) -> ChatResult[Any]:
    """The answer of ``/v1/chat/completions``; ``parsed`` is not filled in."""
    return _decode(ChatResult, None, 1, body, metadata)


def _decode(
    kind: type[R],
    structure: OutputStructure | None,
    wanted: int,
    body: bytes,
    metadata: ResultMetadata,
) -> R:
    wire = decode_wire(body, _GENERATION)
    if wire.error is not _NO_ERROR:
        raise_reported_error(wire)
    choices = _choices(wire, body)
    result = kind(
        id=wire.id or "",
        model=wire.model or "",
        created=wire.created or 0,
        system_fingerprint=wire.system_fingerprint,
        choices=choices,
        usage=usage_of(wire.usage),
        metadata=metadata,
        body=body,
    )
    if structure is not None:
        parsed = structure.parse(result.text, finish_reason=result.finish_reason)
        result = msgspec.structs.replace(result, parsed=parsed)
    if len(choices) < wanted:
        raise ProtocolError(f"the answer has {len(choices)} choices in place of {wanted}")
    return result


def answer_decoder(request: WireRequest) -> Callable[[bytes, ResultMetadata], Any]:
    """What decodes the answer to this request, for embeddings as well."""
    if request.path == EMBEDDINGS:
        return lambda body, metadata: decode_embeddings(body, metadata, inputs=request.choices)
    return generation_decoder(request)


def generation_decoder(
    request: WireRequest,
) -> Callable[[bytes, ResultMetadata], GenerationResult]:
    """What decodes the answer to this request, its ``response_model`` included."""
    kind = ChatResult if request.is_chat else GenerationResult
    return partial(_decode, kind, request.structure, request.choices)


def _choices(wire: WireGeneration, body: bytes) -> tuple[Choice, ...]:
    if not wire.choices:
        start = body[:120].decode("utf-8", "replace")
        raise ProtocolError(f"the answer has no choices; it begins {start!r}")
    ordered = wire.choices
    if len(ordered) > 1:
        ordered = sorted(ordered, key=lambda choice: choice.index)
    choices = []
    for choice in ordered:
        if choice.finish_reason == "abort":
            raise GenerationAbortedError("the server aborted the generation")
        choices.append(_choice(choice, wire.prompt_token_ids))
    return tuple(choices)


def raise_reported_error(wire: WireGeneration) -> None:
    """Raise the error that stands in a 200, if one does."""
    if wire.error is not _NO_ERROR and (error := bytes(wire.error)) != b"null":
        raise error_in_body(error)


def _choice(wire: WireChoice, prompt_token_ids: tuple[int, ...] | None) -> Choice:
    message = wire.message
    if message is None and wire.text is None:
        raise ProtocolError(f"choice {wire.index} of the answer has neither text nor message")
    return Choice(
        index=wire.index,
        text=(wire.text if message is None else message.content) or "",
        finish_reason=wire.finish_reason,
        stop_reason=wire.stop_reason,
        reasoning=None if message is None else message.reasoning or message.reasoning_content,
        tool_calls=() if message is None or not message.tool_calls else _tool_calls(message),
        logprobs=None if wire.logprobs is None else logprobs_of(wire.logprobs),
        token_ids=wire.token_ids,
        prompt_token_ids=wire.prompt_token_ids or prompt_token_ids,
    )


def _tool_calls(message: WireMessage) -> tuple[ToolCall, ...]:
    return tuple(
        ToolCall(
            id=call.id or "", name=call.function.name or "", arguments=call.function.arguments or ""
        )
        for call in message.tool_calls or ()
        if call.function is not None
    )


def usage_of(wire: WireUsage | None) -> Usage:
    """Usage; zeros where the server sent none."""
    if wire is None:
        return Usage()
    prompt, completion = wire.prompt_tokens or 0, wire.completion_tokens or 0
    prompt_details, details = wire.prompt_tokens_details, wire.completion_tokens_details
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=wire.total_tokens or prompt + completion,
        cached_tokens=None if prompt_details is None else prompt_details.cached_tokens,
        reasoning_tokens=None if details is None else details.reasoning_tokens,
    )


def logprobs_of(wire: WireLogprobs | None) -> tuple[TokenLogprob, ...] | None:
    """Log probabilities, from either of the two shapes."""
    if wire is None:
        return None
    if wire.content is not None:
        return tuple(
            TokenLogprob(entry.token, entry.logprob, _top(entry.top_logprobs or ()))
            for entry in wire.content
        )
    tokens = wire.tokens or []
    logprobs = wire.token_logprobs or [None] * len(tokens)
    tops = wire.top_logprobs or [None] * len(tokens)
    return tuple(
        TokenLogprob(token, logprob, {t: p for t, p in (top or {}).items() if p is not None})
        for token, logprob, top in zip(tokens, logprobs, tops, strict=False)
    )


def _top(entries: Sequence[WireTokenLogprob]) -> dict[str, float]:
    return {entry.token: entry.logprob for entry in entries if entry.logprob is not None}


def decode_models(body: bytes) -> list[ModelCard]:
    """The answer of ``GET /v1/models``."""
    return decode_wire(body, _MODELS).data


def decode_tokenization(body: bytes) -> Tokenization:
    """The answer of ``/tokenize``."""
    return decode_wire(body, _TOKENIZATION)


def decode_detokenization(body: bytes) -> str:
    """The answer of ``/detokenize``."""
    return decode_wire(body, _DETOKENIZATION).prompt


def decode_embeddings(body: bytes, metadata: ResultMetadata, *, inputs: int) -> EmbeddingResult:
    """The answer of ``/v1/embeddings`` to this many inputs."""
    wire = decode_wire(body, _EMBEDDINGS)
    ordered = sorted(wire.data, key=lambda item: item.index)
    if [item.index for item in ordered] != list(range(inputs)):
        raise ProtocolError(f"the answer has {len(ordered)} embeddings for {inputs} inputs")
    return EmbeddingResult(
        model=wire.model,
        embeddings=tuple(item.embedding for item in ordered),
        usage=usage_of(wire.usage),
        metadata=metadata,
        body=body,
    )
