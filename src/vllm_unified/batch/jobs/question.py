"""What is asked of a row: its columns become the fields of a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from vllm_unified.batch.files.openai_lines import openai_item
from vllm_unified.batch.jobs.template import Template, check_columns, value_of
from vllm_unified.errors import BadRequestError, ConfigurationError
from vllm_unified.wire.requests import GenerationInput

Item = dict[str, Any]
"""The fields of a request: ``prompt``, ``messages`` or ``input``, and parameters."""
Ask = Callable[[Mapping[str, Any]], Item]
"""Makes a row's item; raises ``BadRequestError`` where it cannot be made."""


class Asking(msgspec.Struct, frozen=True, kw_only=True):
    """How rows are turned into requests.

    Without any of these, a line of OpenAI's batch format is what it says, and in other rows the
    column ``messages`` is asked, or else ``prompt``.
    """

    prompt: str | None = None
    """A template over the columns: ``"Q: {question}\\nA:"``."""
    system: str | None = None
    """A template for the system message; it makes a chat of a prompt."""
    messages: str | None = None
    """The column that has the messages: a list, JSON text of one, or the user's words."""
    chat: bool = False
    """Send the prompt as the user's message."""
    params_column: str | None = None
    """The column with the row's own parameters, a mapping; they win."""


def ask_for(asking: Asking, columns: Sequence[str], *, openai: bool) -> Ask:
    """How each row is asked.

    Args:
        columns: Of the input; where rows differ, of the first one.
        openai: The rows are lines of OpenAI's batch format.

    Raises:
        ConfigurationError: a column is not there, or the options contradict each other.
    """
    if openai:
        if asking != Asking():
            raise ConfigurationError(
                "lines of OpenAI's batch format say themselves what is asked",
                hint="Leave out prompt, system, messages, chat and params_column; or say "
                "input_format='jsonl' (--input-format jsonl) to use the lines as plain rows.",
            )
        return openai_item
    if asking.prompt is not None and asking.messages is not None:
        raise ConfigurationError("prompt and messages are both given: keep one of them")
    if asking.params_column is not None:
        check_columns([asking.params_column], columns, "params_column")
    ask = _prompt(asking, columns) if _is_prompt(asking, columns) else _messages(asking, columns)
    return _with_own(ask, asking.params_column) if asking.params_column else ask


def bare(item: Item) -> GenerationInput:
    """The item without its dict, where it is nothing but a prompt or messages: the way on is
    shorter for those."""
    if len(item) == 1:
        found: GenerationInput = item.get("prompt") or item.get("messages") or item
        return found
    return item


def _is_prompt(asking: Asking, columns: Sequence[str]) -> bool:
    if asking.prompt is not None:
        return True
    if asking.messages is not None or "messages" in columns:
        return False
    if "prompt" in columns:
        return True
    raise ConfigurationError(
        "what is to be asked? The input has neither a column 'prompt' nor 'messages'",
        hint="Give a template, such as prompt='Q: {question}' (--prompt), or messages=COLUMN. "
        f"Its columns are: {', '.join(columns) or 'none'}.",
    )


def _prompt(asking: Asking, columns: Sequence[str]) -> Ask:
    system = _system(asking, columns)
    if asking.prompt is None:
        fill: Callable[[Mapping[str, Any]], Any] = lambda fields: value_of(fields, "prompt")  # noqa: E731
    else:
        template = Template(asking.prompt)
        check_columns(template.columns, columns, "the prompt")
        fill = template.fill
    if system is None and not asking.chat:
        return lambda fields: {"prompt": fill(fields)}

    def ask(fields: Mapping[str, Any]) -> Item:
        return {"messages": _opened(system, fields, [{"role": "user", "content": fill(fields)}])}

    return ask


def _messages(asking: Asking, columns: Sequence[str]) -> Ask:
    column = asking.messages or "messages"
    check_columns([column], columns, "messages")
    system = _system(asking, columns)

    def ask(fields: Mapping[str, Any]) -> Item:
        return {"messages": _opened(system, fields, _conversation(fields, column))}

    return ask


def _system(asking: Asking, columns: Sequence[str]) -> Template | None:
    if asking.system is None:
        return None
    system = Template(asking.system)
    check_columns(system.columns, columns, "the system message")
    return system


def _opened(
    system: Template | None, fields: Mapping[str, Any], messages: Sequence[Any]
) -> Sequence[Any]:
    if system is None:
        return messages
    if isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
        raise BadRequestError("the row has a system message of its own")
    return [{"role": "system", "content": system.fill(fields)}, *messages]


def _conversation(fields: Mapping[str, Any], column: str) -> Sequence[Any]:
    value = value_of(fields, column)
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return [{"role": "user", "content": value}]
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise BadRequestError(f"the column {column!r} is no JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise BadRequestError(f"the column {column!r} has no list of messages")
    return value


def _with_own(ask: Ask, column: str) -> Ask:
    def asked(fields: Mapping[str, Any]) -> Item:
        item = ask(fields)
        own = fields.get(column)
        if isinstance(own, str) and own.strip():
            try:
                own = msgspec.json.decode(own)
            except msgspec.DecodeError as error:
                raise BadRequestError(f"the column {column!r} is no JSON: {error}") from None
        if own in (None, ""):
            return item
        if not isinstance(own, Mapping):
            raise BadRequestError(f"the column {column!r} has no mapping of parameters")
        taken = own.keys() & {"prompt", "messages", "input", "model"}
        if taken:
            raise BadRequestError(f"the column {column!r} must not have {sorted(taken)[0]!r}")
        return {**own, **item}

    return asked
