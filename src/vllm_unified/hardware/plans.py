"""How a model runs on a machine: the figures, and the flags that follow. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from vllm_unified.servers import ServerSpec

GIB = 2**30
GPU_SHARE = 0.92
"""vLLM's default for ``--gpu-memory-utilization`` (config/cache.py of 0.32)."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How a model runs on a machine, or why it does not."""

    model: str
    fits: bool
    reason: str
    """In one sentence."""
    device: str
    """``cuda``, ``rocm``, ``xpu`` or ``cpu``."""
    dtype: str
    quantization: str | None
    """What vLLM has to be told; ``None`` for a checkpoint as it is."""
    max_model_len: int
    """Tokens of prompt and answer."""
    tensor_parallel_size: int
    gpu_memory_utilization: float | None
    kv_cache_gib: float | None
    """On a CPU."""
    parameters: int
    weights_bytes: int
    """Of all devices together."""
    weights_bytes_per_device: int
    kv_bytes_per_token: int
    """On one device."""
    kv_cache_bytes: int
    """On one device."""
    kv_cache_tokens: int
    """That fit in the KV cache."""
    replicas: int
    """How many such servers the machine has devices for."""
    steps: tuple[str, ...]
    """The arithmetic, line by line."""
    notes: tuple[str, ...] = ()
    """What is worth knowing besides."""

    @property
    def concurrency(self) -> float:
        """Requests of full length that fit at once."""
        return self.kv_cache_tokens / self.max_model_len if self.max_model_len else 0.0

    @property
    def command(self) -> str:
        """What serves it so."""
        flags = [f"--dtype {self.dtype}", f"--max-model-len {self.max_model_len}"]
        if self.quantization:
            flags.append(f"--quantization {self.quantization}")
        if self.tensor_parallel_size > 1:
            flags.append(f"--tensor-parallel-size {self.tensor_parallel_size}")
        passed = []
        if self.gpu_memory_utilization not in (None, GPU_SHARE):
            passed.append(f"--gpu-memory-utilization {self.gpu_memory_utilization}")
        if self.kv_cache_gib is not None:
            passed.append(f"--kv-cache-memory-bytes {int(self.kv_cache_gib * GIB)}")
        rest = f" -- {' '.join(passed)}" if passed else ""
        return f"vllm-unified serve {self.model} {' '.join(flags)}{rest}"

    def spec(self, **more: Any) -> ServerSpec:
        """The server; ``more`` are further fields of it, which win."""
        from vllm_unified.servers import ServerSpec

        fields: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "max_model_len": self.max_model_len,
            "kv_cache_gib": self.kv_cache_gib,
        }
        if self.tensor_parallel_size > 1:
            fields["tensor_parallel_size"] = self.tensor_parallel_size
        if self.gpu_memory_utilization not in (None, GPU_SHARE):
            fields["gpu_memory_utilization"] = self.gpu_memory_utilization
        return ServerSpec(**{**fields, **more})

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.reason}", *(f"  {step}" for step in self.steps)]
        lines += [f"  note: {note}" for note in self.notes]
        if self.fits:
            lines.append(f"  {self.command}")
        return "\n".join(lines)
