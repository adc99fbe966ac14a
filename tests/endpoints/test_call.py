"""What one call remembers, and what it adds to the headers and errors of its attempts."""

from __future__ import annotations

import time

import msgspec
import pytest

from tests.support.fake_servers import FakeTransport
from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.config import EndpointConfig
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.errors import ServerError
from vllm_unified.events import Events
from vllm_unified.settings import Secret, Settings
from vllm_unified.wire.requests import WireRequest, generation_request, get_request

SETTINGS = Settings(api_url="http://a", api_key=Secret("geheim"))
REQUEST = generation_request({"prompt": "a", "model": "m"})


def endpoint(id: str = "a", **settings: object) -> Endpoint:
    config = EndpointConfig(settings=msgspec.structs.replace(SETTINGS, **settings))
    return Endpoint(id, config, FakeTransport(), Events())


def call(request: WireRequest = REQUEST, **settings: object) -> Call:
    return Call(request, SETTINGS.for_call(settings))


def begun(there: Endpoint) -> Call:
    """A call whose first attempt is under way."""
    begun = call()
    begun.begin_attempt(there, time.monotonic())
    return begun


def test_headers_of_an_attempt() -> None:
    mine = call()

    assert mine.headers(endpoint()) == {
        "Authorization": "Bearer geheim",
        "X-Request-Id": mine.request_id,
        "Content-Type": "application/json",
    }


def test_a_request_without_a_body_has_no_content_type() -> None:
    assert "Content-Type" not in call(get_request("/health")).headers(endpoint())


def test_the_key_is_that_of_the_endpoint() -> None:
    headers = call().headers(endpoint(api_key=Secret("other")))

    assert headers["Authorization"] == "Bearer other"


@pytest.mark.parametrize("key", [None, Secret("")])
def test_without_a_key_no_header_says_so(key: Secret | None) -> None:
    assert "Authorization" not in call().headers(endpoint(api_key=key))


@pytest.mark.parametrize("name", ["authorization", "Authorization", "AUTHORIZATION"])
def test_the_callers_own_header_stands_alone_however_it_is_spelled(name: str) -> None:
    headers = call(headers={name: "Basic x"}).headers(endpoint())

    assert [value for key, value in headers.items() if key.lower() == "authorization"] == [
        "Basic x"
    ]


def test_a_header_of_the_call_wins_over_one_of_the_endpoint() -> None:
    headers = call(headers={"x-team": "call"}).headers(endpoint(headers={"x-team": "endpoint"}))

    assert headers["x-team"] == "call"


def test_every_attempt_is_noted_with_what_became_of_it() -> None:
    first, second = endpoint("a"), endpoint("b", api_url="http://b")
    mine = begun(first)
    broken = ServerError("it broke", status_code=500)

    mine.end_attempt(broken)
    mine.begin_attempt(second, time.monotonic())
    mine.end_attempt()

    assert [(each.endpoint, each.error, each.status_code) for each in mine.attempts] == [
        ("http://a", "ServerError: it broke", 500),
        ("http://b", None, None),
    ]
    assert mine.tried == {"a"}
    assert mine.place == "b"


def test_an_attempt_that_looked_like_a_success_may_fail_later() -> None:
    mine = begun(endpoint())

    mine.end_attempt()
    mine.end_attempt(ServerError("cut", status_code=500))

    (attempt,) = mine.attempts
    assert (attempt.error, attempt.status_code) == ("ServerError: cut", 500)


def test_what_was_never_sent_is_no_attempt() -> None:
    mine = call()

    mine.end_attempt(ServerError("left in line"))

    assert (mine.attempts, mine.place) == ([], "")


@pytest.mark.parametrize("key", ["geheim", "other"], ids=["the call's", "the endpoint's"])
def test_an_error_that_quotes_a_key_is_without_it_as_soon_as_its_attempt_has_ended(
    key: str,
) -> None:
    mine = begun(endpoint(api_key=Secret("other")))
    error = ServerError(f"no upstream for Bearer {key}")

    mine.end_attempt(error)

    assert str(error) == "no upstream for Bearer ***"
    assert mine.attempts[0].error == "ServerError: no upstream for Bearer ***"


def test_an_error_says_what_became_of_its_call() -> None:
    mine = begun(endpoint())
    mine.end_attempt(ServerError("first"))
    last = ServerError("last")
    mine.begin_attempt(endpoint("b", api_url="http://b"), time.monotonic())
    mine.end_attempt(last)

    mine.complete_error(last)

    assert (last.endpoint, last.model, last.request_id) == ("http://b", "m", mine.request_id)
    assert [attempt.error for attempt in last.attempts] == [
        "ServerError: first",
        "ServerError: last",
    ]


def test_ids_of_calls_differ_unless_the_caller_gives_one() -> None:
    own = generation_request({"prompt": "a", "request_id": "mine"})

    assert call().request_id != call().request_id
    assert call(own).request_id == "mine"
