"""What callers get: typed, immutable results.

Fields that vLLM adds in the future stay reachable: a result keeps its ``body``, and ``raw`` is all
of it as a dict.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from vllm_unified.errors import Attempt, OutputValidationError

T = TypeVar("T")


class TokenLogprob(msgspec.Struct, frozen=True):
    """One generated token and its log probability (natural logarithm)."""

    token: str
    logprob: float | None
    """``None`` for the first token of an echoed prompt, which nothing predicts."""
    top: dict[str, float]
    """The most likely tokens at this position, where they were asked for."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool that the model asks for."""

    id: str
    name: str
    arguments: str
    """JSON, as the model wrote it."""

    def parsed_arguments(self) -> dict[str, Any]:
        """The arguments as a dict.

        Raises:
            OutputValidationError: the model did not write a JSON object.
        """
        try:
            return msgspec.json.decode(self.arguments or "{}", type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise OutputValidationError(
                f"the arguments for {self.name} are not a JSON object: {error}",
                text=self.arguments,
                hint='vLLM holds the arguments to their schema where the function has "strict": '
                "True; elsewhere any JSON will do.",
            ) from error


class Usage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens that a request took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int | None = None
    """Of the prompt, served from the prefix cache (``--enable-prompt-tokens-details``)."""
    reasoning_tokens: int | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One generated answer."""

    index: int
    """``prompt_index * n + sample_index``."""
    text: str
    """For a chat: the message's content."""
    finish_reason: str | None = None
    """``stop``, ``length``, ``tool_calls`` or ``repetition``."""
    stop_reason: str | int | None = None
    """The stop string or token id that matched."""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    """Of the answer, with ``return_token_ids``."""
    prompt_token_ids: tuple[int, ...] | None = None
    """Of the prompt, with ``return_token_ids``."""


class ContinuationNote(msgspec.Struct, frozen=True, kw_only=True):
    """A stream lost its server, and went on at another."""

    from_endpoint: str
    """Address of the server that it lost."""
    to_endpoint: str
    tokens: int
    """How many tokens had come by then, from all servers so far."""
    reason: str
    """Why, as ``"ClassName: message"``."""


class ResultMetadata(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How a result came about."""

    endpoint: str = ""
    """Address of the server that answered."""
    request_id: str = ""
    """Sent as ``X-Request-Id``; the server's log names it."""
    duration: float = 0.0
    """Seconds from the call to the whole answer, waiting and retries included."""
    time_to_first_token: float | None = None
    """Seconds from the call to the first text or token; only for streams."""
    attempts: tuple[Attempt, ...] = ()
    continuations: tuple[ContinuationNote, ...] = ()
    """For a stream: where it went on at another server."""


class _Result(msgspec.Struct, frozen=True, kw_only=True):
    metadata: ResultMetadata = ResultMetadata()
    body: bytes = b""
    """The JSON as the server sent it; empty for what a stream was assembled from."""

    @property
    def raw(self) -> dict[str, Any]:
        """All that the server sent, fields that have no attribute here included."""
        return msgspec.json.decode(self.body, type=dict[str, Any]) if self.body else {}

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__ if name != "body"
        )
        return f"{type(self).__name__}({shown})"


class GenerationResult(_Result, frozen=True, kw_only=True):
    """The answer to a prompt, or to several."""

    id: str = ""
    model: str = ""
    """The name under which the server knows the model that answered."""
    created: int = 0
    """Seconds since the Unix epoch, by the server's clock."""
    system_fingerprint: str | None = None
    choices: tuple[Choice, ...]
    """At least one."""
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def texts(self) -> list[str]:
        """Text of every choice."""
        return [choice.text for choice in self.choices]

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason


class ChatResult(GenerationResult, Generic[T], frozen=True, kw_only=True):
    """The answer to messages."""

    parsed: T = None  # type: ignore[assignment]
    """The first choice as ``response_model``; ``None`` without one."""

    @property
    def content(self) -> str:
        """Content of the first choice; ``""`` where there are only tool calls."""
        return self.choices[0].text

    @property
    def reasoning(self) -> str | None:
        """The first choice's reasoning, on servers with a reasoning parser."""
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first choice's tool calls."""
        return self.choices[0].tool_calls

    @property
    def message(self) -> dict[str, Any]:
        """The first choice as a message, to go on with in the next call's ``messages``."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A piece of a tool call: the first has id and name, the others more of the arguments."""

    index: int
    """Which tool call of the choice."""
    id: str = ""
    name: str = ""
    arguments: str = ""


class StreamChunk(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A piece of a stream; it always says something."""

    text: str
    """New text; ``""`` where the chunk has only reasoning, tokens or the end."""
    index: int = 0
    """The choice that it belongs to."""
    reasoning: str | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: str | None = None
    """Set on the choice's last chunk."""
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | None = None
    """With ``return_token_ids``."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    data: bytes = b""
    """The event's JSON as the server sent it."""

    @property
    def raw(self) -> dict[str, Any]:
        """All of the event, fields that have no attribute here included."""
        return msgspec.json.decode(self.data, type=dict[str, Any])

    def __repr__(self) -> str:
        shown = [
            f"{name}={value!r}"
            for name in self.__struct_fields__
            if name != "data" and ((value := getattr(self, name)) or name == "text")
        ]
        return f"StreamChunk({', '.join(shown)})"


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A name that a server answers to."""

    id: str
    root: str | None = None
    """What the server loaded: a path or repository."""
    parent: str | None = None
    """For a LoRA adapter: its base model."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together."""


class Tokenization(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a text."""

    tokens: tuple[int, ...]
    count: int
    max_model_len: int
    token_strs: tuple[str, ...] | None = None
    """With ``return_token_strs``."""


class EmbeddingResult(_Result, frozen=True, kw_only=True):
    """One vector for each input, in order."""

    model: str
    embeddings: tuple[tuple[float, ...], ...]
    usage: Usage
