"""Whether a change of a server's quantization can work, before anything is done for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from vllm_unified.errors import QuantizationError
from vllm_unified.models.quantization import (
    METHODS,
    Quantization,
    QuantizationConfig,
    is_as_asked,
)
from vllm_unified.servers.engines import EngineKind

Placement = Literal["beside", "in_place"]

_GIB = 2**30
_MARGIN = 1.1
_DISK_FACTOR = 2
_FLAGS = ("--quantization", "-q", "--quantization-config")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the server, of the weights that are wanted, and of the machine. Sizes are in
    bytes; 0 where a size cannot be told."""

    platform: EngineKind
    cores: int = 1
    """Of the CPU; threads that share one count once."""
    amx: bool = False
    """Whether the CPU has matrix instructions."""
    lora: bool = False
    port: int | None = None
    """The port that the server must have."""
    extra_args: tuple[str, ...] = ()
    checkpoint: str | None = None
    """The one that was given, or that is to be returned to."""
    is_there: bool = True
    """Whether that is a folder of this machine, or may be a repository."""
    stored: Quantization | None = None
    """How its weights are stored; ``None`` where that is not known."""
    must_make: bool = False
    source: str | None = None
    """The folder of the plain model."""
    source_bytes: int = 0
    new_bytes: int = 0
    """Of the weights that are wanted, about."""
    group_size: int | None = None
    """That divides the model's layers, or was given."""
    server_bytes: int = 0
    """Memory that the old server has now."""
    weights_bytes: int = 0
    """Of its weights."""
    memory_available: int = 0
    gpu_free: int = 0
    """On the GPU that has least, while the old server runs."""
    gpu_needed: int = 0
    """That vLLM takes of it, whatever the model."""
    disk_free: int = 0


def check(config: QuantizationConfig, facts: Facts) -> tuple[Placement, str]:
    """Where the new server starts, and why.

    Raises:
        QuantizationError: it cannot work; its step is ``check``. Nothing was done.
    """
    for find in (_flags, _platform, _checkpoint, _source, _disk):
        if problem := find(config, facts):
            message, hint = problem
            raise QuantizationError(f"{message}: nothing was changed", step="check", hint=hint)
    return _placement(config, facts)


Problem = tuple[str, str | None]
Check = Callable[[QuantizationConfig, Facts], Problem | None]


def _flags(config: QuantizationConfig, facts: Facts) -> Problem | None:
    for arg in facts.extra_args:
        if arg.partition("=")[0] in _FLAGS:
            return (
                f"the server was started with {arg.partition('=')[0]} among its extra arguments, "
                "which would win over any other",
                "Start it with ServerSpec(quantization=...) in place of that.",
            )
    return None


def _platform(config: QuantizationConfig, facts: Facts) -> Problem | None:
    if facts.platform != "cpu" or not config.enabled:
        return None
    method = METHODS.get(config.method or "")
    stored = facts.stored
    is_w8a8 = config.method == "w8a8" or (stored is not None and stored.activation_bits == 8)
    if is_w8a8 and facts.lora:
        return (
            "weights and activations of 8 bits (w8a8) and LoRA adapters cannot be served together "
            "on a CPU: vLLM fails when it starts",
            "Use awq, which works with adapters, or a server without enable_lora.",
        )
    if method is None:
        return None
    if method.not_on_cpu:
        return (f"{method.name} cannot be served on a CPU: {method.not_on_cpu}", _HERE)
    if method.name == "fp8_per_block" and not facts.amx:
        return ("fp8_per_block needs AMX instructions, which this CPU does not have", _HERE)
    bits = config.bits or (None if stored is None else stored.bits)
    if method.name == "gptq" and bits not in (4, None):
        return (f"gptq of {bits} bits cannot be served on a CPU: vLLM has 4 bits there", _HERE)
    return None


_HERE = "awq (4 bits) and w8a8 (8 bits) work on a CPU."


def _checkpoint(config: QuantizationConfig, facts: Facts) -> Problem | None:
    if facts.checkpoint is None:
        return None
    if not facts.is_there:
        return (
            f"there is no checkpoint {facts.checkpoint}",
            "Give a folder of this machine that has a config.json and the weights, or leave "
            "checkpoint out, to have one made.",
        )
    if facts.stored is None or not config.enabled:
        return None
    if not facts.stored.enabled:
        return (
            f"the checkpoint {facts.checkpoint} is not quantized: its config.json has no "
            "quantization_config",
            "Leave checkpoint out, to have one made of the model.",
        )
    if not is_as_asked(facts.stored, config):
        asked = " ".join(
            [config.method or "", f"of {config.bits} bits" if config.bits else ""]
        ).strip()
        return (
            f"the checkpoint {facts.checkpoint} has {facts.stored}, and {asked} was asked for",
            "Ask for what it is, or leave the method out.",
        )
    return None


def _source(config: QuantizationConfig, facts: Facts) -> Problem | None:
    """What is made, or quantized when it is loaded, is made of a plain model."""
    online = METHODS[config.method].origin == "online" if config.method else False
    needed = facts.must_make or not config.enabled or (online and facts.checkpoint is None)
    if needed and facts.source is None:
        return (
            "the model that this server's weights were made of is not known",
            "Give checkpoint=..., or serve the plain model anew.",
        )
    if facts.must_make and config.method == "awq" and facts.group_size is None:
        return (
            "no usual group of weights (128, 64, 32) divides the layers of this model",
            "Use w8a8, which needs none, or give group_size.",
        )
    return None


def _disk(config: QuantizationConfig, facts: Facts) -> Problem | None:
    needed = _DISK_FACTOR * facts.source_bytes
    if not facts.must_make or not facts.disk_free or facts.disk_free >= needed:
        return None
    return (
        f"making a checkpoint takes about {_gib(needed)} of disk space, and "
        f"{_gib(facts.disk_free)} are free",
        "Free some, or set VLLM_UNIFIED_CACHE to a folder on another disk.",
    )


def _placement(config: QuantizationConfig, facts: Facts) -> tuple[Placement, str]:
    if facts.port is not None:
        if config.in_place is False:
            raise QuantizationError(
                f"the server must have port {facts.port}, so it cannot be replaced by one beside "
                "it: nothing was changed",
                step="check",
                hint="Leave in_place out, or serve without a port of your choice.",
            )
        return "in_place", f"its port {facts.port} was chosen, so it has to stay"
    if config.in_place is not None:
        return ("in_place" if config.in_place else "beside"), "as asked"
    if facts.platform == "cuda":
        needed, free, whose = facts.gpu_needed, facts.gpu_free, "the GPU"
    else:
        needed, free, whose = _memory_needed(facts), facts.memory_available, "memory"
    if free and needed and free < needed:
        return "in_place", f"both need {_gib(needed)} more of {whose} and {_gib(free)} are free"
    if facts.platform == "cuda" and not free:
        return "in_place", "how much of the GPU is free is not known"
    return "beside", "there is room for both"


def _memory_needed(facts: Facts) -> int:
    """By the new server: what the old one has, with other weights."""
    rest = max(0, facts.server_bytes - facts.weights_bytes)
    return int((rest + facts.new_bytes) * _MARGIN)


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
