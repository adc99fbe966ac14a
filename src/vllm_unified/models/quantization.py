"""What a server's weights can be quantized to, and what a switch came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from vllm_unified.errors import ConfigurationError
from vllm_unified.settings import snake_case

Origin = Literal["made", "given", "online"]
"""Where the weights come from: a checkpoint that is made here where there is none, one that must be
there, or the plain ones, which vLLM quantizes as it loads them."""

MAX_PERPLEXITY_RATIO = 1.5
"""The default of ``max_perplexity_ratio``.

Measured with the bundled model, which is small and so loses much: 1.03 with W8A8, 1.13 with AWQ of
4 bits. What this is for is weights that were damaged or do not fit their scales; how much is lost
otherwise is a matter of taste.
"""


class Method(msgspec.Struct, frozen=True):
    """A way to quantize weights."""

    name: str
    bits: tuple[int, ...]
    """Of a weight, the usual number first."""
    origin: Origin
    flag: str | None = None
    """For ``--quantization``; ``None``: vLLM reads it in the checkpoint."""
    not_on_cpu: str | None = None
    """Why it can only fail on a CPU, in vLLM 0.32."""


_NO_KERNEL = "vLLM has no CPU kernels for it"
_MOE = "it is for mixture-of-experts layers only"

METHODS = {
    method.name: method
    for method in (
        Method("awq", (4,), "made"),
        Method("w8a8", (8,), "made"),
        Method("gptq", (4, 8, 3, 2), "given"),
        Method("compressed-tensors", (4, 8), "given"),
        Method("fp8", (8,), "online", "fp8"),
        Method("fp8_per_tensor", (8,), "online", "fp8_per_tensor"),
        Method("fp8_per_block", (8,), "online", "fp8_per_block"),
        Method("fp8_per_channel", (8,), "online", "fp8_per_channel"),
        Method("mxfp8", (8,), "online", "mxfp8", _NO_KERNEL),
        Method("mxfp4", (4,), "given", None, _NO_KERNEL),
        Method("experts_int8", (8,), "online", "experts_int8"),
        Method(
            "int8_per_channel_weight_only", (8,), "online", "int8_per_channel_weight_only", _MOE
        ),
        Method("nvfp4_per_token", (4,), "online", "nvfp4_per_token", _MOE),
        Method("inc", (4, 8, 3, 2), "given"),
        Method("torchao", (8, 4), "given"),
        Method("quark", (8, 4), "given", None, _NO_KERNEL),
        Method("moe_wna16", (4, 8), "given"),
        Method("modelopt", (8,), "given", None, _NO_KERNEL),
        Method("modelopt_fp4", (4,), "given", None, _NO_KERNEL),
        Method("modelopt_mxfp8", (8,), "given", None, _NO_KERNEL),
        Method("modelopt_mixed", (4, 8), "given", None, _NO_KERNEL),
        Method("gpt_oss_mxfp4", (4,), "given", None, _NO_KERNEL),
        Method("deepseek_v4_fp8", (8,), "given", None, _NO_KERNEL),
        Method("humming", (4, 8), "given", None, _NO_KERNEL),
        Method("fbgemm_fp8", (8,), "given", None, _NO_KERNEL),
        Method("fp_quant", (4, 8), "given", None, _NO_KERNEL),
    )
}

_ALIASES = {
    "auto_awq": "awq",
    "awq_marlin": "awq",
    "int4": "awq",
    "w4a16": "awq",
    "int8": "w8a8",
    "w8a8_int8": "w8a8",
    "auto_gptq": "gptq",
    "gptq_marlin": "gptq",
    "compressed_tensors": "compressed-tensors",
    "auto_round": "inc",
}

_GONE = {
    "gguf": "it left vLLM for the plugin vllm-gguf-plugin",
    "bitsandbytes": "it left vLLM for the plugin vllm-bnb-plugin",
    **dict.fromkeys(
        "aqlm squeezellm marlin gptq_marlin_24 deepspeedfp hqq ipex tpu_int8 qqq ptpc_fp8 "
        "neuron_quant rtn auto_quant petit_nvfp4".split(),
        "vLLM has removed it",
    ),
}


class QuantizationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What ``set_quantization`` is asked for; times in seconds."""

    enabled: bool
    method: str | None = None
    """Of :data:`METHODS`; ``None``: by ``bits``, or whatever ``checkpoint`` is."""
    bits: int | None = None
    """Of a weight; ``None``: what is usual for the method."""
    checkpoint: str | None = None
    """A folder, or a repository's id, that is quantized already."""
    group_size: int | None = None
    """Weights that share a scale; ``None``: the largest of 128, 64 and 32 that fits the model."""
    calibration: str | tuple[str, ...] | None = None
    """A JSONL file, or texts; ``None``: a small set of this library's."""
    in_place: bool | None = None
    """End the old server before the new one starts, so that both never need memory at once;
    ``None``: where the memory does not suffice, or the address must stay."""
    max_perplexity_ratio: float = MAX_PERPLEXITY_RATIO
    """How much less likely, new to old, the new server may find the texts of the probe."""
    drain_timeout: float = 60.0
    start_timeout: float = 600.0


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """How weights are stored."""

    enabled: bool
    method: str | None = None
    """vLLM's name for the format."""
    bits: int | None = None
    group_size: int | None = None
    activation_bits: int | None = None
    """Where activations are quantized too."""
    is_float: bool = False

    def __str__(self) -> str:
        if not self.enabled:
            return "no quantization"
        return self.method + (f" of {self.bits} bits" if self.bits else "") if self.method else "?"


class ServerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A server before or after the switch. ``None`` is what was not measured."""

    url: str
    quantization: dict[str, Any]
    """``enabled``, ``method``, ``bits``, ``checkpoint``."""
    weights_bytes: int | None = None
    """Bytes of tensors in its checkpoint."""
    memory_bytes: int | None = None
    """Resident memory of all its processes, KV cache included."""
    tokens_per_second: float | None = None
    """Of four short generations at once. Taken under whatever traffic there was: a hint."""
    perplexity: float | None = None
    """Of the probe's texts."""


class Step(msgspec.Struct, frozen=True):
    """A part of the switch."""

    name: str
    seconds: float


class QuantizationResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ``set_quantization`` did."""

    quantization: dict[str, Any]
    """``enabled``, ``method``, ``bits``, ``checkpoint``: what the server runs with now."""
    changed: bool
    """Whether anything was done; ``False`` where the server ran so already."""
    url: str
    """Where it is served now. The old address goes on working in the client that switched."""
    before: ServerFigures
    after: ServerFigures
    agreement: float | None = None
    """Share of the probe's positions where both servers find the same token the most likely."""
    placement: Literal["beside", "in_place"] | None = None
    """Whether the new server started beside the old one, or after its end."""
    steps: tuple[Step, ...] = ()
    duration: float = 0.0
    """Seconds."""


class StepProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a switch is; ``str()`` makes a line for people."""

    step: str
    message: str
    seconds: float
    """Since the step's beginning; when it has ended, all that it took."""
    done: bool = False

    def __str__(self) -> str:
        return f"{self.step}: {'done' if self.done else self.message} ({self.seconds:.1f} s)"


def quantization_config(
    given: Mapping[str, Any] | QuantizationConfig | None, keywords: Mapping[str, Any]
) -> QuantizationConfig:
    """The configuration in a dict, in keywords, or both; keywords win.

    Raises:
        ConfigurationError: names the key that is unknown or wrong.
    """
    if isinstance(given, QuantizationConfig):
        given = msgspec.structs.asdict(given)
    if given is not None and not isinstance(given, Mapping):
        raise ConfigurationError(f"a quantization must be a dict, not {type(given).__name__}")
    found: dict[str, Any] = {}
    for source in (given or {}, keywords):
        found |= {_key(name): value for name, value in source.items() if value is not None}
    if "enabled" not in found:
        raise ConfigurationError(
            "quantization: enabled is missing",
            hint='For example {"enabled": True, "method": "awq", "bits": 4}, or enabled=False.',
        )
    for name in ("checkpoint", "calibration"):
        if isinstance(found.get(name), Path):
            found[name] = str(found[name])
    try:
        config = msgspec.convert(found, QuantizationConfig)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"quantization: {error}") from None
    return _checked(config)


def _key(name: object) -> str:
    known = QuantizationConfig.__struct_fields__
    key = snake_case(str(name)).replace("-", "_")
    if key not in known:
        raise ConfigurationError(
            f"quantization has the unknown key {name!r}", hint=f"Known keys: {', '.join(known)}."
        )
    return key


def _checked(config: QuantizationConfig) -> QuantizationConfig:
    for name in ("max_perplexity_ratio", "drain_timeout", "start_timeout", "group_size"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigurationError(f"quantization: {name} must be greater than 0, not {value!r}")
    if not config.enabled:
        if config.checkpoint:
            raise ConfigurationError("quantization: a checkpoint makes no sense with enabled=False")
        return msgspec.structs.replace(config, method=None, bits=None)
    method = _method_asked(config)
    if method is None:
        return config
    bits = config.bits or method.bits[0]
    if bits not in method.bits:
        allowed = " or ".join(map(str, method.bits))
        raise ConfigurationError(
            f"quantization: {method.name} has {allowed} bits, not {bits}",
            hint=_by_bits(bits),
        )
    if method.origin == "given" and not config.checkpoint:
        raise ConfigurationError(
            f"quantization: {method.name} takes a checkpoint that is quantized already",
            hint="Give its folder or repository with checkpoint=..., or let awq or w8a8 make one.",
        )
    # A checkpoint of this format may have any of its numbers of bits.
    known = config.bits or (bits if len(method.bits) == 1 or not config.checkpoint else None)
    return msgspec.structs.replace(config, method=method.name, bits=known)


def _method_asked(config: QuantizationConfig) -> Method | None:
    """The method; ``None`` where the checkpoint says it."""
    if config.method is not None:
        return method_named(config.method)
    if config.checkpoint:
        return None
    name = {4: "awq", 8: "w8a8"}.get(config.bits or 0)
    if name is None:
        raise ConfigurationError(
            "quantization: method is missing", hint="For example method='awq', or 'w8a8'."
        )
    return METHODS[name]


def _by_bits(bits: int) -> str:
    fitting = [method.name for method in METHODS.values() if bits in method.bits]
    return f"With {bits} bits: {', '.join(fitting)}." if fitting else "4 or 8 bits are usual."


def method_named(name: str) -> Method:
    """The method of this name, or of which it is another name.

    Raises:
        ConfigurationError: vLLM has no such method, or no longer.
    """
    folded = name.strip().lower().replace("-", "_")
    canonical = _ALIASES.get(folded, folded)
    if method := METHODS.get(canonical) or METHODS.get(canonical.replace("_", "-")):
        return method
    if folded in _GONE:
        raise ConfigurationError(
            f"quantization: {name} cannot be served: {_GONE[folded]}",
            hint="awq (4 bits) and w8a8 (8 bits) can be made of any plain model.",
        )
    raise ConfigurationError(
        f"quantization: there is no method {name!r}", hint=f"Methods: {', '.join(METHODS)}."
    )


def stored_as(config: Mapping[str, Any]) -> Quantization:
    """How a model's ``config.json`` says that its weights are stored."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    for found in (config.get("quantization_config"), inner, config.get("compression_config")):
        if isinstance(found, Mapping):
            return _described(found)
    return Quantization(enabled=False)


def _described(found: Mapping[str, Any]) -> Quantization:
    method = str(found.get("quant_method") or "").lower()
    if method.replace("_", "-") == "compressed-tensors":
        return _compressed(found)
    bits = found.get("bits", found.get("w_bit"))
    group = found.get("group_size", found.get("q_group_size"))
    if bits is None and "fp8" in method:
        bits = 8
    return Quantization(
        enabled=True,
        method=_ALIASES.get(method.replace("-", "_"), method) or None,
        bits=bits if isinstance(bits, int) else None,
        group_size=group if isinstance(group, int) and group > 0 else None,
        is_float="fp8" in method,
    )


def _compressed(found: Mapping[str, Any]) -> Quantization:
    groups = found.get("config_groups") or {}
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    weights = first.get("weights") or {}
    activations = first.get("input_activations") or {}
    return Quantization(
        enabled=True,
        method="compressed-tensors",
        bits=weights.get("num_bits"),
        group_size=weights.get("group_size"),
        activation_bits=activations.get("num_bits"),
        is_float=weights.get("type") == "float",
    )


def is_as_asked(stored: Quantization, config: QuantizationConfig) -> bool:
    """Whether weights that are stored like this are what ``config`` asks for.

    compressed-tensors is a format: it holds what awq, gptq, w8a8 and fp8 make.
    """
    if not config.enabled or not stored.enabled:
        return config.enabled == stored.enabled
    if config.bits is not None and stored.bits is not None and config.bits != stored.bits:
        return False
    if config.group_size is not None and config.group_size != stored.group_size:
        return False
    return config.method in (None, *_names_of(stored))


def _names_of(stored: Quantization) -> Sequence[str]:
    """The methods that these weights may be called by."""
    if stored.method != "compressed-tensors":
        return [stored.method or ""]
    if stored.is_float:
        return ["compressed-tensors", "fp8"] if stored.bits == 8 else ["compressed-tensors"]
    if stored.activation_bits is None:
        return ["compressed-tensors", "awq", "gptq"]
    return ["compressed-tensors", "w8a8"] if stored.bits == 8 else ["compressed-tensors"]
