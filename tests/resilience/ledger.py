"""What a client did, seen from both of its ends: calls that begin and end, attempts at the wire."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped, unused-ignore]

from vllm_unified import AsyncVllmUnified
from vllm_unified.events import RequestEndEvent, RequestStartEvent
from vllm_unified.settings import Settings
from vllm_unified.wire.http import HttpTransport
from vllm_unified.wire.transport import Response

STEP = 0.1
"""Seconds that attempts are counted together for."""


class Ledger:
    """A transport that counts, and a listener to the client's events.

    An attempt is a request that was sent for a call, so the health check's own are none. What is
    kept does not grow with the number of calls.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.calls = 0
        self.attempts = 0
        self.ended_twice = 0
        """Calls that ended without having begun, or again."""
        self.open_calls: set[str] = set()
        """Ids of the calls that have begun and not ended."""
        self.over_time: Counter[int] = Counter()
        """Attempts by the step in which they began."""
        self.retries_over_time: Counter[int] = Counter()
        """Those of them that were not the first of their call."""
        self.by_server: Counter[tuple[str, int]] = Counter()
        """Attempts by server and second."""
        self._sent: set[str] = set()
        self._inner = HttpTransport(Settings())

    def watch(self, client: AsyncVllmUnified) -> None:
        """Listen to this client, whose transport this is."""
        client.on("request_start", self._start)
        client.on("request_end", self._end)

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def between(self, start: float, end: float) -> list[int]:
        """Attempts in each step from ``start`` to ``end``, in seconds since the beginning."""
        return [self.over_time[step] for step in range(_step(start), _step(end))]

    def retries_between(self, start: float, end: float) -> int:
        """Attempts that were not the first of their call, in that time."""
        return sum(self.retries_over_time[step] for step in range(_step(start), _step(end)))

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> Response:
        id = headers.get("X-Request-Id", "")
        if id in self.open_calls:
            self._count(id, url)
        return await self._inner.open(method, url, headers=headers, body=body)

    async def close(self) -> None:
        await self._inner.close()

    def _start(self, event: RequestStartEvent) -> None:
        self.calls += 1
        self.open_calls.add(event.request_id)

    def _end(self, event: RequestEndEvent) -> None:
        self.ended_twice += event.request_id not in self.open_calls
        self.open_calls.discard(event.request_id)
        self._sent.discard(event.request_id)

    def _count(self, id: str, url: str) -> None:
        step = _step(self.now)
        self.attempts += 1
        self.over_time[step] += 1
        self.retries_over_time[step] += id in self._sent
        self.by_server[url.partition("/v1")[0], int(self.now)] += 1
        self._sent.add(id)


def _step(seconds: float) -> int:
    return round(seconds / STEP - 0.5)


def open_connections(urls: Sequence[str]) -> int:
    """Connections of this process to these servers."""
    ports = {urlsplit(url).port for url in urls}
    connections = psutil.Process().net_connections("tcp")
    return sum(bool(each.raddr) and each.raddr.port in ports for each in connections)
