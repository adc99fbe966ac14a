"""What this machine has: processors, memory, accelerators."""

from __future__ import annotations

import platform

import msgspec

from vllm_unified.hardware.cgroups import ControlGroups
from vllm_unified.hardware.gpus import Gpu, find_gpus
from vllm_unified.hardware.memory import memory
from vllm_unified.hardware.processors import (
    NumaNode,
    count_cores,
    count_cpus,
    cpu_model,
    numa_nodes,
    usable_cpus,
)


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
    """Accelerators of all makers."""
    cores: int = 0
    """Physical cores among ``cpus``; 0 where that was not looked at."""
    memory_limit: int | None = None
    """Bytes that the control group allows, where that is less than the machine has."""
    numa_nodes: tuple[NumaNode, ...] = ()
    """Empty where the system does not tell."""
    system: str = "Linux"
    """Such as ``Linux`` or ``Darwin``."""
    machine: str = "x86_64"
    """Such as ``x86_64`` or ``arm64``."""

    @property
    def nvidia_gpus(self) -> tuple[Gpu, ...]:
        """Those that the CUDA build of vLLM runs on."""
        return tuple(gpu for gpu in self.gpus if gpu.vendor == "nvidia")


def detect(groups: ControlGroups | None = None) -> Hardware:
    """Look at the machine. What is not there, or cannot be told, is empty or 0: never an error.

    Args:
        groups: The limits that count; ``None``: those of this process.
    """
    groups = groups or ControlGroups()
    allowed = usable_cpus()
    cpus = count_cpus(len(allowed), groups)
    model, flags = cpu_model()
    total, available, limit = memory(groups)
    return Hardware(
        cpus=cpus,
        cores=count_cores(cpus),
        cpu_model=model,
        cpu_flags=flags,
        memory_total=total,
        memory_available=available,
        memory_limit=limit,
        numa_nodes=numa_nodes(allowed),
        gpus=find_gpus(total, available),
        system=platform.system(),
        machine=platform.machine(),
    )
