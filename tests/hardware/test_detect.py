"""What is read out of the system's files, and of the makers' libraries."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.hardware import machines
from vllm_unified.hardware import Gpu, detect
from vllm_unified.hardware.cgroups import ControlGroups, parse_cpu_quota
from vllm_unified.hardware.processors import numa_nodes, parse_cpu_list, parse_cpuinfo

GIB = 2**30
CPUINFO = """\
processor\t: 0
model name\t: AMD EPYC 9B14
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 fsrm

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files of Linux's")


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any of the makers' libraries."""
    for name in ("pynvml", "amdsmi", "torch", "mlx", "mlx.core"):
        monkeypatch.setitem(sys.modules, name, None)


@needs_linux
class TestThisMachine:
    def test_agrees_with_proc(self) -> None:
        found = detect(ControlGroups(root=Path("/nowhere")))
        lines = Path("/proc/meminfo").read_text().splitlines()
        total = int(lines[0].removeprefix("MemTotal:").split()[0]) * 1024
        assert found.memory_total == total
        assert 0 < found.memory_available <= total
        assert found.cpus == len(os.sched_getaffinity(0))
        assert 1 <= found.cores <= found.cpus
        assert (found.system, found.machine) == (platform.system(), platform.machine())

    @pytest.mark.skipif(shutil.which("lscpu") is None, reason="there is no lscpu")
    def test_agrees_with_lscpu(self) -> None:
        said = subprocess.run(["lscpu", "-J"], capture_output=True, text=True, check=True).stdout
        told = {line["field"].rstrip(":"): line["data"] for line in _flat(json.loads(said))}
        found = detect()
        if "Model name" in told:
            assert found.cpu_model == told["Model name"]
        assert found.cpu_flags <= set(told["Flags"].split())
        for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimddp", "sve2"):
            assert (flag in found.cpu_flags) == (flag in told["Flags"].split())
        if "NUMA node(s)" in told:
            assert len(found.numa_nodes) <= int(told["NUMA node(s)"])
            assert {cpu for node in found.numa_nodes for cpu in node.cpus} == (
                os.sched_getaffinity(0)
            )

    def test_one_processor_of_several(self) -> None:
        code = (
            "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "from vllm_unified.hardware import detect\n"
            "found = detect(); print(found.cpus, sum(len(n.cpus) for n in found.numa_nodes))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split() in (["1", "1"], ["1", "0"])


def _flat(tree: dict[str, list[dict[str, object]]]) -> Iterator[dict[str, str]]:
    """The lines of ``lscpu -J``, which newer versions put into sections."""
    waiting: list[dict[str, object]] = list(tree["lscpu"])
    while waiting:
        line = waiting.pop(0)
        children = line.get("children")
        waiting += children if isinstance(children, list) else []
        yield {"field": str(line["field"]), "data": str(line["data"])}


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


class TestControlGroups:
    def test_version_2(self, tmp_path: Path) -> None:
        root, own = tmp_path / "cgroup", tmp_path / "own"
        own.write_text("0::/kubepods/pod1\n")
        write(root / "kubepods", cpu__max="400000 100000", memory__max=f"{8 * GIB}")
        write(
            root / "kubepods" / "pod1",
            cpu__max="max 100000",
            memory__max=f"{2 * GIB}",
            memory__current=f"{GIB}",
            memory__stat=f"anon 1\ninactive_file {GIB // 4}\n",
        )
        groups = ControlGroups(root, own)
        assert groups.cpu_limit() == 4
        assert groups.memory_limit() == 2 * GIB
        assert groups.memory_used() == GIB - GIB // 4

    @pytest.mark.parametrize("path", ["/docker/abc", "/"], ids=["own", "mounted at the root"])
    def test_version_1(self, tmp_path: Path, path: str) -> None:
        root, own = tmp_path / "cgroup", tmp_path / "own"
        own.write_text("3:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
        write(
            root / "memory" / path.lstrip("/"),
            memory__limit_in_bytes=f"{GIB}\n",
            memory__usage_in_bytes=f"{GIB // 2}\n",
            memory__stat="total_inactive_file 512\n",
        )
        write(
            root / "cpu" / path.lstrip("/"),
            cpu__cfs_quota_us="150000\n",
            cpu__cfs_period_us="100000\n",
        )
        groups = ControlGroups(root, own)
        assert (groups.cpu_limit(), groups.memory_limit()) == (2, GIB)
        assert groups.memory_used() == GIB // 2 - 512

    def test_no_limits(self, tmp_path: Path) -> None:
        write(tmp_path, cpu__max="max 100000", memory__max="max")
        write(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
        groups = ControlGroups(tmp_path, tmp_path / "nothing")
        assert (groups.cpu_limit(), groups.memory_limit(), groups.memory_used()) == (None, None, 0)

    @needs_linux
    def test_a_limit_below_the_machines_memory_counts(self, tmp_path: Path) -> None:
        write(
            tmp_path,
            cpu__max="100000 100000",
            memory__max=f"{GIB // 4}",
            memory__current=f"{GIB // 8}",
        )
        found = detect(ControlGroups(tmp_path, tmp_path / "nothing"))
        assert (found.cpus, found.memory_total, found.memory_limit) == (1, GIB // 4, GIB // 4)
        assert found.memory_available == GIB // 8

    @needs_linux
    def test_a_limit_above_it_does_not(self, tmp_path: Path) -> None:
        write(tmp_path, memory__max=f"{2**62}")
        found = detect(ControlGroups(tmp_path, tmp_path / "nothing"))
        assert (found.memory_total < 2**60, found.memory_limit) == (True, None)


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


def test_cpuinfo() -> None:
    flags = frozenset({"avx2", "avx512f", "avx512_bf16"})
    assert parse_cpuinfo(CPUINFO) == ("AMD EPYC 9B14", flags)
    assert parse_cpuinfo("") == ("", frozenset())


def test_numa_nodes(tmp_path: Path) -> None:
    for number, cpus in ((0, "0-3,8"), (1, "4-7"), (10, "")):
        write(
            tmp_path / f"node{number}",
            cpulist=f"{cpus}\n",
            meminfo=f"Node {number} MemTotal:       1048576 kB\n",
        )
    first, second = numa_nodes([0, 1, 4, 8], tmp_path)
    assert (first.id, first.cpus, first.memory_total) == (0, (0, 1, 8), GIB)
    assert second.cpus == (4,)
    assert parse_cpu_list("") == []


@pytest.mark.usefixtures("no_gpus")
class TestAccelerators:
    def test_without_any_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "psutil", None)
        found = detect()
        assert found.gpus == ()
        assert found.cpus >= 1

    def test_nvidia(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", machines.nvidia(8))
        found = detect()
        assert len(found.gpus) == len(found.nvidia_gpus) == 8
        assert found.gpus[0] == Gpu(
            name="NVIDIA H100 80GB HBM3",
            memory_total=85520809984,
            memory_free=84889894912,
            driver="580.65.06",
            compute_capability=(9, 0),
            vendor="nvidia",
            utilization=0.37,
        )
        assert found.gpus[0].platform == "cuda"

    def test_what_a_device_does_not_tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", machines.nvidia(tells_utilization=False))
        assert detect().gpus[0].utilization is None

    def test_amd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "amdsmi", machines.amd())
        found = detect()
        assert found.gpus == (
            Gpu(
                name="AMD Instinct MI300X",
                memory_total=206141652992,
                memory_free=206141652992 - 297578496,
                driver="6.14.14",
                vendor="amd",
                architecture="gfx942",
            ),
        )
        assert (found.nvidia_gpus, found.gpus[0].platform) == ((), "rocm")

    def test_intel(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "torch", machines.intel())
        monkeypatch.setattr("vllm_unified.hardware.gpus._DRM", tmp_path)
        assert detect().gpus == ()  # torch is not even asked where the kernel knows of none
        write(tmp_path / "card0" / "device", vendor="0x8086\n")
        (gpu,) = detect().gpus
        assert (gpu.name, gpu.platform) == ("Intel(R) Arc(TM) Pro B60 Graphics", "xpu")
        assert (gpu.memory_total, gpu.memory_free) == (24385683456, 24000000000)

    @pytest.mark.parametrize("has_mlx", [True, False])
    def test_apple(self, monkeypatch: pytest.MonkeyPatch, has_mlx: bool) -> None:
        monkeypatch.setattr(platform, "system", lambda: "Darwin")
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        monkeypatch.setattr(platform, "mac_ver", lambda: ("15.6", ("", "", ""), "arm64"))
        for module in ("gpus", "processors"):
            monkeypatch.setattr(f"vllm_unified.hardware.{module}.sysctl", machines.apple_sysctl)
        psutil = ModuleType("psutil")
        memory = SimpleNamespace(total=32 * GIB, available=30 * GIB)
        vars(psutil).update(virtual_memory=lambda: memory, cpu_count=lambda logical: 12)
        monkeypatch.setitem(sys.modules, "psutil", psutil)
        if has_mlx:
            monkeypatch.setitem(sys.modules, "mlx", ModuleType("mlx"))
            monkeypatch.setitem(sys.modules, "mlx.core", machines.mlx())
        found = detect(ControlGroups(Path("/nowhere"), Path("/nowhere")))
        (gpu,) = found.gpus
        assert (found.cpu_model, gpu.name) == ("Apple M2 Max", "Apple M2 Max")
        assert found.cpu_flags == {"bf16", "i8mm", "asimddp"}
        assert (gpu.shares_memory, gpu.platform, gpu.driver) == (True, "mps", "15.6")
        limit = 22906503168 if has_mlx else 32 * GIB
        assert (gpu.memory_total, gpu.memory_free) == (limit, min(limit, 30 * GIB))

    def test_a_driver_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = machines.nvidia()

        def fail() -> None:
            raise machines.NvmlError("GPU is lost")

        vars(broken).update(nvmlDeviceGetCount=fail)
        monkeypatch.setitem(sys.modules, "pynvml", broken)
        assert detect().gpus == ()
