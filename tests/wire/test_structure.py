"""A type becomes ``response_format``, and the model's text becomes the type."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

import msgspec
import pydantic
import pytest

from vllm_unified.errors import BadRequestError, ConfigurationError, OutputValidationError
from vllm_unified.wire.structure import output_structure

T = TypeVar("T")


class StructCity(msgspec.Struct):
    name: str
    people: int


@dataclass
class DataclassCity:
    name: str
    people: int


class TypedDictCity(TypedDict):
    name: str
    people: int


class PydanticCity(pydantic.BaseModel):
    name: str
    people: int


class Box(msgspec.Struct, Generic[T]):
    content: T


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


SCHEMA = {
    "title": "City of the world",
    "type": "object",
    "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["name", "people"],
}
FORMS: list[tuple[Any, Any]] = [
    (StructCity, StructCity("Paris", 2)),
    (DataclassCity, DataclassCity("Paris", 2)),
    (TypedDictCity, {"name": "Paris", "people": 2}),
    (PydanticCity, PydanticCity(name="Paris", people=2)),
    (SCHEMA, {"name": "Paris", "people": 2}),
]
FORM_NAMES = ["Struct", "dataclass", "TypedDict", "pydantic", "schema"]


@pytest.mark.parametrize(("form", "value"), FORMS, ids=FORM_NAMES)
def test_text_becomes_the_type(form: Any, value: Any) -> None:
    assert output_structure(form).parse('{"name": "Paris", "people": 2}') == value


@pytest.mark.parametrize("form", [form for form, _ in FORMS], ids=FORM_NAMES)
def test_the_server_gets_a_schema(form: Any) -> None:
    response_format: Any = output_structure(form).response_format

    assert response_format["type"] == "json_schema"
    assert response_format["json_schema"]["name"].isidentifier()
    assert '"people"' in msgspec.json.encode(response_format["json_schema"]["schema"]).decode()


@pytest.mark.parametrize("form", [form for form, _ in FORMS], ids=FORM_NAMES)
@pytest.mark.parametrize(
    "text", ["", "Paris", "{", "[]", "null", '{"name": "Paris"}', '{"name": 5, "people": "many"}']
)
def test_what_does_not_validate_carries_the_text(form: Any, text: str) -> None:
    with pytest.raises(OutputValidationError) as caught:
        output_structure(form).parse(text, finish_reason="stop")

    assert caught.value.text == text
    assert caught.value.__cause__ is not None
    assert caught.value.hint is None


def test_text_that_was_cut_off_hints_at_max_tokens() -> None:
    with pytest.raises(OutputValidationError) as caught:
        output_structure(StructCity).parse('{"name": "Par', finish_reason="length")

    assert "max_tokens" in str(caught.value)


@pytest.mark.parametrize(
    ("form", "text", "value"),
    [
        (list[int], "[1, 2]", [1, 2]),
        (Colour, '"red"', Colour.RED),
        (Box[int], '{"content": 5}', Box(5)),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (bool, "true", True),
    ],
)
def test_any_type_that_msgspec_knows(form: Any, text: str, value: Any) -> None:
    assert output_structure(form).parse(text) == value


@pytest.mark.parametrize("form", [StructCity, DataclassCity, TypedDictCity])
def test_the_model_is_not_invited_to_invent_keys(form: Any) -> None:
    response_format: Any = output_structure(form).response_format

    (definition,) = response_format["json_schema"]["schema"]["$defs"].values()
    assert definition["additionalProperties"] is False


@pytest.mark.parametrize("form", [object(), 5, "str", lambda: None, type(sys)])
def test_what_has_no_schema_is_refused(form: Any) -> None:
    with pytest.raises(BadRequestError, match="response_model"):
        output_structure(form)


def test_a_schema_that_is_none_is_refused() -> None:
    with pytest.raises(BadRequestError, match="not a valid JSON schema"):
        output_structure({"type": "nonsense"})


def test_a_schema_without_its_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)

    with pytest.raises(ConfigurationError, match=r"vllm-unified\[schema\]"):
        output_structure(SCHEMA)
