"""Asks a server, and this machine, what is known of a served model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.errors import ConfigurationError, ModelNotFoundError, VllmError
from vllm_unified.models import facts
from vllm_unified.models.asking import ask, read_page
from vllm_unified.models.info import Facts, ModelInfo, merged_info
from vllm_unified.models.served import base_card, base_name, card_of
from vllm_unified.results import ModelCard
from vllm_unified.wire.responses import decode_models

if TYPE_CHECKING:
    from vllm_unified.servers import RunningServer

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0")


async def inspect_model(
    endpoints: Sequence[Endpoint], model: str | None, *, timeout: float
) -> ModelInfo:
    """What is known of a model at the first of these servers that answers and serves it.

    Raises:
        ModelNotFoundError: none serves it.
        VllmError: none answers; the first one's.
    """
    errors: list[VllmError] = []
    for endpoint in endpoints:
        try:
            return await _inspect(endpoint, model or endpoint.settings.model, timeout)
        except VllmError as error:
            errors.append(error)
    if not errors:
        raise ConfigurationError("there is no endpoint to ask")
    raise next((each for each in errors if isinstance(each, ModelNotFoundError)), errors[0])


async def _inspect(endpoint: Endpoint, model: str | None, timeout: float) -> ModelInfo:
    cards, info, metrics, version = await asyncio.gather(
        ask(endpoint, "/v1/models", decode_models, timeout),
        ask(endpoint, "/server_info?config_format=json", facts.of_server_info, timeout),
        ask(endpoint, "/metrics", read_page, timeout),
        ask(endpoint, "/version", facts.of_version, timeout),
        return_exceptions=True,
    )
    for error in (cards, info, metrics, version):
        if isinstance(error, BaseException) and not isinstance(error, VllmError):
            raise error
    if isinstance(cards, BaseException) and isinstance(version, BaseException):
        raise cards  # what else answers is no vLLM
    found: list[tuple[str, Facts]] = []
    if not isinstance(info, BaseException):
        found.append(("/server_info", info))
    if not isinstance(metrics, BaseException):
        found.append(("/metrics", facts.of_metrics(metrics)))
    if not isinstance(version, BaseException):
        found.append(("/version", version))
    if isinstance(cards, BaseException):
        names = [] if isinstance(metrics, BaseException) else metrics.models
        if model is None and not names:
            raise cards
        return merged_info(model or names[0], found)
    try:
        served = facts.of_cards(cards, model)
    except ModelNotFoundError as error:
        error.endpoint = endpoint.url
        raise
    found.insert(0, ("/v1/models", served))
    found += await asyncio.to_thread(_local_facts, endpoint.url, cards, model)
    return merged_info(served["id"], found)


def _local_facts(
    url: str, cards: Sequence[ModelCard], model: str | None
) -> list[tuple[str, Facts]]:
    """What this machine knows of a server that runs on it."""
    if _loopback_port(url) is None:
        return []
    base = base_card(cards, card_of(cards, model))
    found: list[tuple[str, Facts]] = []
    left: set[str] = set()
    record = _record_of(url, base_name(cards, base.id), base.root)
    if record is not None:
        found.append(("launch record", facts.of_spec(record.spec, device=_device(record.engine))))
        left = facts.left_to_model(record.spec)
    config = _checkpoint(base.root)
    if config is not None:
        found.append(("config.json", facts.of_checkpoint(config, left)))
    return found


def _record_of(url: str, name: str, root: str | None) -> RunningServer | None:
    """The record of the server at this address, if it is of the model that is served there."""
    try:
        from vllm_unified.servers import running_servers
    except ImportError:  # without what it takes to run servers
        return None
    port = _loopback_port(url)
    return next(
        (
            record
            for record in running_servers()
            if record.state == "ready"
            and _loopback_port(record.url) == port
            and (record.model, record.spec.model) == (name, root)
        ),
        None,
    )


def _device(engine: str) -> str | None:
    """What an engine named so runs on: ``cpu-0.32.0``, ``environment-cuda-0.32.0``."""
    kinds = engine.removeprefix("environment-").split("-")
    return kinds[0] if kinds[0] in ("cpu", "cuda") else None


def _loopback_port(url: str) -> int | None:
    parts = urlsplit(url)
    is_here = parts.scheme == "http" and parts.hostname in _LOOPBACK and not parts.path.strip("/")
    return parts.port if is_here else None


def _checkpoint(root: str | None) -> Mapping[str, Any] | None:
    if root is None or not os.path.isabs(root):
        return None
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((Path(root) / "config.json").read_bytes())
        return config if isinstance(config, dict) else None
    return None
