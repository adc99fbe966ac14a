"""What pip says, made short."""

from __future__ import annotations

import re
from collections.abc import Sequence

_COLLECTING = re.compile(r"^Collecting ([^\s<>=!~;\[(]+)")
_DOWNLOADING = re.compile(r"^\s*Downloading (\S+) \(([^)]+)\)")
_BUILDING = re.compile(r"^\s*Building wheel for (\S+)")
_NOISE = ("WARNING: Location", "[notice]", "WARNING: Running pip as")
_ERRORS_SHOWN = 6

_HINTS = (
    ("No space left on device", "Free some disk space, or set VLLM_UNIFIED_CACHE to another disk."),
    ("requires a different Python", "Use another Python, such as 3.12, to run this."),
    ("Temporary failure in name resolution", "Check the network, and pip's index and proxy."),
    ("Connection refused", "Check the network, and pip's index and proxy."),
    ("Could not fetch URL", "Check the network, and pip's index and proxy."),
    ("Connection to", "Check the network, and pip's index and proxy."),
    (
        "No matching distribution found",
        "Check pip's index, the network, and that Python's version"
        " and this machine's processor are supported.",
    ),
    ("MemoryError", "Not enough memory for the install."),
)


def progress_of(line: str) -> str | None:
    """A short message for a line of pip's, or ``None`` where it is nothing new for people."""
    if match := _COLLECTING.match(line):
        return f"collecting {match[1]}"
    if match := _DOWNLOADING.match(line):
        name = match[1].rsplit("/", 1)[-1].split("-", 1)[0]
        return f"downloading {name} ({match[2]})"
    if match := _BUILDING.match(line):
        return f"building {match[1]}"
    if line.startswith("Installing collected packages:"):
        return f"installing {line.count(',') + 1} packages"
    return None


def failure_of(lines: Sequence[str]) -> str:
    """The lines of pip's output that say what went wrong, at most six."""
    said = [line.strip() for line in lines if line.strip() and not line.startswith(_NOISE)]
    errors = [line for line in said if line.startswith(("ERROR", "error:", "OSError"))]
    return "\n".join((errors or said)[-_ERRORS_SHOWN:]) or "pip said nothing"


def hint_of(lines: Sequence[str]) -> str | None:
    """What to do about a failure, where its cause is a known one."""
    text = "\n".join(lines)
    return next((hint for mark, hint in _HINTS if mark in text), None)
