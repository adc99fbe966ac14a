"""Whether a model fits on a machine, and how: the arithmetic. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec

from vllm_unified.hardware.detect import Hardware
from vllm_unified.hardware.gpus import Gpu
from vllm_unified.hardware.plans import GIB, GPU_SHARE, Plan
from vllm_unified.hardware.shape import ModelShape

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "float": 4}
_BITS = {"fp8": 8, "w8a8": 8, "int8": 8, "awq": 4, "gptq": 4, "w4a16": 4}
# A group of 4-bit weights has a scale and a zero point of its own.
_GROUP_OVERHEAD = {4: 0.25, 8: 0.02}

# vLLM's own defaults (config/cache.py, engine/arg_utils.py of 0.32).
_GPU_BLOCK, _CPU_BLOCK = 16, 128
_LARGE_GPU = 70 * GIB
# Estimates: CUDA context and kernels; graphs; NCCL. The real server measures them when it starts.
_GPU_FIXED = 1.5
GPU_SHARED = 0.5
# Measured: three processes of the CPU engine, without weights and KV cache.
_CPU_FIXED = 2.3
_SHORTEST_CONTEXT = 4096
_CPU_CONTEXT = 8192
_FULL_REQUESTS = 4
_FP8_CAPABILITY = (8, 9)


class _Try(msgspec.Struct, kw_only=True):
    """One way to run it, calculated through."""

    parts: int
    quantization: str | None
    bits: float
    budget: int
    share: float | None
    weights: int
    per_device: int
    fixed: int
    kv_token: int
    kv_bytes: int
    kv_tokens: int
    context: int
    steps: list[str]

    @property
    def holds(self) -> bool:
        return self.kv_tokens >= self.context


def make_plan(
    model: str,
    shape: ModelShape,
    hardware: Hardware,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    max_model_len: int | None = None,
    kv_cache_gib: float | None = None,
) -> Plan:
    """The plan for a model of this shape.

    On GPUs: the fewest of them that hold the weights and one request of full length, unquantized
    if that is possible anywhere; else FP8, where the GPUs can; else a shorter context. On a CPU: a
    KV cache for a few requests of full length.

    Args:
        dtype: Of weights and activations; ``None``: 16 bits, whatever the checkpoint has.
        quantization: Only this one.
        max_model_len: Only this context; ``None``: the model's own, or what fits.
        kv_cache_gib: GiB of KV cache, on a CPU.
    """
    gpus = [gpu for gpu in hardware.gpus if gpu.vendor != "apple"]
    chosen = dtype or ("float16" if shape.dtype == "float16" else "bfloat16")
    if gpus:
        tries = list(_gpu_tries(shape, gpus, chosen, quantization, max_model_len))
    else:
        tries = [_cpu_try(shape, hardware, chosen, quantization, max_model_len, kv_cache_gib)]
    if hardware.system != "Linux":
        reason = f"vLLM does not run on {hardware.system}; the transformers backend may"
        return _plan(model, shape, chosen, tries[0], "cpu", 0, hardware, reason=reason)
    best = next((each for each in tries if each.holds), None)
    if best is None and max_model_len is None:
        best = _shortened(tries)
    device, count = (gpus[0].platform, len(gpus)) if gpus else ("cpu", 1)
    if best is None:
        closest = max(tries, key=lambda each: each.kv_bytes)
        reason = _missing(closest, gpus)
        return _plan(model, shape, chosen, closest, device, count, hardware, reason=reason)
    return _plan(model, shape, chosen, best, device, count, hardware)


def _gpu_tries(
    shape: ModelShape,
    gpus: list[Gpu],
    dtype: str,
    quantization: str | None,
    max_model_len: int | None,
) -> Iterator[_Try]:
    """From the best to the last: unquantized on few, on more; then quantized."""
    smallest = min(gpus, key=lambda gpu: gpu.memory_total)
    counts = [count for count in (1, 2, 4, 8, 16) if count <= len(gpus)]
    counts = [count for count in counts if shape.heads % count == 0]
    methods: list[str | None] = [quantization]
    has_fp8 = all(gpu.compute_capability >= _FP8_CAPABILITY for gpu in gpus)
    if quantization is None and shape.quantization is None and has_fp8:
        methods.append("fp8")
    for method in methods:
        for count in counts:
            yield _gpu_try(shape, smallest, count, dtype, method, max_model_len)


def _gpu_try(
    shape: ModelShape,
    gpu: Gpu,
    parts: int,
    dtype: str,
    quantization: str | None,
    max_model_len: int | None,
) -> _Try:
    share = GPU_SHARE
    if gpu.memory_free < share * gpu.memory_total:
        share = math.floor(100 * gpu.memory_free / gpu.memory_total) / 100
    budget = int(share * gpu.memory_total)
    steps = [
        f"memory of a GPU: {_gib(gpu.memory_total)} x {share} = {_gib(budget)}, "
        f"of {parts} GPU{'s' if parts > 1 else ''} that share each layer"
    ]
    weights, per_device, bits = _weights(shape, parts, dtype, quantization, steps)
    large = gpu.memory_total >= _LARGE_GPU and "A100" not in gpu.name
    tokens, sequences = (8192, 1024) if large else (2048, 256)
    width = 4 * shape.hidden + 3 * shape.widest // parts
    active = 2 * tokens * width
    logits = 2 * 4 * sequences * shape.vocabulary
    fixed = int(_GPU_FIXED * GIB) + (int(GPU_SHARED * GIB) if parts > 1 else 0) + active + logits
    steps.append(
        f"besides (estimated): {_GPU_FIXED + (GPU_SHARED if parts > 1 else 0):g} GiB for CUDA"
        f" + {tokens} tokens x {width} x 2 bytes for activations"
        f" + {sequences} x {shape.vocabulary:,} x 8 bytes for logits = {_gib(fixed)}"
    )
    return _with_cache(
        shape,
        parts=parts,
        quantization=quantization,
        bits=bits,
        budget=budget,
        share=share,
        weights=weights,
        per_device=per_device,
        fixed=fixed,
        kv_bytes=max(0, budget - per_device - fixed),
        value_bytes=_BYTES.get(dtype, 2),
        block=_GPU_BLOCK,
        context=max_model_len or shape.context,
        steps=steps,
    )


def _cpu_try(
    shape: ModelShape,
    hardware: Hardware,
    dtype: str,
    quantization: str | None,
    max_model_len: int | None,
    kv_cache_gib: float | None,
) -> _Try:
    parts, budget = 1, hardware.memory_available
    steps = [f"memory that is free: {_gib(budget)}"]
    if len(hardware.numa_nodes) > 1:
        node = min(node.memory_total for node in hardware.numa_nodes)
        if 0 < node < budget:
            budget = node
            steps.append(f"memory of one of {len(hardware.numa_nodes)} NUMA nodes: {_gib(node)}")
    weights, per_device, bits = _weights(shape, parts, dtype, quantization, steps)
    fixed = int(_CPU_FIXED * GIB)
    steps.append(f"besides (measured): {_CPU_FIXED} GiB for vLLM's processes")
    room = max(0, budget - weights - fixed)
    value_bytes = _BYTES.get(dtype, 2)
    context = max_model_len or min(shape.context, _CPU_CONTEXT)
    wanted = _FULL_REQUESTS * context * shape.kv_values(parts) * value_bytes
    if kv_cache_gib is not None:
        kv_bytes = min(int(kv_cache_gib * GIB), room)
    else:
        # Whole GiB, and no more than half of what is left: the machine has other work.
        kv_bytes = min(max(1, math.ceil(wanted / GIB)), max(1, room // 2 // GIB)) * GIB
        kv_bytes = min(kv_bytes, room)
        steps.append(
            f"KV cache: for {_FULL_REQUESTS} requests of {context} tokens, in whole GiB, and at"
            f" most half of the {_gib(room)} that are left: {_gib(kv_bytes)}"
        )
    return _with_cache(
        shape,
        parts=parts,
        quantization=quantization,
        bits=bits,
        budget=budget,
        share=None,
        weights=weights,
        per_device=per_device,
        fixed=fixed,
        kv_bytes=kv_bytes,
        value_bytes=value_bytes,
        block=_CPU_BLOCK,
        context=context,
        steps=steps,
    )


def _weights(
    shape: ModelShape, parts: int, dtype: str, quantization: str | None, steps: list[str]
) -> tuple[int, int, float]:
    """Bytes of all weights, and of one device; bits of a weight in a matrix."""
    plain = _BYTES.get(dtype, 2)
    bits = float(8 * plain)
    if shape.bits is not None and shape.quantization is not None:
        bits = shape.bits
    if quantization is not None:
        bits = _BITS.get(quantization, bits)
    bits += _GROUP_OVERHEAD.get(int(bits), 0.0)
    matrices = int(shape.matrices * bits / 8)
    others = shape.embeddings * plain
    rest = shape.rest * plain
    total = matrices + others + rest
    if bits == 8 * plain:
        steps.append(f"weights: {shape.parameters:,} x {plain} bytes = {_gib(total)}")
    else:
        steps.append(
            f"weights: {shape.matrices:,} x {bits:g} bits"
            f" + {shape.embeddings + shape.rest:,} x {plain} bytes = {_gib(total)}"
        )
    per_device = (matrices + others) // parts + rest
    if parts > 1:
        steps.append(f"weights on each of {parts}: {_gib(per_device)}")
    return total, per_device, bits


def _with_cache(
    shape: ModelShape, *, value_bytes: int, block: int, steps: list[str], **known: Any
) -> _Try:
    parts, kv_bytes, context = known["parts"], known["kv_bytes"], known["context"]
    token = shape.kv_values(parts) * value_bytes
    if shape.latent:
        words = f"{shape.layers} layers x {shape.latent}"
    else:
        heads = max(1, shape.kv_heads // parts)
        words = f"2 x {shape.layers} layers x {heads} heads x {shape.head_size}"
    steps.append(f"KV cache of a token: {words} x {value_bytes} bytes = {token:,} bytes")
    tokens = kv_bytes // (token * block) * block
    if known["share"] is not None:
        steps.append(
            f"KV cache: {_gib(known['budget'])} - {_gib(known['per_device'])}"
            f" - {_gib(known['fixed'])} = {_gib(kv_bytes)}"
        )
    steps.append(
        f"KV cache in tokens: {_gib(kv_bytes)} / {token:,} bytes, in blocks of {block} ="
        f" {tokens:,}, or {tokens / context:.1f} requests of {context:,} tokens"
    )
    return _Try(kv_token=token, kv_tokens=tokens, steps=steps, **known)


def _shortened(tries: list[_Try]) -> _Try | None:
    """The way that holds the longest context, where none holds the model's own."""
    longest = max(tries, key=lambda each: each.kv_tokens)
    if longest.kv_tokens < min(_SHORTEST_CONTEXT, longest.context):
        return None
    longest.steps.append(
        f"context: {longest.context:,} tokens do not fit; {longest.kv_tokens:,} do"
    )
    longest.context = longest.kv_tokens
    return longest


def _missing(closest: _Try, gpus: list[Gpu]) -> str:
    needed = (
        closest.per_device
        + closest.fixed
        + closest.kv_token * min(closest.context, _SHORTEST_CONTEXT)
    )
    if not gpus:
        return f"it does not fit: it needs {_gib(needed)}, and {_gib(closest.budget)} are free"
    total = closest.weights + closest.fixed
    usable = closest.budget - closest.fixed
    enough = math.ceil(total / usable) if usable > 0 else 0
    more = f"; about {enough} such GPUs hold it" if enough > closest.parts else ""
    even = f" even with {closest.quantization}" if closest.quantization else ""
    has = f"and has {_gib(closest.budget)}{more}"
    return f"it does not fit: each GPU needs {_gib(needed)}{even}, {has}"


def _plan(
    model: str,
    shape: ModelShape,
    dtype: str,
    chosen: _Try,
    device: str,
    count: int,
    hardware: Hardware,
    *,
    reason: str | None = None,
) -> Plan:
    fits = reason is None
    replicas = count // chosen.parts if device != "cpu" and fits else int(fits)
    if reason is None:
        where = f"{chosen.parts} of {count} GPUs" if device != "cpu" else "the CPU"
        kept = f"with {chosen.quantization}" if chosen.quantization else f"in {dtype}"
        reason = f"it fits on {where} {kept}, {chosen.kv_tokens:,} tokens of KV cache"
    return Plan(
        model=model,
        fits=fits,
        reason=reason,
        device=device,
        dtype=dtype,
        quantization=chosen.quantization,
        max_model_len=chosen.context,
        tensor_parallel_size=chosen.parts,
        gpu_memory_utilization=chosen.share,
        kv_cache_gib=chosen.kv_bytes / GIB if device == "cpu" else None,
        parameters=shape.parameters,
        weights_bytes=chosen.weights,
        weights_bytes_per_device=chosen.per_device,
        kv_bytes_per_token=chosen.kv_token,
        kv_cache_bytes=chosen.kv_bytes,
        kv_cache_tokens=chosen.kv_tokens,
        replicas=replicas,
        steps=(*shape.steps, *chosen.steps),
        notes=tuple(_notes(shape, chosen, device, replicas, hardware)),
    )


def _notes(
    shape: ModelShape, chosen: _Try, device: str, replicas: int, hardware: Hardware
) -> Iterator[str]:
    if replicas > 1:
        yield f"there is room for {replicas} such servers, each on GPUs of its own"
    if chosen.quantization == "fp8":
        yield "vLLM makes FP8 of the weights when it loads them; the checkpoint stays as it is"
    if chosen.quantization in ("awq", "gptq"):
        yield f"it needs a checkpoint in {chosen.quantization}; `vllm-unified quantize` makes AWQ"
    nodes = len(hardware.numa_nodes)
    if device == "cpu" and nodes > 1:
        yield (
            f"one server uses one of {nodes} NUMA nodes; --tensor-parallel-size {nodes} uses all "
            "of them, if the model's heads can be shared so"
        )
    if device == "cpu" and not {"avx512f", "asimd"} & hardware.cpu_flags:
        yield "the CPU has neither AVX-512 nor Arm's SIMD: vLLM will be slow, if it starts"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
