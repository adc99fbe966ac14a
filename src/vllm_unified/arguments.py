"""What callers give: a call's settings are told apart from the fields that go to the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_unified.errors import BadRequestError
from vllm_unified.settings import CALL_SETTINGS, Settings

Params = Mapping[str, Any]


def call_arguments(
    settings: Settings,
    data: Mapping[str, Any],
    model: str | None,
    options: Params | None,
    params: Params,
) -> tuple[Settings, dict[str, Any]]:
    """The settings of one call, and the fields that go to the server.

    Args:
        settings: Of the servers that are asked.
        data: Fields; ``options`` win over them, and ``params`` over those.
        model: As an argument of its own it wins over all three.

    Raises:
        BadRequestError: they contradict each other.
        ConfigurationError: a setting is of the wrong type.
    """
    if options is not None and not isinstance(options, Mapping):
        raise BadRequestError(f"options must be a mapping, not {type(options).__name__}")
    fields = {**data, **(options or {}), **params}
    model = _chosen(model, fields)
    overrides = {name: fields.pop(name) for name in CALL_SETTINGS & fields.keys()}
    settings = settings.for_call(overrides)
    chosen = model or settings.model
    if chosen is not None:
        fields["model"] = chosen
    if settings.priority:
        fields.setdefault("priority", settings.priority)
    return settings, fields


def _chosen(model: str | None, fields: dict[str, Any]) -> str | None:
    """The model, or the LoRA adapter, that the call itself names; it is taken out of the fields."""
    model = model or fields.pop("model", None)
    spelled = [name for name in ("lora_adapter", "loraAdapter") if name in fields]
    for adapter in [fields.pop(name) for name in spelled]:
        if adapter is not None and model not in (None, adapter):
            raise BadRequestError(
                f"both model={model!r} and lora_adapter={adapter!r} are given",
                hint="A LoRA adapter is asked for in place of its base model: keep one of them.",
            )
        model = adapter or model
    return model
