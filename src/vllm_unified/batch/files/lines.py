"""Rows and their answers as lines of text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from vllm_unified.batch.files.formats import DELIMITERS, Format
from vllm_unified.batch.files.rows import Row, encode_foreign, row_json


class Joined(msgspec.Struct, frozen=True, gc=False):
    """A row of output: one of the input, and its answer."""

    row: Row | None
    """``None`` where nothing of the row is to be kept."""
    answer: bytes
    """Its columns as a JSON object."""


class Lines(Protocol):
    """A format of lines."""

    def head(self) -> bytes:
        """What stands before all lines."""

    def line(self, joined: Joined) -> bytes:
        """One row, with its line feed."""


def lines_for(format: Format, columns: Sequence[str], keep: Sequence[str] | None) -> Lines:
    """How a format is written.

    Args:
        columns: Of the output, in order; only for those that need to know them beforehand.
        keep: Columns of the input that the output has; ``None`` for all.
    """
    if format == "openai":
        return OpenAILines()
    if format in DELIMITERS:
        return CsvLines(columns, DELIMITERS[format])
    return JsonLines(keep)


class JsonLines:
    """An object on each line: the row's columns as they were written, then the answer's."""

    def __init__(self, keep: Sequence[str] | None) -> None:
        self._keep = keep

    def head(self) -> bytes:
        """Nothing."""
        return b""

    def line(self, joined: Joined) -> bytes:
        """One row, with its line feed."""
        row, answer = joined.row, joined.answer
        if row is None or row.fields is None:
            return answer + b"\n"
        raw = row.raw
        if self._keep is not None:
            fields = row.fields
            raw = row_json({name: fields[name] for name in self._keep if name in fields})
        start = raw[:-1].rstrip()
        return start + (b"," if len(start) > 1 else b"") + answer[1:] + b"\n"


class OpenAILines:
    """The answers as they are: each is a line already."""

    def head(self) -> bytes:
        """Nothing."""
        return b""

    def line(self, joined: Joined) -> bytes:
        """One row, with its line feed."""
        return joined.answer + b"\n"


class CsvLines:
    """Delimited text: what is no text stands there as JSON, and nothing as nothing."""

    def __init__(self, columns: Sequence[str], delimiter: str) -> None:
        self._columns = columns
        self._buffer = io.StringIO()
        self._writer = csv.writer(self._buffer, delimiter=delimiter, lineterminator="\n")

    def head(self) -> bytes:
        """The names of the columns."""
        return self._row(self._columns)

    def line(self, joined: Joined) -> bytes:
        """One row, with its line feed (in a text there may be more)."""
        fields = joined_fields(joined)
        return self._row([_cell(fields.get(column)) for column in self._columns])

    def _row(self, cells: Sequence[str]) -> bytes:
        self._buffer.seek(0)
        self._buffer.truncate()
        self._writer.writerow(cells)
        return self._buffer.getvalue().encode()


def joined_fields(joined: Joined) -> dict[str, Any]:
    """The columns of a row of output."""
    answer: dict[str, Any] = msgspec.json.decode(joined.answer)
    row: Mapping[str, Any] = (joined.row.fields if joined.row else None) or {}
    return {**row, **answer}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return msgspec.json.encode(value, enc_hook=encode_foreign).decode()
