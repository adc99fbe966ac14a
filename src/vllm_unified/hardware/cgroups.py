"""What a container may use: the limits of this process's control groups, both versions."""

from __future__ import annotations

import math
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


class ControlGroups:
    """The groups that this process is in, and all above them: the tightest limit counts.

    In a container the paths of ``/proc/self/cgroup`` may be the host's, and then lead nowhere; the
    container's own group is mounted at the root.
    """

    def __init__(self, root: Path = _ROOT, own: Path = _OWN) -> None:
        self._root = root
        self._paths = _own_paths(read_text(own) or "")

    def cpu_limit(self) -> int | None:
        """Whole processors, rounded up; ``None``: no limit."""
        quotas = [parse_cpu_quota(text) for text in self._texts("", "cpu.max")]
        for folder in self._folders("cpu"):
            parts = [read_text(folder / f"cpu.cfs_{part}_us") or "" for part in ("quota", "period")]
            quotas.append(parse_cpu_quota(" ".join(part.strip() for part in parts)))
        return min((quota for quota in quotas if quota), default=None)

    def memory_limit(self) -> int | None:
        """Bytes; ``None``: no limit."""
        texts = self._texts("", "memory.max") + self._texts("memory", "memory.limit_in_bytes")
        return min((int(text) for text in texts if text.strip().isdigit()), default=None)

    def memory_used(self) -> int:
        """Bytes that this process's group uses and cannot give back."""
        for version, current, cached in (
            ("", "memory.current", "inactive_file"),
            ("memory", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            used = next(iter(self._texts(version, current)), "").strip()
            if used.isdigit():
                lines = next(iter(self._texts(version, "memory.stat")), "").splitlines()
                figures = dict(line.split() for line in lines if len(line.split()) == 2)
                return max(0, int(used) - int(figures.get(cached, 0)))
        return 0

    def _texts(self, controller: str, name: str) -> list[str]:
        """The texts of a file in the group and those above it, the nearest first."""
        return [
            text
            for folder in self._folders(controller)
            if (text := read_text(folder / name)) is not None
        ]

    def _folders(self, controller: str) -> list[Path]:
        top = self._root / controller if controller else self._root
        folder = top / self._paths.get(controller, "/").lstrip("/")
        return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]


def parse_cpu_quota(cpu_max: str) -> int | None:
    """Whole processors that a cgroup-v2 ``cpu.max`` allows, rounded up; ``None``: no limit."""
    words = cpu_max.split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or words[1] == "0":
        return None
    return max(1, math.ceil(int(words[0]) / int(words[1])))


def read_text(path: Path) -> str | None:
    """The text of a file of the system's; ``None`` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _own_paths(text: str) -> dict[str, str]:
    """The process's path by controller; that of version 2 by ``""``."""
    paths = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            paths[controller] = path.strip()
    return paths
