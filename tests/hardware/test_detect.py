"""What is read out of the system's files."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from vllm_unified.hardware.detect import Gpu, detect, parse_cpu_quota, parse_cpuinfo

CPUINFO = """\
processor\t: 0
model name\t: AMD EPYC 9B14
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 fsrm

processor\t: 1
model name\t: another
flags\t\t: fpu
"""


def test_this_machine_has_something() -> None:
    found = detect()
    assert found.cpus >= 1
    assert found.memory_total >= found.memory_available > 0


def test_cpuinfo() -> None:
    flags = frozenset({"avx2", "avx512f", "avx512_bf16"})
    assert parse_cpuinfo(CPUINFO) == ("AMD EPYC 9B14", flags)
    assert parse_cpuinfo("") == ("", frozenset())


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("max 100000", None),
        ("150000 100000", 2),
        ("5000 100000", 1),
        ("", None),
        ("-1 100000", None),
    ],
)
def test_cpu_quota(text: str, cpus: int | None) -> None:
    assert parse_cpu_quota(text) == cpus


def test_without_the_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = detect()
    assert found.gpus == ()
    assert found.memory_total > 0


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = ModuleType("pynvml")
    vars(nvml).update(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"580.1",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80, free=70),
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetName=lambda handle: "H100",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert detect().gpus == (
        Gpu(
            name="H100", memory_total=80, memory_free=70, driver="580.1", compute_capability=(9, 0)
        ),
    )
