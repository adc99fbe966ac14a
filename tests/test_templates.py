"""Calls that are alike but for their prompt are sent as the first of them was."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vllm_unified.arguments import call_arguments
from vllm_unified.errors import BadRequestError, ConfigurationError
from vllm_unified.settings import Settings
from vllm_unified.templates import Templates
from vllm_unified.wire.requests import WireRequest, chat_request

SETTINGS = Settings(model="m")
MESSAGES = [{"role": "user", "content": "Hi"}]


def call(
    templates: Templates, where: str = "fleet", **params: Any
) -> tuple[WireRequest, Settings] | None:
    response_model = params.pop("response_model", None)
    made = templates.call(
        where, SETTINGS, "messages", MESSAGES, params, response_model=response_model
    )
    return None if made is None else made[:2]


def third(**params: Any) -> tuple[WireRequest, Settings] | None:
    """The last of three calls that are alike."""
    templates = Templates()
    call(templates, **params)
    call(templates, **params)
    return call(templates, **params)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max_tokens": 5, "temperature": 0.5},
        {"n": 2, "priority": "high", "request_id": "r", "session_id": "s"},
        {"lora_adapter": "poet", "timeout": 3, "max_retries": 0},
        {"seed": None, "ignore_eos": True},
    ],
)
def test_they_are_what_they_are_without_a_template(params: dict[str, Any]) -> None:
    settings, fields = call_arguments(SETTINGS, {}, None, None, params)

    made = third(**params)

    assert made == (chat_request(MESSAGES, fields), settings)


def test_the_first_of_its_kind_gets_none() -> None:
    templates = Templates()

    assert call(templates, max_tokens=5) is None
    assert call(templates, max_tokens=6) is None
    assert call(templates, max_tokens=5) is not None


def test_each_fleet_has_its_own() -> None:
    templates = Templates()
    call(templates, "one")

    assert call(templates, "another") is None


@pytest.mark.parametrize("other", [1.0, True])
def test_equal_numbers_of_other_types_are_not_alike(other: object) -> None:
    templates = Templates()
    call(templates, top_k=1)
    call(templates, top_k=1)

    call(templates, top_k=other)
    made = call(templates, top_k=other)

    assert made is not None
    assert type(msgspec.json.decode(made[0].body or b"")["top_k"]) is type(other)


@pytest.mark.parametrize(
    "params",
    [{"stop": ["a"]}, {"headers": {"a": "b"}}, {"stop_token_ids": (1,)}, {"prompt": "a"}],
)
def test_what_can_change_or_means_something_else_is_not_remembered(params: dict[str, Any]) -> None:
    assert third(**params) is None


def test_a_type_is_made_a_schema_of_once() -> None:
    made = []

    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            made.append("schema")
            return {"type": "object"}

        @staticmethod
        def model_validate_json(text: str) -> str:
            return text

    result = third(response_model=Model)

    assert result is not None
    assert result[0].structure is not None
    assert made == ["schema"]


@pytest.mark.parametrize(
    ("params", "error"),
    [({"max_token": 5}, BadRequestError), ({"timeout": -1}, ConfigurationError)],
)
def test_what_is_wrong_is_said(params: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        third(**params)


def test_what_is_remembered_is_bounded() -> None:
    templates = Templates()

    for number in range(1000):
        call(templates, seed=number)

    assert len(templates._known) <= 64
