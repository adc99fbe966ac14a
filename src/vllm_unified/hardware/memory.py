"""The memory that this process may use."""

from __future__ import annotations

import importlib
from pathlib import Path

from vllm_unified.hardware.cgroups import ControlGroups, read_text


def memory(groups: ControlGroups) -> tuple[int, int, int | None]:
    """Total and available bytes, and the control groups' limit if it is below what there is."""
    try:
        found = importlib.import_module("psutil").virtual_memory()
        total, available = int(found.total), int(found.available)
    except Exception:  # noqa: BLE001 - missing, or refused by the system
        total, available = _meminfo()
    limit = groups.memory_limit()
    if limit is None or not total or limit >= total:
        return total, available, None
    return limit, min(available, max(0, limit - groups.memory_used())), limit


def _meminfo() -> tuple[int, int]:
    values = {}
    for line in (read_text(Path("/proc/meminfo")) or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            values[name] = int(words[0]) * 1024
    return values.get("MemTotal", 0), values.get("MemAvailable", 0)
