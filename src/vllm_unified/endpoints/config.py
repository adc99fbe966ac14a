"""What an endpoint is told: which server, with which key, and how much of it at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_unified.endpoints.breaker import BreakerConfig
from vllm_unified.errors import ConfigurationError
from vllm_unified.settings import Settings, check_keywords, check_metadata, snake_case

_OWN_TRANSPORT = ("connect_timeout", "proxy", "tls")


class EndpointConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint: an address, and how it is used. Times are in seconds."""

    settings: Settings
    """The client's, with the endpoint's own in their place; ``api_url`` is its address."""
    id: str | None = None
    """``None``: made from the address."""
    weight: float = 1.0
    """Its share beside the others of a fleet."""
    circuit_breaker: BreakerConfig = BreakerConfig()
    requests_per_minute: int | None = None
    """A quota of the server or a gateway before it, kept by waiting."""
    tokens_per_minute: int | None = None
    """The same, of prompt and answer together."""
    own_transport: bool = False
    """Whether it needs connections of its own: another proxy or other certificates."""


def endpoint_config(
    given: str | Mapping[str, Any] | None,
    keywords: Mapping[str, Any],
    settings: Settings,
    shared: Mapping[str, Any] | None = None,
) -> EndpointConfig:
    """An endpoint from an address, or a dict in either spelling, and keywords, which win.

    Times are in milliseconds in the dict, or have their unit (``"30s"``); in seconds in keywords.
    ``settings`` and ``shared``, which wins over them, are what is not given.

    Raises:
        ConfigurationError: an unknown key, a wrong value, or no address.
    """
    if isinstance(given, str):
        given = {"url": given}
    if given is not None and not isinstance(given, Mapping):
        raise ConfigurationError(
            f"an endpoint is an address or a dict, not {type(given).__name__}",
            hint='For example {"url": "http://gpu1:8000", "max_concurrent_requests": 10}.',
        )
    own, others = _split(given or {})
    own_keywords, other_keywords = _split(keywords)
    chosen = {
        **(shared or {}),
        **check_metadata(others, "an endpoint"),
        **check_keywords(other_keywords),
    }
    parts = {
        **{name: _own(name, value, milliseconds=True) for name, value in own.items()},
        **{name: _own(name, value, milliseconds=False) for name, value in own_keywords.items()},
    }
    return EndpointConfig(
        settings=msgspec.structs.replace(settings, **chosen),
        own_transport=any(name in chosen for name in _OWN_TRANSPORT),
        **parts,
    )


def _split(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What only endpoints have, and what clients have too."""
    own: dict[str, Any] = {}
    others: dict[str, Any] = {}
    url = None
    for key, value in given.items():
        name = snake_case(key) if isinstance(key, str) else key
        if value is None:
            continue
        if name in _OWN:
            own[name] = value
        elif name == "url":
            url = value
        else:
            others[key] = value
    if url is not None and others.setdefault("api_url", url) != url:
        raise ConfigurationError("an endpoint has both url and api_url, with different values")
    return own, others


def _own(name: str, value: Any, *, milliseconds: bool) -> Any:
    if name == "circuit_breaker":
        return _breaker(value, milliseconds=milliseconds)
    return _OWN[name](name, value)


def _breaker(value: Any, *, milliseconds: bool) -> BreakerConfig:
    if isinstance(value, BreakerConfig):
        return value
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"circuit_breaker must be a dict, not {type(value).__name__}")
    given = {snake_case(str(key)): item for key, item in value.items() if item is not None}
    known = BreakerConfig.__struct_fields__
    for name in given.keys() - set(known):
        raise ConfigurationError(
            f"circuit_breaker has the unknown key {name!r}", hint=f"Known keys: {', '.join(known)}."
        )
    if "reset_timeout" in given:
        time = {"timeout": given["reset_timeout"]}
        given["reset_timeout"] = _breaker_time(time, milliseconds=milliseconds)
    try:
        return msgspec.convert(given, BreakerConfig)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"circuit_breaker: {error}") from None


def _breaker_time(time: Mapping[str, Any], *, milliseconds: bool) -> float:
    try:
        checked = check_metadata(time) if milliseconds else check_keywords(time)
    except ConfigurationError as error:
        raise ConfigurationError(
            error.message.replace("timeout", "circuit_breaker: reset_timeout", 1)
        ) from None
    return float(checked["timeout"])


def _name(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ConfigurationError(f"{key} must be a name in one line, not {value!r}")
    return value


def _weight(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(f"{key} must be a positive, finite number, not {value!r}")
    return float(value)


def _quota(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{key} must be a whole number of at least 1, not {value!r}")
    return value


_OWN: dict[str, Any] = {
    "id": _name,
    "weight": _weight,
    "circuit_breaker": _breaker,
    "requests_per_minute": _quota,
    "tokens_per_minute": _quota,
}
