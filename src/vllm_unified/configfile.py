"""A client in a file: servers and settings, in TOML.

::

    strategy = "least_loaded"
    health_check = true             # or a table with times such as interval = "10s"

    [settings]                      # what metadata takes; times in milliseconds, or "30s"
    timeout = "60s"

    [endpoints.gpu1]                # what create_endpoint takes; the table's name is the id
    url = "http://gpu1:8000"
    api_key_env = "GPU1_KEY"        # the environment variable that has the key

Without ``[endpoints]`` it is a client for ``api_url`` of its settings. Paths are relative to the
file.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_unified.endpoints.config import endpoint_config
from vllm_unified.errors import ConfigurationError
from vllm_unified.fleet.monitor import health_check
from vllm_unified.fleet.policies import strategy
from vllm_unified.settings import (
    Settings,
    TLSConfig,
    check_metadata,
    resolve_settings,
    server_address,
    snake_case,
)

_TOP = ("strategy", "health_check", "settings", "endpoints")
_SETTINGS = (*Settings.__struct_fields__, "api_key_env")
_ENDPOINT = (
    *("url" if name == "api_url" else name for name in _SETTINGS),
    *("weight", "circuit_breaker", "requests_per_minute", "tokens_per_minute"),
)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class ClientConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a client is made of."""

    resources: Mapping[str, Any]
    """For the constructor: ``endpoints`` by id, ``strategy``, ``health_check``."""
    metadata: Mapping[str, Any]
    """For the constructor, in snake_case."""
    holds_key: bool = False
    """Whether a key stands in the file itself."""

    def __repr__(self) -> str:
        return f"ClientConfig(endpoints={list(self.resources['endpoints'])})"


def read_config(path: str | os.PathLike[str], environment: Mapping[str, str]) -> ClientConfig:
    """The client that a file describes.

    Args:
        environment: Has the keys that ``api_key_env`` names, and ``VLLM_API_URL`` for a file
            without a server.

    Raises:
        ConfigurationError: the file cannot be read or is not TOML; a table, a key or a value in it
            is wrong; an environment variable is missing. The message names file, table and key.
    """
    file = Path(path)
    top = _Table(file, "", _parsed(file, _text_of(file)), _TOP)
    settings = _Table(file, "settings", top.fields.pop("settings", {}), _SETTINGS)
    endpoints = _endpoint_tables(file, top)
    tables = [settings, *endpoints.values()]
    holds_key = any("api_key" in table.fields for table in tables)
    for table in tables:
        table.take_key(environment)
        table.take_tls(file)
    settings.check(check_metadata)
    top.check(_check_options)
    members = {id: _member(id, table) for id, table in endpoints.items()}
    return ClientConfig(
        resources={**top.fields, "endpoints": members or _only(settings.fields, environment)},
        metadata=settings.fields,
        holds_key=holds_key,
    )


def _text_of(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{file} is not UTF-8 (in line {line})") from error


def _parsed(file: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:
        lines = text.split("\n")
        end = f"line {len(lines)}, column {len(lines[-1]) + 1}, the end"
        words = str(error).replace("end of document", end)
        raise ConfigurationError(f"{file} is not TOML: {words}") from error


def _endpoint_tables(file: Path, top: _Table) -> dict[str, _Table]:
    """The tables of the endpoints; a string in place of one is its address."""
    given = top.fields.pop("endpoints", {})
    if not isinstance(given, dict):
        raise top.error("endpoints must be tables, such as [endpoints.gpu1]")
    tables = {}
    for id, content in given.items():
        content = {"url": content} if isinstance(content, str) else content
        key = id if _BARE_KEY.fullmatch(id) else json.dumps(id)
        tables[id] = table = _Table(file, f"endpoints.{key}", content, _ENDPOINT)
        if "url" not in table.fields:
            raise table.error("url is missing")
    return tables


def _member(id: str, table: _Table) -> dict[str, Any]:
    table.check(lambda fields: server_address(fields["url"], key="url"))
    table.check(lambda fields: endpoint_config(fields, {"id": id}, Settings()))
    return table.fields


def _only(settings: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, str]:
    """The server of a file without endpoints; its id is the one that a plain address gets."""
    url = resolve_settings(settings, {}, environment).api_url
    return {url: url}


def _check_options(fields: Mapping[str, Any]) -> None:
    if "strategy" in fields:
        strategy(fields["strategy"])
    health_check(fields.get("health_check"))


class _Table:
    """A table of the file: its keys in snake_case, and where an error is."""

    def __init__(self, file: Path, name: str, content: object, known: Sequence[str]) -> None:
        self._file = file
        self._name = name
        self.fields: dict[str, Any] = {}
        if not isinstance(content, dict):
            raise self.error(f"this must be a table, not {type(content).__name__}")
        for key, value in content.items():
            field = snake_case(key).removeprefix("vllm_")
            if field not in known:
                kind = "table" if isinstance(value, dict) else "key"
                raise self.error(f"unknown {kind} {key!r}", f"Known: {', '.join(known)}.")
            if field in self.fields:
                raise self.error(f"{field} is given twice")
            self.fields[field] = value

    def error(self, message: str, hint: str | None = None) -> ConfigurationError:
        """What is wrong in this table."""
        place = f"{self._file}, [{self._name}]" if self._name else str(self._file)
        return ConfigurationError(f"{place}: {message}", hint=hint)

    def check(self, check: Callable[[dict[str, Any]], object]) -> Any:
        """Check the fields; an error is told with its place."""
        try:
            return check(self.fields)
        except ConfigurationError as error:
            raise self.error(error.message, error.hint) from None

    def take_key(self, environment: Mapping[str, str]) -> None:
        """Put the key itself in place of the variable that has it, so that no repr shows it."""
        variable = self.fields.pop("api_key_env", None)
        if variable is not None:
            self.fields["api_key"] = self._variable(variable, environment)
        key = {"api_key": self.fields.get("api_key")}
        self.fields |= self.check(lambda _: check_metadata(key))

    def _variable(self, variable: object, environment: Mapping[str, str]) -> str:
        if "api_key" in self.fields:
            raise self.error("api_key and api_key_env are both given")
        if not isinstance(variable, str):
            raise self.error("api_key_env must be the name of an environment variable")
        key = environment.get(variable, "").strip()
        if not key:
            raise self.error(f"api_key_env: the environment variable {variable} is not set")
        return key

    def take_tls(self, file: Path) -> None:
        """Make the paths of certificates hold from anywhere."""
        if "tls" not in self.fields:
            return
        tls = _Table(file, f"{self._name}.tls", self.fields["tls"], TLSConfig.__struct_fields__)
        for name, value in tls.fields.items():
            if name.endswith("_file") and isinstance(value, str):
                tls.fields[name] = str(file.absolute().parent / value)
        self.fields["tls"] = tls.fields
