"""Which columns an output has, and of what type, where its format wants to know it beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_KINDS: dict[type, str] = {str: "text", bool: "switch", int: "integer", float: "number"}


class Shape:
    """The columns that rows turned out to have.

    Attributes:
        types: ``text``, ``switch``, ``integer``, ``number``, ``json``, or ``""`` for a column in
            which nothing has been yet.
    """

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self.types: dict[str, str] = dict.fromkeys(columns, "")

    def see(self, fields: Mapping[str, Any]) -> None:
        """Take a row into account."""
        types = self.types
        for name, value in fields.items():
            known = types.setdefault(name, "")
            if value is not None:
                kind = _kind(value)
                if kind != known:
                    types[name] = common_kind(known, kind)


def _kind(value: object) -> str:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "json"
    return _KINDS.get(type(value), "json")


def common_kind(known: str, kind: str) -> str:
    """The type of a column in which there is both; ``""`` is nothing yet."""
    if known == kind or not kind:
        return known
    if not known:
        return kind
    if {known, kind} == {"integer", "number"}:
        return "number"
    return "json"
