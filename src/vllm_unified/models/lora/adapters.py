"""LoRA adapters: what callers ask for, and what they get."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vllm_unified.errors import ConfigurationError, VllmError
from vllm_unified.results import ModelCard
from vllm_unified.settings import snake_case

_KEYS = {"adapter_name": "name", "adapter_path": "path", "base_model": "base_model"}


class LoraAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that servers have."""

    name: str
    path: str
    """As its server was told: a folder there, or a repository."""
    base_model: str | None = None
    """The name of the model that it changes."""
    endpoints: tuple[str, ...] = ()
    """Ids of the endpoints that have it; none, if it is loaded when it is asked for."""


class LoraResult(msgspec.Struct, frozen=True, kw_only=True):
    """What loading or unloading an adapter led to."""

    success: bool
    name: str
    endpoints: tuple[str, ...] = ()
    """Ids of the endpoints that have it now."""
    already_loaded: bool = False
    """Whether there was nothing to do."""
    failed: dict[str, VllmError] = {}
    """Why endpoints that were tried have it not, by their id."""
    notes: tuple[str, ...] = ()
    """What to know about it, for people."""
    duration: float = 0.0
    """Seconds."""


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be loaded."""

    name: str
    path: str
    base_model: str | None = None


def wanted_adapter(given: Mapping[str, Any] | None, keywords: Mapping[str, Any]) -> Adapter:
    """From a dict with ``adapter_name``, ``adapter_path`` and perhaps ``base_model``, in snake_case
    or camelCase, or from keywords, which win.

    Raises:
        ConfigurationError: names the key that is wrong or missing.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ConfigurationError(f"the adapter must be a dict, not {type(given).__name__}")
    found: dict[str, Any] = {}
    for key, value in (given or {}).items():
        name = snake_case(key) if isinstance(key, str) else ""
        if name not in _KEYS:
            raise ConfigurationError(
                f"the adapter has the unknown key {key!r}",
                hint=f"Known keys: {', '.join(_KEYS)}; also in camelCase.",
            )
        if found.get(name, value) != value:
            raise ConfigurationError(f"the adapter gives {name} twice, with different values")
        found[name] = value
    found |= {key: value for key, value in keywords.items() if value is not None}
    for key in _KEYS:
        value = found.get(key)
        if value is None and key != "base_model":
            raise ConfigurationError(f"the adapter has no {key}")
        if value is not None and not (isinstance(value, str) and value and value.isprintable()):
            raise ConfigurationError(f"{key} must be a string in one line, not {value!r}")
    return Adapter(**{_KEYS[key]: value for key, value in found.items()})


def temporary_name(adapter: Adapter) -> str:
    """The name that a version has at its server until it has taken the old one's place."""
    return f"{adapter.name}@{hashlib.sha256(adapter.path.encode()).hexdigest()[:8]}"


def loaded_adapters(cards: Sequence[ModelCard]) -> dict[str, ModelCard]:
    """The adapters among what a server serves, by name."""
    return {card.id: card for card in cards if card.parent is not None}


def union(listings: Mapping[str, Sequence[ModelCard]]) -> list[LoraAdapter]:
    """The adapters of several endpoints, each version once; ``listings`` are by endpoint id."""
    found: dict[tuple[str, str], LoraAdapter] = {}
    for id, cards in listings.items():
        for name, card in loaded_adapters(cards).items():
            path = card.root or ""
            known = found.get((name, path))
            found[name, path] = LoraAdapter(
                name=name,
                path=path,
                base_model=card.parent,
                endpoints=(*(known.endpoints if known else ()), id),
            )
    return sorted(found.values(), key=lambda adapter: (adapter.name, adapter.path))
