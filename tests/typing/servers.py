"""Processes and containers are used in one way; never run."""

from __future__ import annotations

from vllm_unified.servers import ContainerServer, LocalServer
from vllm_unified.servers.managed import ManagedServer


def both(local: LocalServer, container: ContainerServer) -> list[ManagedServer]:
    return [local, container]
