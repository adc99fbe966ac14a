"""What each source says of a served model. Pure: what was read comes in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_unified.models.info import Facts
from vllm_unified.models.metrics import Scrape
from vllm_unified.models.served import base_card, card_of
from vllm_unified.results import ModelCard

if TYPE_CHECKING:
    from vllm_unified.servers import ServerSpec

_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_HALF = ("bfloat16", "float16")
"""What vLLM takes over as it is; weights of another type it converts."""


def of_cards(cards: Sequence[ModelCard], model: str | None) -> Facts:
    """``/v1/models``.

    Raises:
        ModelNotFoundError: the model is not served.
    """
    card = card_of(cards, model)
    base = base_card(cards, card)
    facts: dict[str, Any] = {"id": card.id, "root": card.root, "parent": card.parent}
    names = [each.id for each in cards if (each.root, each.parent) == (base.root, base.parent)]
    facts["served_names"] = tuple(names)
    facts["max_model_len"] = base.max_model_len
    if any(each.parent for each in cards):
        facts["lora_enabled"] = True
    never = ("id", "parent")
    return {name: value for name, value in facts.items() if name in never or value is not None}


def of_version(body: bytes) -> Facts:
    """``/version``."""
    version = _object(_json(body)).get("version")
    return {"version": version} if isinstance(version, str) else {}


def of_server_info(body: bytes) -> Facts:
    """``/server_info``: vLLM's configuration as an object; before 0.11 or so as a text."""
    config = _object(_json(body)).get("vllm_config")
    return _of_text(config) if isinstance(config, str) else _of_config(_object(config))


def of_metrics(scrape: Scrape) -> Facts:
    """The labels of ``vllm:cache_config_info`` and ``vllm:lora_requests_info``."""
    engines = [labels for labels, _ in scrape.find("vllm:cache_config_info")]
    facts: dict[str, Any] = {}
    for labels in engines[:1]:
        facts = {
            "gpu_memory_utilization": _read(float, labels.get("gpu_memory_utilization")),
            "kv_cache_dtype": labels.get("cache_dtype"),
            "prefix_caching": _read(_boolean, labels.get("enable_prefix_caching")),
        }
    tokens = [_kv_tokens(labels) for labels in engines]
    if tokens and None not in tokens:
        facts["kv_cache_tokens"] = sum(each or 0 for each in tokens)
    # Old series stay; the value is the time of the last change.
    adapters = max(scrape.find("vllm:lora_requests_info"), key=lambda one: one[1], default=None)
    if adapters is not None:
        facts["lora_enabled"] = True
        facts["lora_slots"] = _read(int, adapters[0].get("max_lora"))
    return {name: value for name, value in facts.items() if value is not None}


def _kv_tokens(labels: Mapping[str, str]) -> int | None:
    size = _read(int, labels.get("kv_cache_size_tokens"))
    if size is not None:
        return int(size)
    blocks, tokens = (_read(int, labels.get(name)) for name in ("num_gpu_blocks", "block_size"))
    return None if blocks is None or tokens is None else int(blocks * tokens)


def of_spec(spec: ServerSpec, *, device: str | None) -> Facts:
    """What this library started a server with.

    Args:
        device: ``cpu``, or another one; ``None`` where it is not known.
    """
    flags = _flags(spec.extra_args)
    if "config" in flags:  # a file that may say anything
        return {}

    def said(flag: str, own: object, short: str = "") -> str | None:
        return flags.get(flag, flags.get(short, None if own is None else str(own)))

    dtype = said("dtype", spec.dtype or ("bfloat16" if device == "cpu" else None))
    facts: dict[str, Any] = {
        "dtype": {"half": "float16", "float": "float32", "auto": None}.get(dtype or "", dtype),
        "quantization": said("quantization", spec.quantization, "q"),
        "gpu_memory_utilization": _read(
            float, said("gpu-memory-utilization", spec.gpu_memory_utilization)
        ),
        "tensor_parallel_size": said("tensor-parallel-size", spec.tensor_parallel_size or 1, "tp"),
        "pipeline_parallel_size": said(
            "pipeline-parallel-size", spec.pipeline_parallel_size or 1, "pp"
        ),
        "data_parallel_size": said("data-parallel-size", 1, "dp"),
        "lora_enabled": spec.enable_lora or "enable-lora" in flags,
        "device": device,
    }
    if facts["lora_enabled"]:  # vLLM's defaults are 1 and 16
        facts["lora_slots"] = said("max-loras", spec.max_loras or 1)
        facts["max_lora_rank"] = said("max-lora-rank", spec.max_lora_rank or 16)
    for name in (*_PARALLEL, "lora_slots", "max_lora_rank"):
        facts[name] = _read(int, facts.get(name))
    return {name: value for name, value in facts.items() if value is not None}


def left_to_model(spec: ServerSpec) -> set[str]:
    """The fields that a server with this spec takes from the model's own configuration."""
    flags = _flags(spec.extra_args)
    left = set()
    if spec.dtype in (None, "auto") and flags.get("dtype", "auto") == "auto":
        left.add("dtype")
    elsewhere = {"quantization", "q", "quantization-config", "hf-overrides"}
    if spec.quantization is None and not flags.keys() & elsewhere:
        left.add("quantization")
    return set() if "config" in flags else left


def of_checkpoint(config: Mapping[str, Any], left: set[str]) -> Facts:
    """A model's ``config.json``.

    A quantized checkpoint is served as it is, or not at all. Anything else in it may be overruled
    when the server is started, and is a fact only if it is in ``left``.
    """
    text = _object(config.get("text_config"))
    facts: dict[str, Any] = {}
    dtype = _dtype(_first((config, text), ("dtype", "torch_dtype")))
    if "dtype" in left and dtype in _HALF:
        facts["dtype"] = dtype
    quantized = _first((config, text), ("quantization_config", "compression_config"))
    if isinstance(quantized, dict):
        method = quantized.get("quant_method")
        facts["quantization"] = method if isinstance(method, str) else None
        facts["quantization_bits"] = _bits(quantized)
        return {name: value for name, value in facts.items() if value is not None}
    return facts | ({"quantization": None} if "quantization" in left else {})


def _bits(quantized: Mapping[str, Any]) -> int | None:
    bits = quantized.get("bits", quantized.get("w_bit"))
    if bits is None:
        groups = _object(quantized.get("config_groups")).values()
        weights = [_object(_object(group).get("weights")) for group in groups]
        widths = {each.get("num_bits") for each in weights}
        bits = widths.pop() if len(widths) == 1 else None
    if bits is None and quantized.get("quant_method") == "fp8":
        bits = 8
    return bits if isinstance(bits, int) else None


def _of_config(config: Mapping[str, Any]) -> Facts:
    model, cache, parallel = (
        _object(config.get(f"{name}_config")) for name in ("model", "cache", "parallel")
    )
    facts: dict[str, Any] = {name: parallel.get(name) for name in _PARALLEL}
    facts["device"] = _object(config.get("device_config")).get("device")
    facts["dtype"] = _dtype(model.get("dtype"))
    facts["max_model_len"] = model.get("max_model_len")
    facts["gpu_memory_utilization"] = cache.get("gpu_memory_utilization")
    facts["kv_cache_dtype"] = cache.get("cache_dtype")
    facts["prefix_caching"] = cache.get("enable_prefix_caching")
    if facts["data_parallel_size"] == 1:  # it is of one engine
        facts["kv_cache_tokens"] = cache.get("kv_cache_size_tokens")
    known = {name: value for name, value in facts.items() if value is not None}
    if "quantization" in model:
        known["quantization"] = model["quantization"]
    if "multimodal_config" in model:
        known["is_multimodal"] = model["multimodal_config"] is not None
    if "lora_config" in config:
        known |= _of_lora(config["lora_config"])
    return known


def _of_lora(config: object) -> Facts:
    if not isinstance(config, dict):
        return {"lora_enabled": False}
    slots = {"lora_slots": config.get("max_loras"), "max_lora_rank": config.get("max_lora_rank")}
    return {"lora_enabled": True} | {name: n for name, n in slots.items() if n is not None}


_TEXT_FIELDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "dtype": ("dtype", lambda text: _dtype(text)),
    "max_model_len": ("max_seq_len", int),
    "kv_cache_dtype": ("kv_cache_dtype", str),
    "device": ("device_config", str),
    "prefix_caching": ("enable_prefix_caching", lambda text: _boolean(text)),
    **{name: (name, int) for name in _PARALLEL},
}


def _of_text(config: str) -> Facts:
    said = {
        name: value.strip("'\"") for name, value in re.findall(r"(?:^|, )(\w+)=([^,]*)", config)
    }
    read = {field: _read(kind, said.get(name)) for field, (name, kind) in _TEXT_FIELDS.items()}
    facts = {name: value for name, value in read.items() if value is not None}
    if "quantization" in said:
        method = said["quantization"]
        facts["quantization"] = None if method == "None" else method
    return facts


def _flags(args: Iterable[str]) -> dict[str, str]:
    """Options and their values, of which the last one counts; dashes for underscores."""
    flags: dict[str, str] = {}
    name = ""
    for arg in args:
        if re.match(r"--?[a-zA-Z]", arg):
            option, _, value = arg.partition("=")
            name = option.lstrip("-").replace("_", "-")
            flags[name] = value
        elif name:
            flags[name] = arg
    return flags


def _dtype(value: object) -> str | None:
    return value.removeprefix("torch.") if isinstance(value, str) else None


def _boolean(text: str) -> bool:
    return {"True": True, "False": False}[text]


def _read(kind: Callable[[str], Any], text: str | None) -> Any:
    """The value, or ``None`` where it is not one."""
    try:
        return None if text is None else kind(text)
    except (ValueError, LookupError):
        return None


def _first(tables: Iterable[Mapping[str, Any]], names: Iterable[str]) -> Any:
    names = tuple(names)
    values = (table.get(name) for table in tables for name in names)
    return next((value for value in values if value is not None), None)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
