"""A cluster of two nodes, and servers, for jobs on Ray."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

from tests.resilience.servers import Servers
from vllm_unified import VllmUnified
from vllm_unified.simulator import SimulatorConfig, Timing

SLOW = Timing(inter_token_latency=0.01)


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Two nodes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with Servers([SimulatorConfig(timing=SLOW, max_num_seqs=64)] * 2) as servers:
        yield servers


@pytest.fixture
def vllm(servers: Servers) -> Iterator[VllmUnified]:
    with VllmUnified({"endpoints": servers.urls}) as client:
        yield client


@pytest.fixture
def nobody() -> Iterator[str]:
    """Host and port at which nothing listens, and nothing will."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{unused.getsockname()[1]}"


def processes(name: str) -> list[psutil.Process]:
    """Actors of that class, on this machine."""
    found = psutil.process_iter(["name", "cmdline"])
    return [each for each in found if name in " ".join(each.info["cmdline"] or ())]


def gauge(url: str, name: str, *, without: str = "abort") -> float:
    """A figure of a server's metrics, over all labels but those that have this word in them."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    found = [line for line in lines if line.startswith(name) and without not in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)
