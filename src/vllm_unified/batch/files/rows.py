"""A row of input, whatever file it is from."""

from __future__ import annotations

from typing import Any

import msgspec


class Row(msgspec.Struct, frozen=True, gc=False):
    """One row: its place, its bytes, and its columns."""

    position: int
    """From 0, counted without blank lines."""
    line: int
    """Of the file, from 1; for Parquet the row's number, from 1."""
    raw: bytes
    """The row as one JSON object: of JSON lines the line itself, of others what it stands for."""
    fields: dict[str, Any] | None
    """By column; ``None`` for a row that cannot be read."""
    problem: str | None = None
    """Why it cannot be read, with its line number."""


def encode_foreign(value: Any) -> Any:
    """What JSON has no form for (as Parquet has them) as text."""
    return str(value)


def row_json(fields: dict[str, Any]) -> bytes:
    """Columns as one JSON object."""
    return msgspec.json.encode(fields, enc_hook=encode_foreign)
