"""What this machine has: processors, memory, GPUs."""

from __future__ import annotations

import importlib
import math
import os
import platform
from pathlib import Path
from typing import Any

import msgspec

_RELEVANT_FLAGS = frozenset(
    "avx avx2 avx512f avx512bw avx512vl avx512_bf16 avx512_fp16 avx512_vnni avx_vnni "
    "amx_bf16 amx_fp16 amx_int8 amx_tile asimd asimddp bf16 i8mm sve sve2".split()
)
_CGROUP = Path("/sys/fs/cgroup")


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One NVIDIA GPU."""

    name: str
    memory_total: int
    """Bytes."""
    memory_free: int
    """Bytes, when it was looked at."""
    driver: str
    """The driver's version."""
    compute_capability: tuple[int, int]
    """Such as ``(9, 0)``; ``(0, 0)`` where the driver does not tell."""


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """What this process may use of its machine."""

    cpus: int
    """Processors that this process may use: its affinity, and its control group's quota."""
    cpu_model: str
    cpu_flags: frozenset[str]
    """Instruction sets that matter for inference, in the kernel's names."""
    memory_total: int
    """Bytes, with the control group's limit respected; 0 where it cannot be told."""
    memory_available: int
    """Bytes that can be taken without swapping; 0 where it cannot be told."""
    gpus: tuple[Gpu, ...]


def detect() -> Hardware:
    """Look at the machine. What is not there, or cannot be told, is empty or 0: never an error."""
    model, flags = parse_cpuinfo(_read(Path("/proc/cpuinfo")) or "")
    total, available = _memory()
    return Hardware(
        cpus=_cpus(),
        cpu_model=model or platform.processor() or platform.machine(),
        cpu_flags=flags,
        memory_total=total,
        memory_available=available,
        gpus=_gpus(),
    )


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """The model's name and the relevant flags in a ``/proc/cpuinfo``."""
    model = ""
    flags: frozenset[str] = frozenset()
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and not model:
            model = value
        elif key in {"flags", "Features"} and not flags:
            flags = frozenset(value.split()) & _RELEVANT_FLAGS
    return model, flags


def parse_cpu_quota(cpu_max: str) -> int | None:
    """Whole processors that a cgroup-v2 ``cpu.max`` allows, rounded up; ``None``: no limit."""
    words = cpu_max.split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or words[1] == "0":
        return None
    return max(1, math.ceil(int(words[0]) / int(words[1])))


def _cpus() -> int:
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        allowed = os.cpu_count() or 1
    quotas = [parse_cpu_quota(text) for text in _cgroup_texts("cpu.max")]
    legacy = [_read(_CGROUP / "cpu" / f"cpu.cfs_{part}_us") for part in ("quota", "period")]
    quotas.append(parse_cpu_quota(" ".join(text.strip() for text in legacy if text)))
    return min([allowed, *(quota for quota in quotas if quota)])


def _memory() -> tuple[int, int]:
    """Total and available bytes."""
    try:
        memory = importlib.import_module("psutil").virtual_memory()
        total, available = int(memory.total), int(memory.available)
    except Exception:  # noqa: BLE001 - missing, or refused by the system
        total, available = _meminfo()
    limits = [int(text) for text in _cgroup_texts("memory.max") if text.strip().isdigit()]
    legacy = (_read(_CGROUP / "memory" / "memory.limit_in_bytes") or "").strip()
    limits += [int(legacy)] if legacy.isdigit() else []
    limit = min(limits, default=total)
    if limit < total:
        used = _cgroup_used()
        total, available = limit, min(available, max(0, limit - used))
    return total, available


def _meminfo() -> tuple[int, int]:
    values = {}
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            values[name] = int(words[0]) * 1024
    return values.get("MemTotal", 0), values.get("MemAvailable", 0)


def _cgroup_used() -> int:
    """Bytes that this control group uses and cannot give back."""
    current = next(iter(_cgroup_texts("memory.current")), "0").strip()
    statistics = next(iter(_cgroup_texts("memory.stat")), "")
    cached = dict(line.split() for line in statistics.splitlines() if len(line.split()) == 2)
    return int(current or 0) - int(cached.get("inactive_file", 0))


def _cgroup_texts(name: str) -> list[str]:
    """The texts of ``name`` in this process's cgroup-v2 and those above it, the nearest first."""
    own = "/"
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        if line.startswith("0::"):
            own = line[3:].strip()
    folder = _CGROUP / own.lstrip("/")
    folders = [folder, *(parent for parent in folder.parents if parent.is_relative_to(_CGROUP))]
    return [text for path in folders if (text := _read(path / name)) is not None]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _gpus() -> tuple[Gpu, ...]:
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001 - no package, no driver, no permission: no GPU for us
        return ()
    try:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        return tuple(_gpu(nvml, index, driver) for index in range(nvml.nvmlDeviceGetCount()))
    except Exception:  # noqa: BLE001 - a GPU that fell off the bus is no GPU
        return ()
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int, driver: str) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except nvml.NVMLError:
        major, minor = 0, 0
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_total=int(memory.total),
        memory_free=int(memory.free),
        driver=driver,
        compute_capability=(int(major), int(minor)),
    )


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
