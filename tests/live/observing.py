"""What the server and the system say of a client, seen from outside of it."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped, unused-ignore]

_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", re.MULTILINE)
_POLL_SECONDS = 0.01


def requests_at(url: str) -> int:
    """Requests that the server's engine runs or holds in its queue."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        found = _REQUESTS.findall(answer.read().decode())
    assert found, "the server has no metrics"
    return round(sum(map(float, found)))


async def seconds_until_requests(url: str, count: int, *, within: float) -> float:
    """Wait until the engine has that many requests, and fail where it does not; how long it
    took."""
    began = time.monotonic()
    while (found := await asyncio.to_thread(requests_at, url)) != count:
        took = time.monotonic() - began
        assert took < within, f"{found} requests after {took:.2f} s, not {count}"
        await asyncio.sleep(_POLL_SECONDS)
    return time.monotonic() - began


def connections_to(url: str, process: psutil.Process | None = None) -> int:
    """Open connections to the server that this process (or another one) holds."""
    port = urlsplit(url).port
    return sum(
        bool(connection.raddr)
        and connection.raddr.port == port
        and connection.status == psutil.CONN_ESTABLISHED
        for connection in (process or psutil.Process()).net_connections("tcp")
    )


def post(url: str) -> None:
    """Call a server's endpoint without a body, as its operator would."""
    request = urllib.request.Request(url, method="POST")
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()
