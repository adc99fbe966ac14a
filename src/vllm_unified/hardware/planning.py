"""A plan for a model's name, on this machine or another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vllm_unified.errors import ConfigurationError
from vllm_unified.hardware.arithmetic import make_plan
from vllm_unified.hardware.detect import Hardware, detect
from vllm_unified.hardware.plans import Plan
from vllm_unified.hardware.shape import model_shape
from vllm_unified.models.weights import model_config, model_folder

_BUNDLED = "bundled"
_BUNDLED_CONTEXT = 2048
# SmolLM2-135M-Instruct, whose folder is made only when a server first needs it.
_BUNDLED_CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def plan(
    model: str | Mapping[str, Any] = _BUNDLED,
    hardware: Hardware | None = None,
    *,
    name: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    max_model_len: int | None = None,
    kv_cache_gib: float | None = None,
) -> Plan:
    """Whether a model fits, how it should be served, and what it takes.

    Args:
        model: A folder, the id of a repository in Hugging Face's cache, ``"bundled"``, or the
            contents of a ``config.json``. Nothing is downloaded.
        hardware: The machine; ``None``: this one.
        name: What the model is called in the plan.

    The other arguments are as for :func:`make_plan`.

    Raises:
        ConfigurationError: the model's configuration is not here, or does not say its sizes.
    """
    config, known_as = _config_of(model)
    if known_as == _BUNDLED and max_model_len is None:
        max_model_len = _BUNDLED_CONTEXT
    return make_plan(
        name or known_as,
        model_shape(config),
        hardware or detect(),
        dtype=dtype,
        quantization=quantization,
        max_model_len=max_model_len,
        kv_cache_gib=kv_cache_gib,
    )


def _config_of(model: str | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    if isinstance(model, Mapping):
        return model, str(model.get("_name_or_path") or "the model")
    if model == _BUNDLED:
        return _BUNDLED_CONFIG, model
    folder = model_folder(model, os.environ)
    config = model_config(folder) if folder is not None else {}
    if not config:
        raise ConfigurationError(
            f"there is no config.json of {model!r} on this machine",
            hint="Give a model's folder; of a repository, its config.json is enough.",
        )
    return config, model
