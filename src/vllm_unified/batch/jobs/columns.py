"""The columns of an answer: which there are, and what stands in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from vllm_unified.batch.files.rows import encode_foreign
from vllm_unified.errors import ConfigurationError, OutputValidationError, VllmError
from vllm_unified.results import ChatResult, EmbeddingResult, GenerationResult

Result = GenerationResult | EmbeddingResult
DEFAULT_COLUMNS = ("text", "finish_reason", "usage", "error")
"""Without ``latency``, ``endpoint``, ``request_id`` and ``model``, which differ from run to run."""


class Kind(msgspec.Struct, frozen=True):
    """A column."""

    type: str
    """``text``, ``integer``, ``number``, ``json``, ``tokens`` (counts) or ``vector``."""
    of: Callable[[Result], Any] | None
    """What an answer has there; ``None`` where it is not the answer that says."""


def _first(name: str) -> Callable[[Result], Any]:
    def of(result: Result) -> Any:
        return getattr(result.choices[0], name) if isinstance(result, GenerationResult) else None

    return of


def _texts(result: Result) -> Any:
    return result.texts if isinstance(result, GenerationResult) else None


def _embedding(result: Result) -> Any:
    return result.embeddings[0] if isinstance(result, EmbeddingResult) else None


def _usage(result: Result) -> dict[str, int]:
    usage = result.usage
    # Without cached_tokens, which depend on what else the server has been asked.
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}


def _tool_calls(result: Result) -> Any:
    return [*result.tool_calls] if isinstance(result, ChatResult) and result.tool_calls else None


COLUMNS: Mapping[str, Kind] = {
    "index": Kind("integer", None),
    "text": Kind("text", _first("text")),
    "texts": Kind("json", _texts),
    "parsed": Kind("json", None),
    "reasoning": Kind("text", _first("reasoning")),
    "tool_calls": Kind("json", _tool_calls),
    "embedding": Kind("vector", _embedding),
    "finish_reason": Kind("text", _first("finish_reason")),
    "usage": Kind("tokens", _usage),
    "error": Kind("text", None),
    "latency": Kind("number", lambda result: round(result.metadata.duration, 4)),
    "endpoint": Kind("text", lambda result: result.metadata.endpoint),
    "request_id": Kind("text", lambda result: result.metadata.request_id),
    "model": Kind("text", lambda result: result.model),
}
"""Every column that can be asked for: ``index`` is the row's position, from 0; ``latency`` is in
seconds, waiting and retries included."""


class AnswerColumns:
    """The columns that an output has of each answer.

    Attributes:
        names: Of the columns in the output, by what stands in them.
        wanted: The columns as they were asked for.
    """

    def __init__(self, wanted: Sequence[str]) -> None:
        """Args:
            wanted: Columns of :data:`COLUMNS`, or ``column=name`` for another name in the output.

        Raises:
            ConfigurationError: there is no such column, or one stands twice.
        """
        self.wanted = tuple(wanted)
        self.names: dict[str, str] = {}
        for each in wanted:
            column, _, name = each.partition("=")
            if column not in COLUMNS:
                raise ConfigurationError(
                    f"there is no column {column!r} of answers",
                    hint=f"Columns: {', '.join(COLUMNS)}; column=name gives one another name.",
                )
            if column in self.names or (name or column) in self.names.values():
                raise ConfigurationError(f"the column {each!r} is asked for twice")
            self.names[column] = name or column
        if not self.names:
            raise ConfigurationError("an output needs at least one column of the answers")
        self._of = [(COLUMNS[column].of, column, name) for column, name in self.names.items()]

    @property
    def types(self) -> dict[str, str]:
        """The type of each column, by its name in the output."""
        return {name: COLUMNS[column].type for column, name in self.names.items()}

    def collisions(self, columns: Sequence[str]) -> list[str]:
        """Columns of the input that have the name of one of these."""
        mine = set(self.names.values())
        return [column for column in columns if column in mine]

    def encode(
        self,
        position: int,
        result: Result | None,
        error: VllmError | None = None,
        parsed: Any = None,
    ) -> bytes:
        """The columns as one JSON object."""
        own = {
            "index": position,
            "parsed": parsed,
            "error": None if error is None else f"{type(error).__name__}: {error.message}",
            "text": error.text if isinstance(error, OutputValidationError) else None,
        }
        found = {
            name: own.get(column) if of is None or result is None else of(result)
            for of, column, name in self._of
        }
        return msgspec.json.encode(found, enc_hook=encode_foreign)
