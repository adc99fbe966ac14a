"""Settings of a client: keywords > metadata > environment > defaults.

In ``metadata`` and in environment variables, times are in **milliseconds**, as the guide of the
original system says. Python keywords, and the fields of :class:`Settings`, are in **seconds**.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from vllm_unified.errors import ConfigurationError

DEFAULT_API_URL = "http://localhost:8000"


CALL_SETTINGS = frozenset(
    "timeout first_token_timeout idle_timeout total_timeout attempt_timeout queue_timeout "
    "hedge_after max_retries continue_streams caller headers".split()
)
"""What a single call can set for itself, as keywords or in its options, in seconds."""


PRIORITIES = {"high": -10, "normal": 0, "low": 10}
"""Names of priorities. vLLM's own are numbers; lower is earlier, and 0 is its default."""


class Secret:
    """A string that no repr, log line or exception shows."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The string itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret('***')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(("Secret", self._value))


class TLSConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to trust an ``https`` server, and how to be trusted by it."""

    ca_file: str | None = None
    """PEM file of the authorities to trust, in place of the system's."""
    cert_file: str | None = None
    """PEM file of the client's own certificate (and, if ``key_file`` is not given, its key)."""
    key_file: str | None = None
    """PEM file of the client's private key."""
    verify: bool = True
    """``False`` accepts any certificate: anyone on the way can read and change what is sent."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All that a client can be told. Times are in seconds, sizes in bytes."""

    api_url: str = DEFAULT_API_URL
    """Default server: ``http://host:port``, ``https://...`` or ``unix:///path/to.sock``."""
    model: str | None = None
    """Default model; ``None`` leaves the choice to the server, which takes its base model."""
    api_key: Secret | None = None
    timeout: float = 30.0
    """For a whole call: queue, retries and answer. A stream has three clocks in its place."""
    first_token_timeout: float | None = None
    """Stream: from the call to the first token. ``None``: as ``timeout``."""
    idle_timeout: float | None = None
    """Stream: between two events. ``None``: as ``timeout``."""
    total_timeout: float | None = None
    """Stream: from the call to the end. ``None``: as long as tokens come."""
    attempt_timeout: float | None = None
    """For the answer to one attempt, or the first token of one; after it another server is tried.
    ``None``: as long as the call has."""
    queue_timeout: float | None = None
    """In line for a slot. ``None``: as long as the call has."""
    hedge_after: float | None = None
    """Send a request that has waited so long for its answer to a second server as well, and take
    the answer that comes first; not for streams. ``None``: never."""
    connect_timeout: float = 10.0
    """For one attempt to connect, TLS included."""
    max_retries: int = 2
    """Attempts after the first. The default is openai-python's."""
    max_concurrent_requests: int = 256
    """Requests in flight at one server; more wait. The default is vLLM's smallest default for
    ``--max-num-seqs`` on GPUs, the size of batch that the server itself runs."""
    queue_size: int = 10_000
    """Callers that may wait for one server; one more gets ``QueueFullError``."""
    priority: int = 0
    """Of requests that give none; lower is earlier. It goes to the server as well."""
    caller: str = ""
    """In whose name requests are made: callers of one priority get their slots in turn."""
    continue_streams: bool = True
    """Go on at another server of a fleet when a stream loses its own."""
    max_response_bytes: int = 64 * 2**20
    """For a whole answer, and for one event of a stream."""
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Sent with every request."""
    proxy: str | None = None
    """``http://`` proxy for all requests; ``""`` for none. ``None``: as the environment says
    (``HTTP_PROXY``, ``HTTPS_PROXY``, ``NO_PROXY``)."""
    tls: TLSConfig | None = None

    def for_call(self, overrides: Mapping[str, Any]) -> Settings:
        """These settings with some of :data:`CALL_SETTINGS` replaced; ``headers`` are added.

        Raises:
            ConfigurationError: a value is of the wrong type.
        """
        if not overrides:
            return self
        checked = check_keywords(overrides)
        if "headers" in checked:
            checked["headers"] = {**self.headers, **checked["headers"]}
        return msgspec.structs.replace(self, **checked)

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in self.__struct_fields__
            if name not in ("headers", "proxy")
        )
        return f"Settings({shown})"


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(key, value, "a string")
    return value


def _secret(key: str, value: object) -> Secret:
    if isinstance(value, Secret):
        return value
    if not isinstance(value, str):
        raise ConfigurationError(f"{key} must be a string, not {type(value).__name__}")
    value = value.strip()
    if not value.isascii() or not value.isprintable():
        raise ConfigurationError(
            f"{key} has characters that cannot stand in an HTTP header",
            hint="Was it copied with a line break or a typographic character?",
        )
    return Secret(value)


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(key: str, value: object) -> float:
    return _time(key, value, "seconds")


def _milliseconds(key: str, value: object) -> float:
    """``30000``, or with its unit: ``"30s"``, ``"500ms"``, ``"2m"``."""
    if isinstance(value, str):
        written = _DURATION.fullmatch(value.strip())
        if written is None:
            raise _wrong(key, value, 'milliseconds, or a time such as "30s" or "500ms"')
        return _time(key, float(written[1]) * _UNITS[written[2]], "seconds")
    return _time(key, value, "milliseconds") / 1000


def _time(key: str, value: object, unit: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(key, value, f"a number of {unit}")
    if not 0 < value < math.inf:
        raise _wrong(key, value, f"a positive, finite number of {unit}")
    try:
        return float(value)
    except OverflowError:
        raise _wrong(key, value, f"a positive, finite number of {unit}") from None


def _count(minimum: int) -> Callable[[str, object], int]:
    def check(key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise _wrong(key, value, f"a whole number of at least {minimum}")
        return value

    return check


# RFC 9110, sections 5.1 and 5.5.
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_UNSENDABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")


def _headers(key: str, value: object) -> Mapping[str, str]:
    if not isinstance(value, Mapping) or not all(
        isinstance(item, str) for pair in value.items() for item in pair
    ):
        raise ConfigurationError(f"{key} must be a mapping of strings to strings")
    for name, text in value.items():
        if not _HEADER_NAME.fullmatch(name) or _UNSENDABLE.search(text):
            raise ConfigurationError(f"{key}: the header {name!r} cannot be sent over HTTP")
    return dict(value)


def _tls(key: str, value: object) -> TLSConfig:
    if isinstance(value, TLSConfig):
        return value
    try:
        return msgspec.convert(value, TLSConfig)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{key}: {error}") from None


def _switch(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, value, "True or False")
    return value


def priority_number(key: str, value: object) -> int:
    """The number of a priority, which may be one of :data:`PRIORITIES`.

    Raises:
        ConfigurationError: neither a name nor a whole number.
    """
    if isinstance(value, str) and value in PRIORITIES:
        return PRIORITIES[value]
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value  # 64 bits are what vLLM can hand to its engine
    raise _wrong(key, value, f"{', '.join(map(repr, PRIORITIES))} or a whole number of 64 bits")


def _url(key: str, value: object) -> str:
    return server_address(_text(key, value), key=key)


def _proxy(key: str, value: object) -> str:
    return proxy_address(_text(key, value), key=key)


def proxy_address(url: str, *, key: str) -> str:
    """The address of a proxy; ``http://`` where it says no scheme. ``""`` stays as it is.

    Raises:
        ConfigurationError: not the URL of a proxy for HTTP. It may hold credentials, so the message
            does not show it.
    """
    url = url.strip()
    if not url:
        return ""
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigurationError(
            f"{key} is not the URL of an HTTP proxy",
            hint="It looks like http://host:3128; SOCKS is not supported.",
        )
    return url


def _wrong(key: str, value: object, wanted: str) -> ConfigurationError:
    return ConfigurationError(f"{key} must be {wanted}, not {value!r}")


_CHECKS: dict[str, Callable[[str, object], Any]] = {
    "api_url": _url,
    "model": _text,
    "api_key": _secret,
    "timeout": _seconds,
    "first_token_timeout": _seconds,
    "idle_timeout": _seconds,
    "total_timeout": _seconds,
    "attempt_timeout": _seconds,
    "queue_timeout": _seconds,
    "hedge_after": _seconds,
    "connect_timeout": _seconds,
    "max_retries": _count(0),
    "max_concurrent_requests": _count(1),
    "queue_size": _count(0),
    "priority": priority_number,
    "caller": _text,
    "continue_streams": _switch,
    "max_response_bytes": _count(1),
    "headers": _headers,
    "proxy": _proxy,
    "tls": _tls,
}
_METADATA_CHECKS = {
    name: _milliseconds if check is _seconds else check for name, check in _CHECKS.items()
}
_ENVIRONMENT = {
    "VLLM_API_URL": "api_url",
    "VLLM_MODEL": "model",
    "VLLM_API_KEY": "api_key",
    "VLLM_TIMEOUT": "timeout",
}


def resolve_settings(
    metadata: Mapping[str, Any] | None,
    keywords: Mapping[str, Any],
    environment: Mapping[str, str],
) -> Settings:
    """The settings of a client.

    ``metadata`` takes snake_case and camelCase, with or without the prefix ``vllm_``. A keyword
    that is ``None`` counts as not given.

    Raises:
        ConfigurationError: an unknown key, the same setting twice with different values, or a
            value of the wrong type. The message names the key.
    """
    return Settings(
        **{
            **_from_environment(environment),
            **check_metadata(metadata),
            **check_keywords(keywords),
        }
    )


def check_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Settings given as Python keywords, checked; ``None`` counts as not given.

    Raises:
        ConfigurationError: an unknown name, or a wrong value.
    """
    for name in keywords.keys() - _CHECKS.keys():
        raise ConfigurationError(
            f"there is no setting {name!r}", hint=f"Settings: {', '.join(_CHECKS)}."
        )
    return {
        name: _CHECKS[name](name, value) for name, value in keywords.items() if value is not None
    }


def check_metadata(metadata: Mapping[str, Any] | None, what: str = "metadata") -> dict[str, Any]:
    """Settings given as metadata, checked: both spellings, times in milliseconds or with a unit.

    ``what`` they are of is for the words of errors.

    Raises:
        ConfigurationError: an unknown key, a wrong value, or two values for one setting.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise ConfigurationError(f"{what} must be a mapping, not {type(metadata).__name__}")
    found: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in metadata.items():
        name = _setting_name(key, what)
        if value is None:
            continue
        checked = _METADATA_CHECKS[name](key, value)
        if name in found and found[name] != checked:
            raise ConfigurationError(
                f"{what} gives {name} twice, as {spelled[name]!r} and as {key!r}, "
                "with different values",
                hint="Keep one of them.",
            )
        found[name], spelled[name] = checked, key
    return found


def snake_case(key: str) -> str:
    """``maxRetries`` as ``max_retries``."""
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", key).lower()


def _setting_name(key: object, what: str) -> str:
    if isinstance(key, str):
        name = snake_case(key).removeprefix("vllm_")
        if name in _CHECKS:
            return name
    raise ConfigurationError(
        f"{what} has the unknown key {key!r}",
        hint=f"Known keys: {', '.join(_CHECKS)}; also in camelCase, and with the prefix vllm_.",
    )


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variable, name in _ENVIRONMENT.items():
        text = environment.get(variable, "").strip()
        if text:
            found[name] = _METADATA_CHECKS[name](variable, _number(variable, text, name))
    return found


def _number(variable: str, text: str, name: str) -> object:
    if name != "timeout":
        return text
    try:
        return float(text)
    except ValueError:
        raise _wrong(variable, text, "a number of milliseconds") from None


_HOST = re.compile(r"[^\s\x00-\x20]*")
_PATH = re.compile(r"[!-~]*")
_API_SUFFIX = re.compile(r"(/v1(/chat)?(/completions)?)?/*$")


def server_address(url: object, *, key: str = "endpoint_url") -> str:
    """The address of a server in its one spelling: scheme, host, port, path before ``/v1``.

    ``/v1``, ``/v1/completions`` and ``/v1/chat/completions`` at the end are accepted and dropped.

    Raises:
        ConfigurationError: not an ``http``, ``https`` or ``unix`` URL, or one with credentials,
            a query or a fragment in it.
    """
    url = _text(key, url).strip()
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigurationError(f"{key} is not a URL: {_without_credentials(url)!r}") from None
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigurationError(
            f"{key} must not hold credentials, a query or a fragment",
            hint="Pass a key with api_key=..., anything else with headers={...}.",
        )
    if parts.scheme == "unix" and parts.path.strip("/") and not parts.netloc:
        return f"unix://{parts.path.rstrip('/')}"
    sendable = _HOST.fullmatch(parts.netloc) and _PATH.fullmatch(parts.path)
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not sendable:
        raise ConfigurationError(
            f"{key} is not the URL of a server: {_without_credentials(url)!r}",
            hint="It looks like http://host:8000, https://host or unix:///path/to.sock.",
        )
    return f"{parts.scheme}://{parts.netloc.lower()}{_API_SUFFIX.sub('', parts.path)}"


def _without_credentials(url: str) -> str:
    _, at, rest = url.rpartition("@")
    return ("...@" if at else "") + re.split(r"[?#]", rest)[0]
