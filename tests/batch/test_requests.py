"""What prompts become; the quick way gives what the other gives."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vllm_unified.batch.requests import BATCH_TIMEOUT, RequestMaker
from vllm_unified.errors import BadRequestError, ConfigurationError
from vllm_unified.settings import Settings
from vllm_unified.wire.requests import (
    RequestTemplate,
    WireRequest,
    generation_fields,
    generation_request,
)

MESSAGES = [{"role": "user", "content": "Hello"}]
SETTINGS = Settings(model="base")


def body(request: WireRequest) -> Any:
    return msgspec.json.decode(request.body or b"null")


class City(msgspec.Struct):
    name: str


@pytest.mark.parametrize("prompt", ["Hello", "", 'a "quoted" ü\n', [1, 2, 3], MESSAGES])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"model": "m", "max_tokens": 5, "n": 3, "priority": "high"},
        {"request_id": "r", "session_id": "s", "stop": ["a", "b"], "logit_bias": {"1": 2.0}},
        {"extra_body": {"prompt": "another"}},
    ],
)
def test_a_template_makes_what_is_made_without(prompt: Any, params: dict[str, Any]) -> None:
    made = RequestMaker(Settings(), params).make(prompt)

    expected = generation_request({**generation_fields(prompt), **params})
    assert body(made.request) == body(expected)
    replaced = msgspec.structs.replace(made.request, body=expected.body)
    assert replaced == expected


def test_what_comes_after_the_prompt_allows_no_template() -> None:
    assert RequestTemplate.of({"prompt": "a", "extra_body": {"b": 1}}) is None
    assert RequestTemplate.of({"prompt": "a"}) is not None


@pytest.mark.parametrize(
    "prompt",
    [
        5,
        None,
        [],
        {},
        [True, False],
        [1, "a"],
        [[1], []],
        [{"content": 1}],
        "\ud800",
        [-1],
        object(),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(BadRequestError):
        RequestMaker(SETTINGS, {}).make(prompt)


def test_own_parameters_win() -> None:
    maker = RequestMaker(SETTINGS, {"model": "m", "seed": 1, "top_k": 2})

    made = maker.make({"prompt": "a", "seed": 3, "model": "own", "timeout": 7})

    assert body(made.request) == {"prompt": "a", "seed": 3, "top_k": 2, "model": "own"}
    assert made.settings.timeout == 7
    assert made.own_model
    assert not maker.make("a").own_model


def test_an_adapter_of_its_own_takes_the_place_of_the_shared_model() -> None:
    made = RequestMaker(SETTINGS, {"model": "m"}).make({"prompt": "a", "lora_adapter": "l"})

    assert made.request.model == "l"
    assert made.own_model


def test_the_default_timeout_is_longer_and_another_is_kept() -> None:
    assert RequestMaker(Settings(), {}).make("a").settings.timeout == BATCH_TIMEOUT
    assert RequestMaker(Settings(timeout=5), {}).make("a").settings.timeout == 5
    assert RequestMaker(Settings(), {"timeout": 30}).make("a").settings.timeout == 30


@pytest.mark.parametrize(
    "params",
    [{"max_token": 5}, {"temperature": float("nan")}, {"timeout": "long"}, {"n": 0}],
)
def test_what_is_wrong_for_all_is_said_at_once(params: dict[str, Any]) -> None:
    with pytest.raises((BadRequestError, ConfigurationError)):
        RequestMaker(SETTINGS, params)


def test_structured_output_for_all_or_for_one() -> None:
    maker = RequestMaker(SETTINGS, {"response_model": City})
    shared = maker.make(MESSAGES).request
    own = maker.make({"messages": MESSAGES, "response_model": {"type": "object"}}).request

    assert shared.structure is not None
    assert body(shared)["response_format"]["json_schema"]["name"] == "City"
    assert own.structure is not shared.structure
    with pytest.raises(BadRequestError, match="response_model is for messages"):
        maker.make("a")
