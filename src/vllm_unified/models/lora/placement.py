"""Where adapters go, and which of them give way. Decisions only; times are monotonic seconds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import msgspec

Replicas = int | Literal["all"]
"""How many servers have an adapter."""

PATIENCE_SECONDS = 30.0
"""How long a server may be gone until its replica goes elsewhere."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A server that an adapter may be on."""

    url: str
    version: Literal["same", "other"] | None = None
    """Whether it has an adapter of this name, from the same path or from another."""
    adapters: int = 0
    """How many it has, this one not counted."""
    requests: int = 0
    """How many are there now."""
    slots: int | None = None
    """How many adapters it computes with at once, where that is known."""
    down_for: float = 0.0
    """Seconds that it has been gone; 0 for one that answers."""
    meant: bool = False
    """Whether the adapter is meant to be there."""

    @property
    def is_full(self) -> bool:
        """Whether one more adapter would be one too many to be used all at once."""
        return self.slots is not None and self.adapters >= self.slots


def by_preference(places: Sequence[Place]) -> list[Place]:
    """Who has it first; then who has room; then by fewest adapters, and fewest requests."""

    def rank(place: Place) -> tuple[int, bool, bool, int, int]:
        has = ("same", "other", None).index(place.version)
        return has, place.down_for > 0, place.is_full, place.adapters, place.requests

    return sorted(places, key=rank)


def to_repair(places: Sequence[Place], wanted: Replicas) -> list[list[Place]]:
    """Where to load an adapter now, so that as many servers as wanted have it, or will.

    One that is gone keeps its replica for :data:`PATIENCE_SECONDS`.

    Returns:
        For each replica that is missing, the places to try, in this order.
    """
    here = [place for place in places if not place.down_for]
    if wanted == "all":
        return [[place] for place in here if place.version is None]
    again = [[place] for place in here if place.meant and place.version is None]
    holding = [place for place in places if place.meant and place.down_for < PATIENCE_SECONDS]
    others = by_preference([place for place in here if not place.meant])
    lacking = max(0, wanted - len(holding))
    return again + [others[number:] for number in range(min(lacking, len(others)))]


def to_evict(used_at: Mapping[str, float], busy: Collection[str], limit: int) -> list[str] | None:
    """Which adapters give way to one more, least recently used first.

    Args:
        used_at: When each that was loaded on demand was used last.
        busy: Those with requests in flight, which stay.
        limit: How many there may be, the new one included.

    Returns:
        None where too many are busy.
    """
    surplus = len(used_at) + 1 - limit
    if surplus <= 0:
        return []
    idle = sorted((name for name in used_at if name not in busy), key=used_at.__getitem__)
    return idle[:surplus] if len(idle) >= surplus else None
