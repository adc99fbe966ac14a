"""Types of request fields, checked and converted as pydantic does in its lax mode.

Only the kinds that the requests use; errors are pydantic's dicts with a dotted ``loc``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from vllm_unified.simulator.errors import ApiError, validation_error

Errors = list[dict[str, Any]]
Check = Callable[[Any, str, Errors], Any]
"""Takes a value and its place, returns the converted value and adds what is wrong to the errors."""

INT64 = 2**63
_TRUE = ("1", "true", "t", "yes", "y", "on")
_FALSE = ("0", "false", "f", "no", "n", "off")


def _error(kind: str, loc: str, message: str, value: object, **ctx: object) -> dict[str, Any]:
    error: dict[str, Any] = {"type": kind, "loc": loc, "msg": message, "input": value}
    return error | {"ctx": ctx} if ctx else error


def text(value: Any, loc: str, errors: Errors) -> Any:
    """A string."""
    if not isinstance(value, str):
        errors.append(_error("string_type", loc, "Input should be a valid string", value))
    return value


def integer(low: int | None = None, high: int | None = None) -> Check:
    """A whole number, or a string of one, within bounds."""

    def check(value: Any, loc: str, errors: Errors) -> Any:
        number = _to_integer(value, loc, errors)
        if isinstance(number, int):
            _check_bounds(number, value, loc, errors)
        return number

    def _check_bounds(number: int, value: Any, loc: str, errors: Errors) -> None:
        if low is not None and number < low:
            message = f"Input should be greater than or equal to {low}"
            errors.append(_error("greater_than_equal", loc, message, value, ge=low))
        if high is not None and number > high:
            message = f"Input should be less than or equal to {high}"
            errors.append(_error("less_than_equal", loc, message, value, le=high))

    return check


def _to_integer(value: Any, loc: str, errors: Errors) -> Any:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        message = "Input should be a valid integer, got a number with a fractional part"
        errors.append(_error("int_from_float", loc, message, value))
    elif isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            message = "Input should be a valid integer, unable to parse string as an integer"
            errors.append(_error("int_parsing", loc, message, value))
    else:
        errors.append(_error("int_type", loc, "Input should be a valid integer", value))
    return None


def number(value: Any, loc: str, errors: Errors) -> Any:
    """A number, or a string of one."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            message = "Input should be a valid number, unable to parse string as a number"
            errors.append(_error("float_parsing", loc, message, value))
    else:
        errors.append(_error("float_type", loc, "Input should be a valid number", value))
    return None


def boolean(value: Any, loc: str, errors: Errors) -> Any:
    """True or false, or one of the words pydantic takes for them."""
    if isinstance(value, bool):
        return value
    if value in (0, 1) or (isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE)):
        return value == 1 or (isinstance(value, str) and value.lower() in _TRUE)
    if isinstance(value, str | int | float):
        message = "Input should be a valid boolean, unable to interpret input"
        errors.append(_error("bool_parsing", loc, message, value))
    else:
        errors.append(_error("bool_type", loc, "Input should be a valid boolean", value))
    return None


def list_of(check: Check, *, low: int = 0, high: int | None = None) -> Check:
    """A list whose items pass a check, of bounded length."""

    def check_list(value: Any, loc: str, errors: Errors) -> Any:
        if not isinstance(value, list):
            errors.append(_error("list_type", loc, "Input should be a valid list", value))
            return value
        if (problem := _length_problem(value, loc)) is not None:
            errors.append(problem)
            return value
        return [check(item, f"{loc}.{index}", errors) for index, item in enumerate(value)]

    def _length_problem(value: list[Any], loc: str) -> dict[str, Any] | None:
        size = len(value)
        if high is not None and size > high:
            message = f"List should have at most {high} items after validation, not {size}"
            ctx: dict[str, object] = {"max_length": high, "actual_length": size}
            return _error("too_long", loc, message, value, field_type="List", **ctx)
        if size < low:
            plural = "item" if low == 1 else "items"
            message = f"List should have at least {low} {plural} after validation, not {size}"
            ctx = {"min_length": low, "actual_length": size}
            return _error("too_short", loc, message, value, field_type="List", **ctx)
        return None

    return check_list


def mapping(value: Any, loc: str, errors: Errors) -> Any:
    """A JSON object."""
    if not isinstance(value, dict):
        errors.append(_error("dict_type", loc, "Input should be a valid dictionary", value))
    return value


def literal(*allowed: str) -> Check:
    """One of a few strings."""
    quoted = [repr(word) for word in allowed]
    expected = ", ".join(quoted[:-1]) + f" or {quoted[-1]}" if len(quoted) > 1 else quoted[0]

    def check(value: Any, loc: str, errors: Errors) -> Any:
        if value not in allowed:
            message = f"Input should be {expected}"
            errors.append(_error("literal_error", loc, message, value, expected=expected))
        return value

    return check


def response_format(value: Any, loc: str, errors: Errors) -> Any:
    """A response format; pydantic reports what each of the three kinds it knows misses."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind in ("text", "json_object", "json_schema"):
        return mapping(value, loc, errors)
    if kind == "structural_tag" and ("format" in value or "structures" in value):
        return value
    literal("text", "json_object", "json_schema")(kind, f"{loc}.type", errors)
    for missing in (("format",), ("structures", "triggers")):
        literal("structural_tag")(kind, f"{loc}.type", errors)
        for name in missing:
            errors.append(_error("missing", f"{loc}.{name}", "Field required", value))
    return value


def message(value: Any, loc: str, errors: Errors) -> Any:
    """A chat message: an object with a role, whose content is text or parts.

    Pydantic reports every kind of message it tried; this names the user's alone.
    """
    place = f"{loc}.ChatCompletionUserMessageParam"
    if not isinstance(value, dict):
        return mapping(value, place, errors)
    content = value.get("content")
    if content is not None and not isinstance(content, str | list):
        text(content, f"{place}.content", errors)
        errors.append(
            _error("iterable_type", f"{place}.content", "Input should be iterable", content)
        )
    if not isinstance(value.get("role"), str):
        errors.append(_error("missing", f"{place}.role", "Field required", value))
    return value


def any_of(*checks: Check) -> Check:
    """A value that passes one of several checks; otherwise the errors of all of them."""

    def check(value: Any, loc: str, errors: Errors) -> Any:
        collected: Errors = []
        for alternative in checks:
            found: Errors = []
            converted = alternative(value, loc, found)
            if not found:
                return converted
            collected += found
        errors += collected
        return value

    return check


def anything(value: Any, loc: str, errors: Errors) -> Any:
    """Whatever it is."""
    return value


def parse_body(body: bytes) -> Any:
    """JSON of a request body.

    Raises:
        ApiError: FastAPI's wording for malformed JSON, with the place where it broke.
    """
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        loc = f"body.{error.pos}"
        problem = _error("json_invalid", loc, "JSON decode error", {}, error=error.msg)
        raise validation_error([problem]) from None
    except ValueError:
        raise ApiError("There was an error parsing the body", type="Bad Request") from None


def check_object(data: Any) -> dict[str, Any]:
    """The body must be a JSON object.

    Raises:
        ApiError: when it is anything else.
    """
    if isinstance(data, dict):
        return data
    message = "Input should be a valid dictionary or object to extract fields from"
    raise validation_error([_error("model_attributes_type", "body", message, data)])


def check_fields(
    data: Mapping[str, Any],
    fields: Mapping[str, Check],
    *,
    required: tuple[str, ...] = (),
    not_null: tuple[str, ...] = (),
    prefix: str = "body",
) -> dict[str, Any]:
    """Check and convert the known fields; unknown ones pass as they are.

    Args:
        data: the object as sent.
        fields: the check of every known field, in the order pydantic reports errors.
        required: fields that must be there.
        not_null: fields that are checked even when they are ``null``.
        prefix: first part of the places in errors.

    Raises:
        ApiError: everything that is wrong, in one error.
    """
    errors: Errors = []
    result = dict(data)
    for name, check in fields.items():
        loc = f"{prefix}.{name}"
        if name not in data:
            if name in required:
                errors.append(_error("missing", loc, "Field required", dict(data)))
        elif data[name] is None and name not in not_null and name not in required:
            del result[name]
        else:
            result[name] = check(data[name], loc, errors)
    if errors:
        raise validation_error(errors)
    return result
