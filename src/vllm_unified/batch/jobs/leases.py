"""How one server's requests are shared among several clients. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

SILENT_SECONDS = 15.0
"""After which a client that says nothing is taken for dead, and what it had is free."""
EXPECTED_SECONDS = 60.0
"""For so long, what a client would get is kept for those that were announced and have not come."""


class _Tenant(msgspec.Struct):
    lease: int
    """What it was told last."""
    counted: int
    """What it may have in flight, for all that is known: until it reports again, it may not have
    heard of a smaller lease."""
    wanted: int
    seen: float


class Leases:
    """What each client may have in flight at one server, so that the sum is never too large.

    A client reports what it has in flight and what it could use, and is told its lease. Everybody
    gets the same, and what one does not want is for the others. A lease grows only by what is free:
    where another's shrinks for it, that has to report first.
    """

    def __init__(self, most: int, *, clients: int, now: float) -> None:
        """Args:
            most: Requests in flight, of all together.
            clients: How many are expected; at most ``most``.
            now: Monotonic seconds.

        Raises:
            ValueError: there is not one request for each of them.
        """
        if not 1 <= clients <= most:
            raise ValueError(f"{clients} clients cannot share {most} requests")
        self._most = most
        self._expected = clients
        self._began = now
        self._tenants: dict[str, _Tenant] = {}

    def report(self, client: str, *, in_flight: int, wanted: int, now: float) -> int:
        """A client's lease from now on, at least 1.

        Args:
            in_flight: What it has in flight now.
            wanted: What it could use.
            now: Monotonic seconds.
        """
        tenants = self._tenants
        for name in [name for name, each in tenants.items() if each.seen + SILENT_SECONDS < now]:
            del tenants[name]
        old = tenants.get(client)
        before = 0 if old is None else old.lease
        tenants[client] = _Tenant(before, max(before, in_flight), max(wanted, 1), now)
        others = sum(each.counted for name, each in tenants.items() if name != client)
        free = self._most - others - self._kept(now)
        wants = {name: each.wanted for name, each in tenants.items()}
        lease = max(min(shares(self._most, wants)[client], free), 1)
        tenants[client] = _Tenant(lease, max(lease, before, in_flight), max(wanted, 1), now)
        return lease

    def _kept(self, now: float) -> int:
        missing = max(self._expected - len(self._tenants), 0)
        if now - self._began >= EXPECTED_SECONDS:
            return missing
        return missing * (self._most // self._expected)


def shares(most: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """Everybody the same, but nobody more than is wanted as long as another wants it: the sum is
    ``most``, or all that is wanted if that is less."""
    found: dict[str, int] = {}
    left = most
    modest = sorted(wanted, key=lambda name: (wanted[name], name))
    for number, name in enumerate(modest):
        found[name] = min(wanted[name], left // (len(modest) - number))
        left -= found[name]
    return found
