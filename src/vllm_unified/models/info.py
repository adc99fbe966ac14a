"""What is known of a served model, and from where. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

Facts = Mapping[str, Any]
"""Values of some fields of :class:`ModelInfo`; a value of ``None`` is known to be none."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A model as a server serves it.

    ``None`` stands where nothing is known; ``sources`` has what is. vLLM tells dtype and
    quantization only in its development mode (``VLLM_SERVER_DEV_MODE=1``); of a server that this
    library runs on this machine they are known without.
    """

    id: str
    """The name that was asked for, or the first that the server has."""
    served_names: tuple[str, ...] | None = None
    """Names of the base model."""
    root: str | None = None
    """What was loaded: a path or a repository; of an adapter, the adapter's."""
    parent: str | None = None
    """Of an adapter: the name of its base model, of which all other fields are."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together."""
    dtype: str | None = None
    """Of weights and activations, such as ``bfloat16``."""
    quantization: str | None = None
    """The method, such as ``awq``; ``None`` with a source: not quantized."""
    quantization_bits: int | None = None
    """Of a weight."""
    gpu_memory_utilization: float | None = None
    """The share of the device's memory that vLLM may use, 0 to 1. A server on a CPU has the setting
    too, and no use for it where its KV cache has a size of its own."""
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None
    device: str | None = None
    """``cuda``, ``cpu``, ..."""
    num_gpu: int | None = None
    """Devices in use: the product of the parallel sizes; 0 on a CPU."""
    version: str | None = None
    """Of vLLM."""
    kv_cache_tokens: int | None = None
    """Tokens that fit in the KV cache, of all engines together."""
    kv_cache_dtype: str | None = None
    """``auto`` is the model's own."""
    prefix_caching: bool | None = None
    lora_enabled: bool | None = None
    lora_slots: int | None = None
    """Adapters in one batch: ``--max-loras``."""
    max_lora_rank: int | None = None
    is_multimodal: bool | None = None
    """Whether it takes images or sounds."""
    sources: dict[str, str] = {}
    """Where each field that is known is from."""


def merged_info(model: str, facts: Iterable[tuple[str, Facts]]) -> ModelInfo:
    """One of many. Of two sources that know a field, the first is believed.

    Args:
        model: The name that was asked for.
        facts: Sources by name, the best first.
    """
    known: dict[str, Any] = {"id": model}
    sources: dict[str, str] = {}
    for source, found in facts:
        for field in found.keys() - sources.keys():
            known[field], sources[field] = found[field], source
    devices = _devices(known)
    if devices is not None:
        known["num_gpu"], sources["num_gpu"] = devices, sources["device"]
    known = {name: value for name, value in known.items() if name in ModelInfo.__struct_fields__}
    order = ModelInfo.__struct_fields__
    return ModelInfo(**known, sources={name: sources[name] for name in order if name in sources})


def _devices(known: Mapping[str, Any]) -> int | None:
    device = known.get("device")
    if device == "cpu":
        return 0
    sizes = [known.get(f"{kind}_parallel_size") for kind in ("tensor", "pipeline", "data")]
    if device is None or None in sizes:
        return None
    tensor, pipeline, data = map(int, filter(None, sizes))
    return tensor * pipeline * data
