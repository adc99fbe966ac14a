"""What a container's user is told of it, and of the engine that is to run it."""

from __future__ import annotations

from typing import Literal

import msgspec

ContainerHealth = Literal["ok", "starting", "failing", "stopped"]


class ContainerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A container and its server at one moment."""

    state: str
    """As the engine tells it: ``created``, ``running``, ``paused``, ``exited``, ...; ``absent``."""
    health: ContainerHealth
    """``ok`` is proven by a generated token."""
    id: str | None
    name: str
    image: str
    url: str
    model: str
    restarts: int
    """How often it was started again by itself."""
    exit_code: int | None
    """Of its last end, while it does not run."""
    last_exit: str
    """Why it ended the last time, in words; empty if it never did."""
    started_at: float | None
    """Seconds since the Unix epoch."""
    adopted: bool
    """Whether it was there already, and was found."""


class ContainerCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a container engine can do for a spec."""

    engine: str | None
    """Its name and version; ``None``: none can be used."""
    api_version: str | None
    gpu_runtime: bool | None
    """Whether it knows NVIDIA's GPUs; ``None``: it does not tell."""
    image_present: bool
    port_free: bool
    memory_bytes: int | None
    """Of the engine's machine."""
    disk_free_bytes: int | None
    """Where the engine keeps its images, if that is on this machine."""
    problems: tuple[str, ...]
    """What is in the way of a start, and what to do about it."""

    @property
    def ok(self) -> bool:
        """Whether nothing is in the way."""
        return not self.problems
