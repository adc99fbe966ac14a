"""Which of the servers that run here is meant."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from vllm_unified.errors import NoSuchServerError
from vllm_unified.servers.records import RunningServer, running_servers

_SHORTEST_PREFIX = 4
_LOOPBACK = ("localhost", "0.0.0.0", "::1", "::")


def find_server(where: str | None = None) -> RunningServer:
    """The server that runs on this machine by this library's hand, and is meant.

    Args:
        where: Its address, its fingerprint or at least 4 digits of it, its model's name, or its
            process id; ``None``: the only one.

    Raises:
        NoSuchServerError: none is meant, or more than one; the hint lists what runs.
    """
    return chosen(where, running_servers())


def chosen(where: str | None, servers: Sequence[RunningServer]) -> RunningServer:
    """:func:`find_server`, among these."""
    meant = servers if where is None else _meant(where.strip(), servers)
    if len(meant) == 1:
        return meant[0]
    if not servers:
        raise NoSuchServerError(
            "no server runs on this machine by this library's hand",
            hint="`vllm-unified serve` starts one.",
        )
    if where is None:
        problem = "which server is meant? More than one runs on this machine"
    elif meant:
        problem = f"{where!r} means more than one of the servers that run on this machine"
    else:
        problem = f"no server that runs on this machine is meant by {where!r}"
    lines = (f"  {server.fingerprint}  {server.url}  {server.model}" for server in servers)
    raise NoSuchServerError(
        problem,
        hint="\n".join(["Running (an address, a fingerprint or a model will do):", *lines]),
    )


def _meant(where: str, servers: Sequence[RunningServer]) -> list[RunningServer]:
    """Those of the first way to read ``where`` that any server answers to."""
    address = _address(where)
    for matches in (
        [server for server in servers if address and _address(server.url) == address],
        [server for server in servers if where in (str(server.pid), str(server.supervisor_pid))],
        [server for server in servers if where in (server.model, *server.spec.aliases)],
        [
            server
            for server in servers
            if len(where) >= _SHORTEST_PREFIX and server.fingerprint.startswith(where.lower())
        ],
    ):
        if matches:
            return matches
    return []


def _address(text: str) -> tuple[str, int] | None:
    """Host and port; the names of this machine count as one."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if host is None or port is None:
        return None
    return ("127.0.0.1" if host in _LOOPBACK else host, port)
