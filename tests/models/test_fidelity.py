"""How close two servers are, from what they make of the same texts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vllm_unified.errors import ProtocolError
from vllm_unified.models.fidelity import (
    PROBES,
    Reading,
    likeness,
    perplexity,
    probe_body,
    reading_of,
)


def answer(*positions: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    return {"choices": [{"prompt_logprobs": list(positions)}]}


def test_reads_what_vllm_says_of_a_prompt() -> None:
    said = answer(
        None,
        {"12": {"logprob": -2.5, "rank": 3}, "7": {"logprob": -0.5, "rank": 1}},
        {"9": {"logprob": -0.1, "rank": 1}},
    )
    assert reading_of(said) == Reading((12, 9), (-2.5, -0.1), (7, 9))


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"choices": []},
        {"choices": [{"prompt_logprobs": None}]},
        answer(None, {}),
        answer(None, {"12": {"rank": 1}}),
    ],
)
def test_an_answer_without_them_is_an_error(said: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="no logprobs of its prompt"):
        reading_of(said)


def test_perplexity_is_one_for_who_knows_all_tokens() -> None:
    assert perplexity([Reading((1, 2), (0.0, 0.0), (1, 2))]) == 1.0
    assert perplexity([Reading((1,), (-math.log(8),), (2,))]) == pytest.approx(8)


def test_a_logprob_that_is_no_number_is_an_infinite_perplexity() -> None:
    said = answer(None, {"12": {"logprob": None, "rank": 1}})
    assert perplexity([reading_of(said)]) == math.inf


def test_compares_two_servers() -> None:
    old = [Reading((1, 2), (-1.0, -1.0), (1, 5)), Reading((3, 4), (-1.0, -1.0), (3, 4))]
    new = [Reading((1, 2), (-1.0, -1.2), (1, 5)), Reading((3, 4), (-1.0, -1.2), (3, 9))]
    like = likeness(old, new)
    assert like.perplexity_ratio == pytest.approx(math.exp(0.1))
    assert like.agreement == 0.75


def test_other_tokens_are_another_model() -> None:
    with pytest.raises(ProtocolError, match="different tokens"):
        likeness([Reading((1,), (0.0,), (1,))], [Reading((2,), (0.0,), (2,))])


def test_the_probe_is_small_and_of_different_texts() -> None:
    assert len(PROBES) == len(set(PROBES)) == 12
    assert max(map(len, PROBES)) < 200
    assert probe_body("text")["prompt_logprobs"] == 1
