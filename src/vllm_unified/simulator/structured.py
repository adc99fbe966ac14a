"""Texts that satisfy a constraint: a choice, a regular expression, a JSON schema. Pure.

The smallest instance is enough: what is proved with it is how a client asks and reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from vllm_unified.simulator.errors import ApiError, invalid
from vllm_unified.simulator.sampling import Sampling

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_NOTHING = {
    **dict.fromkeys(("json", "regex", "choice", "grammar", "json_object")),
    **dict.fromkeys(("disable_any_whitespace", "disable_additional_properties"), False),
    **dict.fromkeys(("whitespace_pattern", "structural_tag", "_backend")),
    "_backend_was_auto": False,
}


def constraint_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The structured outputs that a request asks for, ``response_format`` included.

    Raises:
        ApiError: none where one is needed, or a malformed one.
    """
    constraint = body.get("structured_outputs")
    kind = (body.get("response_format") or {}).get("type")
    if kind == "json_object":
        constraint = {"json_object": True}
    elif kind == "json_schema":
        constraint = {"json": body["response_format"]["json_schema"].get("schema")}
    if constraint is None:
        return None
    if not any(constraint.get(name) is not None for name in _KINDS):
        raise ApiError(
            "You must use one kind of structured outputs constraint but none are specified: "
            f"{_NOTHING}"
        )
    return dict(constraint)


def check_count(body: Mapping[str, Any], parameter: str | None) -> None:
    """At most one kind of constraint.

    Raises:
        ApiError: for two.
    """
    constraint = body.get("structured_outputs")
    if not isinstance(constraint, dict):
        return
    if sum(constraint.get(name) is not None for name in ("json", "regex", "choice")) > 1:
        raise invalid(
            "You can only use one kind of constraints for structured outputs "
            "('json', 'regex' or 'choice').",
            parameter,
        )


def forced_text(constraint: Mapping[str, Any], draw: int) -> str | None:
    """A text that satisfies the constraint; ``None`` where that is not simulated.

    Args:
        constraint: as :func:`constraint_of` returns it.
        draw: a number that chooses among several.

    Raises:
        ApiError: an impossible constraint, which the real engine refuses too.
    """
    if (choices := constraint.get("choice")) is not None:
        if not choices:
            raise ApiError("Choice '[]' cannot be an empty list")
        return str(choices[draw % len(choices)])
    if (pattern := constraint.get("regex")) is not None:
        return _from_regex(str(pattern))
    if (schema := constraint.get("json")) is not None:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        return json.dumps(instance(schema, schema), ensure_ascii=False)
    return '{"answer": "ok"}' if constraint.get("json_object") else None


def apply_constraint(sampling: Sampling, body: Mapping[str, Any], draw: int) -> Sampling:
    """The sampling with the text that the request's constraint forces, or why it cannot.

    Raises:
        ApiError: a constraint that names nothing; what the engine refuses comes later.
    """
    constraint = constraint_of(body)
    if constraint is None:
        return sampling
    try:
        text = forced_text(constraint, draw)
    except ApiError as error:
        return msgspec.structs.replace(sampling, constraint_error=error.message)
    return force(sampling, text)


def force(sampling: Sampling, text: str | None) -> Sampling:
    """The sampling, made to say a text and to end after it."""
    if text is None:
        return sampling
    return msgspec.structs.replace(sampling, forced_text=text, ignore_eos=False)


def instance(schema: Any, root: Any) -> Any:
    """A small value that is valid under a JSON schema.

    Args:
        schema: the schema, or a boolean.
        root: the document that ``$ref`` refers to.
    """
    if not isinstance(schema, dict):
        return None
    if "$ref" in schema:
        return instance(_resolve(schema["$ref"], root), root)
    for keyword in ("const", "default"):
        if keyword in schema:
            return schema[keyword]
    for keyword in ("enum", "examples"):
        if schema.get(keyword):
            return schema[keyword][0]
    for keyword in ("anyOf", "oneOf"):
        if schema.get(keyword):
            return instance(schema[keyword][0], root)
    if schema.get("allOf"):
        merged: dict[str, Any] = {}
        for part in schema["allOf"]:
            merged |= part
        return instance(merged, root)
    return _of_type(schema, root)


def _resolve(reference: str, root: Any) -> Any:
    target = root
    for part in reference.removeprefix("#/").split("/"):
        target = target[part.replace("~1", "/").replace("~0", "~")]
    return target


def _of_type(schema: dict[str, Any], root: Any) -> Any:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    if kind is None:
        kind = "object" if "properties" in schema else "string"
    makers: dict[str, Callable[[dict[str, Any], Any], Any]] = {
        "object": _object,
        "array": _array,
        "string": _string,
        "integer": lambda s, _: int(_number(s, 1)),
        "number": lambda s, _: _number(s, 0.01),
        "boolean": lambda *_: True,
        "null": lambda *_: None,
    }
    return makers[kind](schema, root)


def _object(schema: dict[str, Any], root: Any) -> dict[str, Any]:
    properties = schema.get("properties", {})
    names = schema.get("required", list(properties))
    return {name: instance(properties.get(name, {}), root) for name in names}


def _array(schema: dict[str, Any], root: Any) -> list[Any]:
    length = max(schema.get("minItems", 1), 0)
    if "prefixItems" in schema:
        return [instance(item, root) for item in schema["prefixItems"]]
    return [instance(schema.get("items", {}), root) for _ in range(length)]


def _string(schema: dict[str, Any], _root: Any) -> str:
    if "pattern" in schema:
        return _from_regex(schema["pattern"])
    formats = {"date": "2026-01-01", "date-time": "2026-01-01T00:00:00Z", "email": "a@b.co"}
    formats |= {"uuid": "00000000-0000-4000-8000-000000000000", "time": "00:00:00Z"}
    text = formats.get(schema.get("format", ""), "text")
    text = text.ljust(schema.get("minLength", 0), "x")
    return text[: schema["maxLength"]] if "maxLength" in schema else text


def _number(schema: dict[str, Any], step: float) -> float:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    value = low if low is not None else min(high, 1) if high is not None else 1
    if value == schema.get("exclusiveMinimum"):
        value += step
    if value == schema.get("exclusiveMaximum"):
        value -= step
    multiple = schema.get("multipleOf")
    return -(-value // multiple) * multiple if multiple else value


def _from_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ApiError(f'Grammar error: invalid regex "{pattern}": {error}') from None
    # The parser of the standard library is the only one at hand; it has no public name.
    from re import _parser  # type: ignore[attr-defined]

    return _render(_parser.parse(pattern))


def _render(parsed: Sequence[tuple[Any, Any]]) -> str:
    return "".join(_render_part(str(operation), argument) for operation, argument in parsed)


def _render_part(operation: str, argument: Any) -> str:
    if operation == "LITERAL":
        return chr(argument)
    if operation == "IN":
        return _member(argument)
    if operation in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, inner = argument
        return _render(inner) * (low or (1 if int(high) > 0 else 0))
    if operation == "SUBPATTERN":
        return _render(argument[3])
    if operation == "BRANCH":
        return _render(argument[1][0])
    return "a" if operation in ("ANY", "NOT_LITERAL") else ""


_CATEGORIES = {"CATEGORY_DIGIT": "1", "CATEGORY_SPACE": " ", "CATEGORY_WORD": "a"}


def _member(members: Sequence[tuple[Any, Any]]) -> str:
    operation, argument = str(members[0][0]), members[0][1]
    if operation == "LITERAL":
        return chr(argument)
    if operation == "RANGE":
        return chr(argument[0])
    if operation == "CATEGORY":
        return _CATEGORIES.get(str(argument), "-")
    excluded = {chr(arg) for op, arg in members if str(op) == "LITERAL"}
    return next(letter for letter in "ab1-_ xyz" if letter not in excluded)
