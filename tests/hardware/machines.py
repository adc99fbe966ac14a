"""What the makers' libraries answer on machines that the tests do not run on.

The shapes are those of nvidia-ml-py 12, amdsmi 7.0, torch.xpu and mlx 0.26, from their documents
and sources; the values are like those of an H100, an MI300X, an Arc Pro B60 and an M2 Max.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

GIB = 2**30


class NvmlError(Exception):
    """As ``pynvml.NVMLError``."""


def nvidia(count: int = 1, *, tells_utilization: bool = True) -> ModuleType:
    """``pynvml``."""

    def utilization(handle: int) -> SimpleNamespace:
        if not tells_utilization:
            raise NvmlError("Not Supported")
        return SimpleNamespace(gpu=37, memory=12)

    return _module(
        "pynvml",
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"580.65.06",
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(
            total=85520809984, free=84889894912, used=630915072
        ),
        nvmlDeviceGetCudaComputeCapability=lambda handle: [9, 0],
        nvmlDeviceGetName=lambda handle: "NVIDIA H100 80GB HBM3",
        nvmlDeviceGetUtilizationRates=utilization,
    )


def amd() -> ModuleType:
    """``amdsmi``."""
    return _module(
        "amdsmi",
        AmdSmiMemoryType=SimpleNamespace(VRAM=0),
        amdsmi_init=lambda: None,
        amdsmi_shut_down=lambda: None,
        amdsmi_get_processor_handles=lambda: ["handle"],
        amdsmi_get_gpu_asic_info=lambda handle: {
            "market_name": "AMD Instinct MI300X",
            "vendor_id": "0x1002",
            "num_compute_units": 304,
            "target_graphics_version": "gfx942",
        },
        amdsmi_get_gpu_memory_total=lambda handle, kind: 206141652992,
        amdsmi_get_gpu_memory_usage=lambda handle, kind: 297578496,
        amdsmi_get_gpu_driver_info=lambda handle: {
            "driver_name": "amdgpu",
            "driver_version": "6.14.14",
        },
        amdsmi_get_gpu_activity=lambda handle: {"gfx_activity": "N/A", "umc_activity": 0},
    )


def intel() -> ModuleType:
    """``torch``, as far as ``torch.xpu`` is concerned."""
    properties = SimpleNamespace(
        name="Intel(R) Arc(TM) Pro B60 Graphics",
        total_memory=24385683456,
        driver_version="1.6.33578",
    )
    xpu = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda index: properties,
        mem_get_info=lambda index: (24000000000, 24385683456),
    )
    return _module("torch", xpu=xpu)


def mlx() -> ModuleType:
    """``mlx.core``."""
    return _module(
        "mlx.core",
        device_info=lambda: {
            "architecture": "applegpu_g14s",
            "max_buffer_length": 22906503168,
            "max_recommended_working_set_size": 22906503168,
            "memory_size": 34359738368,
        },
    )


def apple_sysctl(name: str) -> str:
    """``sysctl -n``."""
    values = {
        "machdep.cpu.brand_string": "Apple M2 Max",
        "hw.optional.arm.FEAT_BF16": "1",
        "hw.optional.arm.FEAT_I8MM": "1",
        "hw.optional.arm.FEAT_DotProd": "1",
    }
    return values.get(name, "")


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module
