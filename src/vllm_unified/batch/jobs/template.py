"""A prompt out of a row's columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vllm_unified.errors import BadRequestError, ConfigurationError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Template:
    """Text with ``{column}`` in it; ``{{`` and ``}}`` stand for braces.

    Attributes:
        columns: The columns that it needs, in order.
    """

    def __init__(self, text: str) -> None:
        """Raises:
        ConfigurationError: a brace is open, or nothing is between two.
        """
        self._pieces: list[tuple[bool, str]] = []
        end = 0
        for found in _PIECE.finditer(text):
            self._add(False, text[end : found.start()])
            end = found.end()
            piece = found.group()
            if piece in ("{{", "}}"):
                self._add(False, piece[0])
            elif found[1]:
                self._add(True, found[1])
            else:
                raise ConfigurationError(
                    f"the template has {piece!r} at character {found.start()}: {text!r}",
                    hint="A column is {name}; a brace itself is written twice, {{ or }}.",
                )
        self._add(False, text[end:])
        self.columns = tuple(dict.fromkeys(text for is_column, text in self._pieces if is_column))

    def _add(self, is_column: bool, text: str) -> None:
        if text:
            self._pieces.append((is_column, text))

    def fill(self, fields: Mapping[str, Any]) -> str:
        """The text for this row. What is no text stands there as JSON.

        Raises:
            BadRequestError: the row has no such column, or nothing in it.
        """
        return "".join(
            _text(fields, text) if is_column else text for is_column, text in self._pieces
        )


def _text(fields: Mapping[str, Any], column: str) -> str:
    value = value_of(fields, column)
    return value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()


def value_of(fields: Mapping[str, Any], column: str) -> Any:
    """What the row has in this column.

    Raises:
        BadRequestError: there is no such column, or nothing in it.
    """
    value = fields.get(column)
    if value is None:
        what = "nothing in the column" if column in fields else "no column"
        raise BadRequestError(f"the row has {what} {column!r}")
    return value


def check_columns(wanted: Sequence[str], there: Sequence[str], what: str) -> None:
    """See that the input has these columns.

    Raises:
        ConfigurationError: names those that it lacks, and those that there are.
    """
    missing = [column for column in wanted if column not in there]
    if missing:
        raise ConfigurationError(
            f"{what} names {', '.join(map(repr, missing))}, which the input does not have",
            hint=f"Its columns are: {', '.join(there) or 'none'}.",
        )
