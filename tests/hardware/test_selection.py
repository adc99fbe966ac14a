"""Which backend is chosen, and why."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_unified.errors import BadRequestError
from vllm_unified.hardware import Capabilities
from vllm_unified.hardware.request import inference_request
from vllm_unified.hardware.selection import BackendFacts, Selection, choose


def facts(name: str, order: int, **known: Any) -> BackendFacts:
    described = {
        field: known.pop(field) for field in ("models", "device", "unavailable") if field in known
    }
    known.setdefault("priority", 0)
    return BackendFacts(name=name, order=order, capabilities=Capabilities(**described), **known)


def chosen(request: dict[str, Any], *backends: BackendFacts, **how: Any) -> Selection:
    return choose(inference_request("llm", request, {}), backends, **how)


HELLO = {"input": "Hello", "model": "small"}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"priority": 1}, {}),
        ({"device": "cuda"}, {"device": "cpu"}),
        ({}, {"device": "cpu"}),
        ({"priority": 1, "device": "cpu"}, {"device": "cuda"}),
        ({}, {"state": "open", "priority": 9}),
        ({}, {"is_busy": True, "priority": 9}),
        ({}, {"models": {"large": None}}),
        ({"models": {"small": None}}, {"unavailable": "no memory"}),
        ({}, {"failed": True}),
    ],
)
def test_the_better_one_is_first(better: dict[str, Any], worse: dict[str, Any]) -> None:
    found = chosen(HELLO, facts("worse", 1, **worse), facts("better", 2, **better))
    assert found.chosen == "better"


def test_of_equals_the_one_that_was_registered_first() -> None:
    assert chosen(HELLO, facts("b", 1), facts("a", 2)).chosen == "b"


def test_one_that_is_shut_out_is_the_last_resort() -> None:
    found = chosen(HELLO, facts("down", 1, state="open", trouble="ConnectError: nobody"))
    assert found.chosen == "down"
    assert "the last resort: ConnectError: nobody" in found.candidates[0].reasons[0]


def test_token_ids_that_do_not_fit_shut_out_and_a_text_only_ranks() -> None:
    short, long = facts("short", 1, models={"m": 10}), facts("long", 2, models={"m": 100})
    ids = chosen({"prompt": list(range(20)), "model": "m"}, short, long)
    assert ids.chosen == "long"
    assert not ids.candidates[1].eligible
    text = chosen({"prompt": "words " * 20, "model": "m"}, short, long)
    assert text.chosen == "long"
    assert text.candidates[1].eligible
    assert chosen({"prompt": "x", "max_tokens": 50}, short, long).chosen == "long"


def test_a_context_that_was_too_short_asks_for_a_longer_one() -> None:
    short, long = facts("short", 1, models={"m": 10}), facts("long", 2, models={"m": 100})
    assert chosen({"prompt": "x"}, short, long, longer_than=10).chosen == "long"
    assert chosen({"prompt": "x"}, short, long, longer_than=100).chosen is None


def test_streaming_needs_one_that_streams() -> None:
    found = chosen(HELLO, facts("plain", 1, streams=False), streaming=True)
    assert found.chosen is None
    assert found.candidates[0].reasons == ("it does not stream",)


def test_it_can_be_read() -> None:
    text = str(
        chosen(
            HELLO,
            facts("gpu", 1, models={"small": 2048}, device="cuda", priority=3),
            facts("other", 2, models={"large": None}),
        )
    )
    assert text == (
        "llm with small:\n"
        "-> gpu: serves small; context of 2048 tokens; priority 3; on cuda; no failures\n"
        "   other: not possible: it serves large, not small"
    )


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "no input"),
        ({"input": "a", "prompt": "b"}, "input and prompt"),
        ({"input": "a", "model": 3}, "model must be a name"),
    ],
)
def test_wrong_requests(request_: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        inference_request("llm", request_, {})


def test_what_is_a_request() -> None:
    assert inference_request("llm", "Hello", {"max_tokens": 3}).fields == {
        "input": "Hello",
        "max_tokens": 3,
    }
    messages = [{"role": "user", "content": "Hello"}]
    assert inference_request("llm", {"messages": messages}, {}).is_chat
    assert inference_request("chat", "Hello", {}).messages == messages
    assert not inference_request("llm", "Hello", {}).is_chat
    own = inference_request("resize", {"width": 3}, {})
    assert (own.input, own.fields) == (None, {"width": 3})
