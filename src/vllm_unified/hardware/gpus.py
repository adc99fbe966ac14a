"""Accelerators, each asked by its maker's own library; none is an error."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from vllm_unified.hardware.cgroups import read_text
from vllm_unified.hardware.processors import sysctl

T = TypeVar("T")

Vendor = Literal["nvidia", "amd", "intel", "apple"]
Platform = Literal["cuda", "rocm", "xpu", "mps"]
_DRM = Path("/sys/class/drm")
_INTEL = "0x8086"


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One accelerator."""

    name: str
    memory_total: int
    """Bytes; 0 where it cannot be told."""
    memory_free: int
    """Bytes, when it was looked at; 0 where it cannot be told."""
    driver: str
    """The driver's version; ``""`` where it cannot be told."""
    compute_capability: tuple[int, int] = (0, 0)
    """Of NVIDIA's, such as ``(9, 0)``; ``(0, 0)`` where the driver does not tell."""
    vendor: Vendor = "nvidia"
    architecture: str = ""
    """The maker's name of the instruction set, such as ``gfx942``; ``""`` where it is not told."""
    utilization: float | None = None
    """Share of the time in which it worked just now, 0 to 1."""
    shares_memory: bool = False
    """Whether its memory is the machine's own."""

    @property
    def platform(self) -> Platform:
        """What frameworks call it."""
        platforms: dict[Vendor, Platform] = {
            "nvidia": "cuda",
            "amd": "rocm",
            "intel": "xpu",
            "apple": "mps",
        }
        return platforms[self.vendor]


def find_gpus(memory_total: int, memory_available: int) -> tuple[Gpu, ...]:
    """All that are found. The memory is the machine's, in bytes, for those that share it."""
    found: list[Gpu] = []
    for look in (_nvidia, _amd, _intel):
        # No package, no driver, no permission, or one that fell off the bus: no GPU for us.
        with suppress(Exception):
            found += look()
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        found.append(_apple(memory_total, memory_available))
    return tuple(found)


def _nvidia() -> list[Gpu]:
    nvml: Any = importlib.import_module("pynvml")
    nvml.nvmlInit()
    try:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        return [_nvidia_gpu(nvml, index, driver) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _nvidia_gpu(nvml: Any, index: int, driver: str) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    capability = _if_told(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle), (0, 0))
    busy = _if_told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu, None)
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_total=int(memory.total),
        memory_free=int(memory.free),
        driver=driver,
        compute_capability=(int(capability[0]), int(capability[1])),
        utilization=None if busy is None else int(busy) / 100,
    )


def _amd() -> list[Gpu]:
    smi: Any = importlib.import_module("amdsmi")
    smi.amdsmi_init()
    try:
        return [_amd_gpu(smi, handle) for handle in smi.amdsmi_get_processor_handles()]
    finally:
        smi.amdsmi_shut_down()


def _amd_gpu(smi: Any, handle: Any) -> Gpu:
    asic = smi.amdsmi_get_gpu_asic_info(handle)
    vram = smi.AmdSmiMemoryType.VRAM
    total = int(smi.amdsmi_get_gpu_memory_total(handle, vram))
    used = int(_if_told(lambda: smi.amdsmi_get_gpu_memory_usage(handle, vram), total))
    driver = _if_told(lambda: smi.amdsmi_get_gpu_driver_info(handle)["driver_version"], "")
    busy = _if_told(lambda: smi.amdsmi_get_gpu_activity(handle)["gfx_activity"], None)
    return Gpu(
        name=str(asic["market_name"]),
        memory_total=total,
        memory_free=max(0, total - used),
        driver=str(driver),
        vendor="amd",
        architecture=str(asic.get("target_graphics_version", "")),
        utilization=busy / 100 if isinstance(busy, int) else None,
    )


def _intel() -> list[Gpu]:
    # torch is the only well-kept way to ask; importing it takes seconds, so not without a reason.
    if _INTEL not in _display_vendors():
        return []
    xpu: Any = importlib.import_module("torch").xpu
    if not xpu.is_available():
        return []
    return [_intel_gpu(xpu, index) for index in range(xpu.device_count())]


def _display_vendors() -> Iterator[str]:
    for path in sorted(_DRM.glob("card*/device/vendor")):
        yield (read_text(path) or "").strip()


def _intel_gpu(xpu: Any, index: int) -> Gpu:
    properties = xpu.get_device_properties(index)
    free = _if_told(lambda: xpu.mem_get_info(index)[0], 0)
    return Gpu(
        name=str(properties.name),
        memory_total=int(properties.total_memory),
        memory_free=int(free),
        driver=str(getattr(properties, "driver_version", "")),
        vendor="intel",
    )


def _apple(memory_total: int, memory_available: int) -> Gpu:
    """Its memory is the machine's; how much of it Metal lets a program have, MLX tells."""
    limit = memory_total
    architecture = ""
    with suppress(Exception):
        core: Any = importlib.import_module("mlx.core")
        look = getattr(core, "device_info", None) or core.metal.device_info
        told = look()
        limit = int(told.get("max_recommended_working_set_size", limit))
        architecture = str(told.get("architecture", ""))
    return Gpu(
        name=sysctl("machdep.cpu.brand_string") or "Apple GPU",
        memory_total=min(limit, memory_total) if memory_total else limit,
        memory_free=min(limit, memory_available),
        driver=platform.mac_ver()[0],
        vendor="apple",
        architecture=architecture,
        shares_memory=True,
    )


def _if_told(ask: Callable[[], T], otherwise: T) -> T:
    """The answer; a device or a driver need not know each of them."""
    try:
        return ask()
    except Exception:  # noqa: BLE001 - each library has errors of its own
        return otherwise


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
