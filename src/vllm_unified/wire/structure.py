"""Structured output: a type becomes ``response_format``, and the model's text becomes the type."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from vllm_unified.errors import BadRequestError, ConfigurationError, OutputValidationError


class OutputStructure:
    """What an answer has to parse as.

    Attributes:
        response_format: The request's ``response_format``, of type ``json_schema``.
    """

    def __init__(self, name: str, schema: Mapping[str, Any], decode: Callable[[str], Any]) -> None:
        self.response_format = {
            "type": "json_schema",
            "json_schema": {"name": name, "schema": schema, "strict": True},
        }
        self._name = name
        self._decode = decode

    def parse(self, text: str, *, finish_reason: str | None = None) -> Any:
        """The value that the text stands for.

        Raises:
            OutputValidationError: with the whole text in ``text``.
        """
        try:
            return self._decode(text)
        except Exception as error:
            hint = None
            if finish_reason == "length":
                hint = "The answer was cut off by its token limit: raise max_tokens."
            raise OutputValidationError(
                f"the answer is not a valid {self._name}: {error}", text=text, hint=hint
            ) from error


def output_structure(response_model: Any) -> OutputStructure:
    """The structure for a msgspec Struct, a dataclass, a TypedDict, a pydantic model, any other
    type that msgspec knows (``list[int]``, an ``Enum``), or a JSON schema as a dict.

    Raises:
        BadRequestError: no schema can be made of it.
        ConfigurationError: a JSON schema, and the extra ``schema`` is not installed.
    """
    if isinstance(response_model, Mapping):
        return _from_schema(dict(response_model))
    name = _schema_name(getattr(response_model, "__name__", None) or "output")
    if callable(getattr(response_model, "model_json_schema", None)):
        return OutputStructure(
            name, response_model.model_json_schema(), response_model.model_validate_json
        )
    try:
        schema = msgspec.json.schema(response_model)
        decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(response_model)
    except TypeError as error:
        raise BadRequestError(
            f"response_model={response_model!r} has no JSON schema: {error}",
            hint="Use a msgspec Struct, a dataclass, a TypedDict, a pydantic model or a JSON "
            "schema as a dict.",
        ) from None
    return OutputStructure(name, _closed(schema), decoder.decode)


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """msgspec leaves objects open; a model should not be invited to invent further keys."""
    for definition in schema.get("$defs", {}).values():
        if "properties" in definition:
            definition.setdefault("additionalProperties", False)
    return schema


def _from_schema(schema: dict[str, Any]) -> OutputStructure:
    try:
        import jsonschema_rs
    except ImportError:
        raise ConfigurationError(
            "response_model with a JSON schema needs the extra 'schema' to check the answer",
            hint="pip install 'vllm-unified[schema]', or use a type in place of the schema.",
        ) from None
    try:
        validator = jsonschema_rs.validator_for(schema)
    except (ValueError, TypeError) as error:
        raise BadRequestError(f"response_model is not a valid JSON schema: {error}") from None

    def decode(text: str) -> Any:
        value = msgspec.json.decode(text)
        validator.validate(value)
        return value

    return OutputStructure(_schema_name(str(schema.get("title", "output"))), schema, decode)


def _schema_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:64] or "output"
