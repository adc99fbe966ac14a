"""vLLM servers that run on this machine: engines, models, processes."""

from vllm_unified.servers.bundled import ensure_bundled_model
from vllm_unified.servers.commands import ServerStatus
from vllm_unified.servers.containers.server import ContainerServer
from vllm_unified.servers.containers.spec import ContainerSpec
from vllm_unified.servers.containers.status import ContainerCapabilities, ContainerStatus
from vllm_unified.servers.engines import (
    Engine,
    EngineKind,
    Progress,
    find_engine,
    list_engines,
    remove_engine,
)
from vllm_unified.servers.finding import find_server
from vllm_unified.servers.installer import VLLM_VERSION, install_engine
from vllm_unified.servers.local import LocalServer
from vllm_unified.servers.managed import ManagedServer
from vllm_unified.servers.records import RunningServer, running_servers
from vllm_unified.servers.spec import BUNDLED, BUNDLED_NAME, ServerSpec

__all__ = [
    "BUNDLED",
    "BUNDLED_NAME",
    "VLLM_VERSION",
    "ContainerCapabilities",
    "ContainerServer",
    "ContainerSpec",
    "ContainerStatus",
    "Engine",
    "EngineKind",
    "LocalServer",
    "ManagedServer",
    "Progress",
    "RunningServer",
    "ServerSpec",
    "ServerStatus",
    "ensure_bundled_model",
    "find_engine",
    "find_server",
    "install_engine",
    "list_engines",
    "remove_engine",
    "running_servers",
]
