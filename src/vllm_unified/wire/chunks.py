"""The chunks of a stream, and the result that they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from vllm_unified.errors import GenerationAbortedError, PartialOutput, StreamEnding
from vllm_unified.results import (
    ChatResult,
    Choice,
    GenerationResult,
    ResultMetadata,
    StreamChunk,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from vllm_unified.wire.responses import (
    WireChoice,
    WireGeneration,
    WireMessage,
    decode_wire,
    logprobs_of,
    raise_reported_error,
    usage_of,
)

_CHUNK = msgspec.json.Decoder(WireGeneration)
_DONE = b"[DONE]"
_NOTHING = WireMessage()


class _ToolCallParts:
    """A tool call whose arguments arrive in pieces."""

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.arguments: list[str] = []

    def add(self, delta: ToolCallDelta) -> None:
        self.id = self.id or delta.id
        self.name = self.name or delta.name
        self.arguments.append(delta.arguments)

    def call(self) -> ToolCall:
        return ToolCall(id=self.id, name=self.name, arguments="".join(self.arguments))


class _ChoiceParts:
    """One choice, as far as it has come."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.tool_calls: dict[int, _ToolCallParts] = {}
        self.logprobs: list[TokenLogprob] | None = None
        self.token_ids: list[int] | None = None
        self.prompt_token_ids: tuple[int, ...] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    def add(self, chunk: StreamChunk, prompt_token_ids: tuple[int, ...] | None) -> None:
        self.text.append(chunk.text)
        if chunk.reasoning:
            self.reasoning.append(chunk.reasoning)
        for delta in chunk.tool_calls:
            self.tool_calls.setdefault(delta.index, _ToolCallParts()).add(delta)
        if chunk.logprobs is not None:
            self.logprobs = (self.logprobs or []) + list(chunk.logprobs)
        if chunk.token_ids is not None:
            self.token_ids = self.token_ids or []
            self.token_ids.extend(chunk.token_ids)
        self.prompt_token_ids = self.prompt_token_ids or prompt_token_ids
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.stop_reason = self.stop_reason if chunk.stop_reason is None else chunk.stop_reason

    def choice(self) -> Choice:
        return Choice(
            index=self.index,
            text="".join(self.text),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            reasoning="".join(self.reasoning) or None,
            tool_calls=tuple(parts.call() for _, parts in sorted(self.tool_calls.items())),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            token_ids=None if self.token_ids is None else tuple(self.token_ids),
            prompt_token_ids=self.prompt_token_ids,
        )


class ChunkWatcher(Protocol):
    """Sees every chunk first, and says what of it may be shown."""

    def begin(self, prompt_token_ids: Sequence[int]) -> None:
        """The prompt's tokens."""

    def feed(self, chunk: StreamChunk) -> StreamChunk | None:
        """What may be shown of this chunk; ``None`` for nothing."""


class ChunkAssembler:
    """What has come of one stream, and whether that is all."""

    def __init__(
        self,
        *,
        choices: int,
        is_chat: bool,
        watcher: ChunkWatcher | None = None,
        shows_token_ids: bool = True,
    ) -> None:
        """
        Args:
            choices: How many choices a complete stream finishes.
            shows_token_ids: ``False`` if they were asked for only for the watcher.
        """
        self._expected = choices
        self._watcher = watcher
        self._shows_token_ids = shows_token_ids
        self._is_chat = is_chat
        self._choices: dict[int, _ChoiceParts] = {}
        self._head = WireGeneration()
        self.usage: Usage | None = None
        self.saw_done = False
        """Whether ``[DONE]`` came. It says that nothing more will come, not that all is well:
        vLLM sends it after an error frame as well."""

    def feed(self, data: bytes) -> list[StreamChunk]:
        """The chunks in the data of one event: none, one, or one for each choice in it.

        Raises:
            VllmError: the data is an error frame; the class is that of the same HTTP status.
            GenerationAbortedError: the engine ended a choice with "abort".
            ProtocolError: the data is no JSON, or of another shape.
        """
        if data == _DONE:
            self.saw_done = True
            return []
        wire = decode_wire(data, _CHUNK)
        raise_reported_error(wire)
        if not self._head.id:
            self._head = wire
        if wire.usage is not None:
            self.usage = usage_of(wire.usage)
        return [chunk for choice in wire.choices or () if (chunk := self._take(choice, wire, data))]

    def _take(self, wire: WireChoice, head: WireGeneration, data: bytes) -> StreamChunk | None:
        if wire.finish_reason == "abort":
            raise GenerationAbortedError("the server aborted the generation")
        delta = wire.delta or _NOTHING
        chunk = StreamChunk(
            text=wire.text or delta.content or "",
            index=wire.index,
            reasoning=delta.reasoning or delta.reasoning_content,
            tool_calls=_deltas(delta),
            finish_reason=wire.finish_reason,
            stop_reason=wire.stop_reason,
            token_ids=wire.token_ids,
            logprobs=logprobs_of(wire.logprobs),
            data=data,
        )
        prompt_token_ids = wire.prompt_token_ids or head.prompt_token_ids
        if self._watcher is None:
            return self.add(chunk, prompt_token_ids)
        if prompt_token_ids is not None:
            self._watcher.begin(prompt_token_ids)
        shown = self._watcher.feed(chunk) or StreamChunk(text="", index=chunk.index)
        return self.add(shown, prompt_token_ids)

    def add(
        self, chunk: StreamChunk, prompt_token_ids: tuple[int, ...] | None = None
    ) -> StreamChunk | None:
        """Take a chunk in; what of it says something to the caller."""
        if not self._shows_token_ids:
            chunk = msgspec.structs.replace(chunk, token_ids=None)
            prompt_token_ids = None
        parts = self._choices.get(chunk.index)
        if parts is None:
            parts = self._choices[chunk.index] = _ChoiceParts(chunk.index)
        parts.add(chunk, prompt_token_ids)
        return chunk if says_something(chunk) else None

    @property
    def is_complete(self) -> bool:
        """Whether every choice that was asked for has its finish reason."""
        finished = sum(parts.finish_reason is not None for parts in self._choices.values())
        return finished >= self._expected

    @property
    def text(self) -> str:
        """Text of choice 0 so far."""
        parts = self._choices.get(0)
        return "" if parts is None else "".join(parts.text)

    def partial(self, ending: StreamEnding) -> PartialOutput:
        """What has come, for an error that ends the stream."""
        choices = [parts.choice() for _, parts in sorted(self._choices.items())]
        first = next((choice for choice in choices if choice.index == 0), None)
        return PartialOutput(
            ending=ending,
            text=first.text if first else "",
            texts=tuple(choice.text for choice in choices),
            token_ids=(first.token_ids or ()) if first else (),
        )

    def result(self, metadata: ResultMetadata) -> GenerationResult:
        """The result so far; for a chat a :class:`ChatResult`."""
        kind: Any = ChatResult if self._is_chat else GenerationResult
        result: GenerationResult = kind(
            id=self._head.id or "",
            model=self._head.model or "",
            created=self._head.created or 0,
            system_fingerprint=self._head.system_fingerprint,
            choices=tuple(parts.choice() for _, parts in sorted(self._choices.items())),
            usage=self.usage or Usage(),
            metadata=metadata,
        )
        return result


def _deltas(delta: WireMessage) -> tuple[ToolCallDelta, ...]:
    if not delta.tool_calls:
        return ()
    return tuple(
        ToolCallDelta(
            index=call.index,
            id=call.id or "",
            name=(call.function.name if call.function else None) or "",
            arguments=(call.function.arguments if call.function else None) or "",
        )
        for call in delta.tool_calls
    )


def says_something(chunk: StreamChunk) -> bool:
    """Whether there is anything in it for the caller."""
    return bool(
        chunk.text
        or chunk.finish_reason
        or chunk.token_ids
        or chunk.reasoning
        or chunk.tool_calls
        or chunk.logprobs
    )
