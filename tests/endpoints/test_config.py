"""What an endpoint can be told, in which spelling and unit, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_unified.endpoints.breaker import BreakerConfig
from vllm_unified.endpoints.config import EndpointConfig, endpoint_config
from vllm_unified.errors import ConfigurationError
from vllm_unified.settings import Secret, Settings, TLSConfig

CLIENT = Settings(api_url="http://client", model="base", api_key=Secret("k"), timeout=7.0)


def configured(given: Any = None, **keywords: Any) -> EndpointConfig:
    return endpoint_config(given, keywords, CLIENT)


def test_an_address_alone_has_the_clients_settings() -> None:
    config = configured("http://GPU1:8000/v1/")

    assert config.settings.api_url == "http://gpu1:8000"
    assert (config.settings.model, config.settings.timeout) == ("base", 7.0)
    assert config.settings.api_key == Secret("k")
    assert (config.id, config.weight, config.circuit_breaker) == (None, 1.0, BreakerConfig())
    assert (config.requests_per_minute, config.tokens_per_minute) == (None, None)


def test_without_an_address_it_is_the_clients() -> None:
    assert configured().settings.api_url == "http://client"


def test_a_dict_in_snake_case_with_milliseconds() -> None:
    config = configured(
        {
            "url": "http://a",
            "id": "gpu",
            "api_key": "other",
            "timeout": 30_000,
            "queue_timeout": "2s",
            "max_concurrent_requests": 10,
            "priority": "high",
            "weight": 2,
            "requests_per_minute": 60,
            "tokens_per_minute": 1000,
            "circuit_breaker": {
                "failure_threshold": 3,
                "reset_timeout": 60_000,
                "half_open_successful_calls": 4,
            },
        }
    )

    assert (config.id, config.weight) == ("gpu", 2.0)
    assert (config.settings.timeout, config.settings.queue_timeout) == (30.0, 2.0)
    assert (config.settings.max_concurrent_requests, config.settings.priority) == (10, -10)
    assert config.settings.api_key == Secret("other")
    assert (config.requests_per_minute, config.tokens_per_minute) == (60, 1000)
    assert config.circuit_breaker == BreakerConfig(
        failure_threshold=3, reset_timeout=60.0, half_open_successful_calls=4
    )


def test_a_dict_in_camel_case() -> None:
    config = configured(
        {
            "url": "http://a",
            "maxConcurrentRequests": 10,
            "requestsPerMinute": 60,
            "circuitBreaker": {"failureThreshold": 3, "resetTimeout": "1m"},
        }
    )

    assert config.settings.max_concurrent_requests == 10
    assert config.requests_per_minute == 60
    assert config.circuit_breaker == BreakerConfig(failure_threshold=3, reset_timeout=60.0)


def test_keywords_win_over_the_dict_and_are_in_seconds() -> None:
    config = configured(
        {"url": "http://a", "timeout": 5000, "weight": 2, "circuit_breaker": {"reset_timeout": 1}},
        timeout=3,
        weight=4,
        circuit_breaker={"reset_timeout": 20},
    )

    assert (config.settings.timeout, config.weight) == (3.0, 4.0)
    assert config.circuit_breaker.reset_timeout == 20.0


@pytest.mark.parametrize("other", ["api_url", "apiUrl", "vllm_api_url"])
def test_two_addresses_are_refused(other: str) -> None:
    with pytest.raises(ConfigurationError, match=r"an endpoint .*api_url.*different values"):
        configured({"url": "http://a", other: "http://b"})


def test_two_addresses_among_keywords_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="url and api_url, with different values"):
        configured(url="http://a", api_url="http://b")


def test_one_address_may_be_given_twice() -> None:
    assert configured({"url": "http://a", "api_url": "http://a"}) == configured("http://a")


def test_settings_of_a_fleet_are_between_the_clients_and_its_own() -> None:
    shared = {"timeout": 5.0, "max_retries": 7}

    config = endpoint_config({"url": "http://a", "timeout": "6s"}, {}, CLIENT, shared)

    assert (config.settings.timeout, config.settings.max_retries) == (6.0, 7)
    assert (config.settings.model, config.settings.api_url) == ("base", "http://a")


@pytest.mark.parametrize(
    "shared", [{"proxy": "http://proxy:3128"}, {"tls": TLSConfig()}, {"connect_timeout": 1.0}]
)
def test_settings_of_a_fleet_may_need_connections_of_their_own(shared: dict[str, Any]) -> None:
    assert endpoint_config("http://a", {}, CLIENT, shared).own_transport


def test_the_words_of_an_error_are_of_an_endpoint() -> None:
    with pytest.raises(ConfigurationError, match="an endpoint has the unknown key 'adress'"):
        configured({"adress": "http://a"})
    with pytest.raises(ConfigurationError, match="an endpoint gives max_retries twice"):
        configured({"max_retries": 1, "maxRetries": 2})


def test_a_breaker_may_be_given_as_it_is() -> None:
    breaker = BreakerConfig(failure_threshold=1)

    assert configured("http://a", circuit_breaker=breaker).circuit_breaker is breaker


def test_none_counts_as_not_given() -> None:
    given = {"url": "http://a", "weight": None, "timeout": None, "circuit_breaker": None}

    assert configured(given, id=None, max_retries=None) == configured("http://a")
    assert configured({"circuit_breaker": {"reset_timeout": None}}) == configured()


@pytest.mark.parametrize(
    ("option", "own"),
    [
        ({"proxy": "http://proxy:3128"}, True),
        ({"tls": TLSConfig(verify=False)}, True),
        ({"connect_timeout": 3}, True),
        ({"api_key": "other"}, False),
        ({"timeout": 3}, False),
    ],
)
def test_connections_of_its_own_only_where_they_differ(option: dict[str, Any], own: bool) -> None:
    assert configured("http://a", **option).own_transport is own


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (5, "int"),
        (["http://a"], "list"),
        ({"url": "ftp://a"}, "ftp://a"),
        ({"url": 5}, "5"),
        ({"adress": "http://a"}, "adress"),
        ({1: "http://a"}, "1"),
        ({"id": ""}, "id"),
        ({"id": "two\nlines"}, "id"),
        ({"weight": 0}, "weight"),
        ({"weight": True}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"tokens_per_minute": 1.5}, "tokens_per_minute"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests"),
        ({"timeout": "soon"}, "timeout"),
        ({"max_retries": 1, "maxRetries": 2}, "max_retries twice"),
        ({"circuit_breaker": 3}, "circuit_breaker"),
        ({"circuit_breaker": {"failure_treshold": 3}}, "failure_treshold"),
        ({"circuit_breaker": {"failure_threshold": 0}}, "failure_threshold"),
        ({"circuit_breaker": {"failure_threshold": "3"}}, "failure_threshold"),
        ({"circuit_breaker": {"reset_timeout": 0}}, "reset_timeout"),
        ({"circuit_breaker": {"reset_timeout": "soon"}}, "reset_timeout"),
    ],
)
def test_what_is_wrong_is_named(given: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        configured(given)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("max_retry", 3),
        ("maxRetries", 3),
        ("timeout", "30s"),
        ("weight", -1),
        ("circuit_breaker", {"reset_timeout": "30s"}),
    ],
)
def test_what_is_wrong_among_keywords_is_named(keyword: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=keyword):
        configured("http://a", **{keyword: value})


def test_the_message_does_not_show_a_key() -> None:
    with pytest.raises(ConfigurationError) as caught:
        configured({"url": "http://a", "api_key": "ge\nheim"})

    assert "heim" not in str(caught.value)
