"""The processors that this process may use."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from pathlib import Path

import msgspec

from vllm_unified.hardware.cgroups import ControlGroups, read_text

_RELEVANT_FLAGS = frozenset(
    "avx avx2 avx512f avx512bw avx512vl avx512_bf16 avx512_fp16 avx512_vnni avx_vnni "
    "amx_bf16 amx_fp16 amx_int8 amx_tile asimd asimddp bf16 i8mm sve sve2".split()
)
_NODES = Path("/sys/devices/system/node")
# Apple's names for what Linux calls so on Arm.
_APPLE_FLAGS = {"FEAT_BF16": "bf16", "FEAT_I8MM": "i8mm", "FEAT_DotProd": "asimddp"}
_SYSCTL_SECONDS = 5.0


class NumaNode(msgspec.Struct, frozen=True, kw_only=True):
    """Processors that share memory which is nearer to them than other memory."""

    id: int
    cpus: tuple[int, ...]
    """Numbers of its processors that this process may use."""
    memory_total: int
    """Bytes; 0 where it is not told."""


def usable_cpus() -> list[int]:
    """Numbers of the processors that this process is allowed to run on."""
    try:
        return sorted(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return list(range(os.cpu_count() or 1))


def count_cpus(allowed: int, groups: ControlGroups) -> int:
    """How many of these processors the control groups let it keep busy."""
    return min(allowed, groups.cpu_limit() or allowed)


def count_cores(cpus: int) -> int:
    """Physical cores among so many processors, as far as that is known."""
    try:
        physical = importlib.import_module("psutil").cpu_count(logical=False)
    except Exception:  # noqa: BLE001 - missing, or refused by the system
        physical = None
    return min(cpus, physical or cpus)


def cpu_model() -> tuple[str, frozenset[str]]:
    """The model's name, and the instruction sets that matter for inference."""
    if platform.system() == "Darwin":
        name = sysctl("machdep.cpu.brand_string")
        flags = {
            flag
            for feature, flag in _APPLE_FLAGS.items()
            if sysctl(f"hw.optional.arm.{feature}") == "1"
        }
        return name or platform.machine(), frozenset(flags)
    name, found = parse_cpuinfo(read_text(Path("/proc/cpuinfo")) or "")
    return name or platform.processor() or platform.machine(), found


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


def numa_nodes(allowed: list[int], folder: Path = _NODES) -> tuple[NumaNode, ...]:
    """The nodes that have processors among these; none where the system does not tell."""
    found = []
    for path in folder.glob("node[0-9]*"):
        cpus = parse_cpu_list(read_text(path / "cpulist") or "")
        mine = tuple(cpu for cpu in cpus if cpu in allowed)
        if mine:
            memory = _node_memory(read_text(path / "meminfo") or "")
            found.append(NumaNode(id=int(path.name[4:]), cpus=mine, memory_total=memory))
    return tuple(sorted(found, key=lambda node: node.id))


def parse_cpu_list(text: str) -> list[int]:
    """The numbers in the kernel's form of a list, such as ``0-3,8``."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _node_memory(meminfo: str) -> int:
    for line in meminfo.splitlines():
        words = line.split()
        if "MemTotal:" in words and words[-2].isdigit():
            return int(words[-2]) * 1024
    return 0


def sysctl(name: str) -> str:
    """A value of macOS's; ``""`` where there is none."""
    try:
        done = subprocess.run(
            ["sysctl", "-n", name],
            capture_output=True,
            text=True,
            timeout=_SYSCTL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
