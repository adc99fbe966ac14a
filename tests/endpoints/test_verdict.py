"""What each error says about the server that it came from."""

from __future__ import annotations

import json

import pytest

from tests.support import answers
from vllm_unified import errors
from vllm_unified.endpoints.verdict import verdict_of
from vllm_unified.errors import VllmError
from vllm_unified.wire.failures import error_in_answer, error_in_body

BACKLOG = "Request would exceed the token backlog limit of this instance."


def answered(status: int, body: bytes) -> VllmError:
    """The error that an answer of this status stands for."""
    return error_in_answer(status, {}, body, path="POST /v1/completions")


@pytest.mark.parametrize("words", [answers.BUSY, answers.BUSY.upper(), BACKLOG])
def test_admission_control_is_overload(words: str) -> None:
    assert verdict_of(answered(503, words.encode())) == "overloaded"


def test_a_rate_limit_is_overload() -> None:
    assert verdict_of(answered(429, b"slow down")) == "overloaded"


@pytest.mark.parametrize("body", [b"", b"<html><title>503</title></html>", b"no healthy upstream"])
def test_a_gateways_503_is_a_failure(body: bytes) -> None:
    assert verdict_of(answered(503, body)) == "failed"


@pytest.mark.parametrize("status", [301, 408, 500, 502, 504, 599])
def test_statuses_of_a_broken_server(status: int) -> None:
    assert verdict_of(answered(status, b"")) == "failed"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 422, 501])
def test_statuses_of_a_server_that_does_what_it_should(status: int) -> None:
    assert verdict_of(answered(status, b"")) == "answered"


@pytest.mark.parametrize(
    ("frame", "verdict"),
    [
        (answers.error_body(answers.ENGINE_DEAD, code=500), "failed"),
        (answers.error_body("too long", code=400), "answered"),
        (answers.error_body(answers.BUSY, code=503), "overloaded"),
    ],
)
def test_an_error_frame_says_what_the_same_status_would(
    frame: dict[str, object], verdict: str
) -> None:
    assert verdict_of(error_in_body(json.dumps(frame).encode())) == verdict


@pytest.mark.parametrize(
    "kind",
    [
        errors.AttemptTimeoutError,
        errors.ConnectError,
        errors.ConnectTimeoutError,
        errors.ConnectionLostError,
        errors.EngineDeadError,
        errors.GenerationAbortedError,
        errors.NameResolutionError,
        errors.ProtocolError,
        errors.RequestTimeoutError,
        errors.StreamStalledError,
        errors.StreamTruncatedError,
        errors.TLSError,
    ],
)
def test_what_a_server_or_the_way_to_it_breaks_by(kind: type[VllmError]) -> None:
    assert verdict_of(kind("x")) == "failed"


def test_an_answer_that_is_larger_than_allowed_is_an_answer() -> None:
    assert verdict_of(errors.ResponseTooLargeError("x")) == "answered"


@pytest.mark.parametrize(
    "kind", [errors.BadRequestError, errors.ClientClosedError, errors.ConfigurationError]
)
def test_what_was_found_here_says_nothing_of_the_server(kind: type[VllmError]) -> None:
    assert verdict_of(kind("x")) == "unknown"
