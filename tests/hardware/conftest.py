"""A fake engine, in a cache of its own, as the tests of servers/ have it."""

from __future__ import annotations

from tests.servers.conftest import fakes

__all__ = ["fakes"]
