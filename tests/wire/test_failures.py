"""Every error body that a vLLM, or what stands before it, is known to send."""

from __future__ import annotations

import email.utils
import json
from typing import Any

import pytest

from tests.support import answers
from vllm_unified.errors import (
    AuthenticationError,
    BadRequestError,
    ContextLengthError,
    EngineDeadError,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    ServerError,
    UnsupportedError,
    VllmError,
)
from vllm_unified.wire.failures import error_in_answer, error_in_body, retry_after

NOW = 1_780_000_000.0


def failure(
    status: int, body: bytes | dict[str, Any] = b"", path: str = "POST /v1/x", **headers: str
) -> VllmError:
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return error_in_answer(status, named, body, path=path, now=NOW)


def standard(message: str, kind: str = "BadRequestError", param: str | None = None) -> Any:
    return {"error": answers.error_body(message, kind, param, 400)}


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, standard("temperature must be >= 0"), BadRequestError, "temperature must be >= 0"),
        (401, {"error": "Unauthorized"}, AuthenticationError, "Unauthorized"),
        (
            503,
            {"error": "The model is currently scaling. Please try again later."},
            OverloadedError,
            "The model is currently scaling. Please try again later.",
        ),
        (400, {"error": "cannot pause"}, BadRequestError, "cannot pause"),
        (404, {"detail": "Not Found"}, NotFoundError, "the server has no POST /v1/x"),
        (405, {"detail": "Method Not Allowed"}, NotFoundError, "the server has no POST /v1/x"),
        (
            400,
            {"type": "error", "error": {"type": "invalid_request_error", "message": "no system"}},
            BadRequestError,
            "no system",
        ),
        (503, b"", OverloadedError, "Service Unavailable"),
        (500, b"", ServerError, "Internal Server Error"),
        (500, b"Internal Server Error", ServerError, "Internal Server Error"),
        (
            400,
            {
                "object": "error",
                "message": "too hot",
                "type": "BadRequestError",
                "param": None,
                "code": 400,
            },
            BadRequestError,
            "too hot",
        ),
        (
            422,
            {"detail": [{"loc": ["body", "file"], "msg": "field required"}]},
            BadRequestError,
            "field required",
        ),
    ],
    ids=[
        "standard",
        "401",
        "scaling",
        "pause",
        "no path",
        "wrong method",
        "messages",
        "empty 503",
        "empty 500",
        "plain text",
        "flat, up to 0.10.0",
        "list of details",
    ],
)
def test_every_shape_is_understood(
    status: int, body: bytes | dict[str, Any], kind: type[VllmError], message: str
) -> None:
    error = failure(status, body)

    assert type(error) is kind
    assert message in error.message
    assert error.status_code == status


@pytest.mark.parametrize(
    ("status", "kind", "transient"),
    [
        (400, BadRequestError, False),
        (401, AuthenticationError, False),
        (403, PermissionDeniedError, False),
        (404, NotFoundError, False),
        (405, NotFoundError, False),
        (408, ServerError, True),
        (413, BadRequestError, False),
        (418, ProtocolError, False),
        (422, BadRequestError, False),
        (429, RateLimitError, True),
        (500, ServerError, True),
        (501, UnsupportedError, False),
        (502, ServerError, True),
        (503, OverloadedError, True),
        (504, ServerError, True),
        (599, ServerError, True),
    ],
)
def test_every_status_has_its_class(status: int, kind: type[VllmError], transient: bool) -> None:
    error = failure(status, standard("why"))

    assert type(error) is kind
    assert error.is_transient_error is transient


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, standard(answers.CONTEXT_LENGTH, param="input_tokens"), ContextLengthError),
        (404, standard(answers.UNKNOWN_MODEL, "NotFoundError", "model"), ModelNotFoundError),
        (404, standard(answers.UNKNOWN_MODEL, "NotFoundError"), ModelNotFoundError),
        (404, standard("Response id resp_1 not found", "invalid_request_error"), NotFoundError),
        (500, standard(answers.ENGINE_DEAD, "InternalServerError"), EngineDeadError),
        (503, standard(answers.ENGINE_DEAD, "InternalServerError"), EngineDeadError),
        (503, standard(answers.BUSY, "Service Unavailable"), OverloadedError),
    ],
)
def test_what_a_caller_handles_differently_has_a_class_of_its_own(
    status: int, body: dict[str, Any], kind: type[VllmError]
) -> None:
    error = failure(status, body)

    assert type(error) is kind
    assert error.hint is not None or kind is NotFoundError


def test_a_proxys_page_is_called_one_and_quoted_by_its_title() -> None:
    page = b"<html><head><title>502 Bad\n Gateway</title></head><body>nginx</body></html>"

    error = failure(502, page, content_type="text/html")

    assert "an HTML page" in error.message
    assert "'502 Bad Gateway'" in error.message
    assert "<" not in error.message


def test_a_long_message_is_cut() -> None:
    assert len(failure(400, standard("x" * 100_000)).message) < 1100


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_says_where_to(status: int) -> None:
    error = failure(status, b"", location="https://other.example/v1/models")

    assert type(error) is ProtocolError
    assert "https://other.example/v1/models" in error.message


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b"{}",
        b'{"error": null}',
        b'{"error": []}',
        b'{"error": {}}',
        b'{"error": {"message": null}}',
        b'{"error": {"message": {"a": 1}}}',
        b'{"error": {"message": ""}}',
        b'{"detail": null}',
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"error": {"message": "m", "param": 5, "code": "x"}}',
        b"\0" * 50,
    ],
    ids=lambda body: body[:30].decode("latin-1"),
)
@pytest.mark.parametrize("status", [400, 404, 503, 599])
def test_an_unknown_shape_is_still_an_error_with_words(status: int, body: bytes) -> None:
    error = failure(status, body)

    assert error.status_code == status
    assert error.message.strip()


@pytest.mark.parametrize(
    ("value", "kind", "code"),
    [
        (answers.error_body(answers.ENGINE_DEAD), EngineDeadError, 500),
        (answers.error_body(answers.BUSY, "Service Unavailable", None, 503), OverloadedError, 503),
        (answers.error_body("bad grammar", "BadRequestError", None, 400), BadRequestError, 400),
        (answers.error_body("Internal server error"), ServerError, 500),
        (answers.error_body(""), ServerError, 500),
        ({"message": "m", "code": "429"}, RateLimitError, 429),
        ({"message": "m", "code": None}, ServerError, 500),
        ({"message": "m", "code": 7}, ServerError, 500),
        ({"message": "m", "code": True}, ServerError, 500),
        ("Unauthorized", ServerError, 500),
        ([], ServerError, 500),
    ],
)
def test_an_error_inside_a_200_has_the_class_of_its_code(
    value: Any, kind: type[VllmError], code: int
) -> None:
    error = error_in_body(json.dumps(value).encode())

    assert type(error) is kind
    assert error.status_code == code
    assert error.message.strip()


@pytest.mark.parametrize("value", [b'"\xff"', b'{"code": 1e400}', b"[" * 5000 + b"]" * 5000])
def test_an_error_inside_a_200_that_cannot_be_decoded_is_still_one(value: bytes) -> None:
    """The frame is JSON as far as it has been looked at; this value is the part that has not."""
    assert isinstance(error_in_body(value), ServerError)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after": email.utils.formatdate(NOW + 30, usegmt=True)}, 30.0),
        ({"retry-after": email.utils.formatdate(NOW - 30, usegmt=True)}, 0.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e999"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Fri, 99 Foo 2026 99:99:99 GMT"}, None),
        ({"retry-after": "Fri, 01 Jan 99999999999 00:00:00 GMT"}, None),
    ],
    ids=str,
)
def test_retry_after_in_both_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, NOW) == seconds


@pytest.mark.usefixtures("_far_from_greenwich")
@pytest.mark.parametrize("date", ["Thu May 28 20:27:10 2026", "Thu, 28 May 2026 20:27:10 -0000"])
def test_a_date_without_a_zone_is_in_gmt(date: str) -> None:
    assert retry_after({"retry-after": date}, NOW) == pytest.approx(30)


@pytest.fixture
def _far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Any:
    import time

    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()
