"""Can a container engine run a spec? Every problem is told in words, and none is raised."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_unified.errors import VllmError
from vllm_unified.servers.containers.engine import ContainerEngine
from vllm_unified.servers.containers.model import model_bytes, with_known_model
from vllm_unified.servers.containers.spec import (
    LABEL,
    ContainerSpec,
    container_fingerprint,
    container_name,
    reachable_host,
)
from vllm_unified.servers.containers.status import ContainerCapabilities

# vLLM's image for CUDA, unpacked, has about 20 GB; one that is being pulled takes more.
_IMAGE_BYTES = 30 * 10**9
_GB = 10**9


def check_container(spec: ContainerSpec, *, pull: bool) -> ContainerCapabilities:
    """Look at everything that a start needs. Blocks, for a minute at most where an engine hangs.

    Args:
        spec: What is to be run.
        pull: Whether a missing image would be pulled.
    """
    try:
        known = with_known_model(spec)
        with contextlib.closing(ContainerEngine.connect(spec.docker_url)) as engine:
            return _look(known, engine, pull=pull)
    except VllmError as error:
        return _nothing(str(error))


def _look(spec: ContainerSpec, engine: ContainerEngine, *, pull: bool) -> ContainerCapabilities:
    version, info = engine.version(), engine.info()
    present = engine.has_image(spec.image)
    holder = engine.inspect(container_name(spec))
    fingerprint = container_fingerprint(spec)
    ours = holder is not None and holder.labels.get(f"{LABEL}.fingerprint") == fingerprint
    elsewhere = engine.host is not None or spec.port is None
    port_free = ours or elsewhere or _is_free(spec.server.host, spec.port or 0)
    gpus = gpu_runtime(version, info)
    disk = None if engine.host else _disk_free(info)
    problems = [*_problems_of_place(spec, engine)]
    if gpus is False and spec.gpus is not None:
        problems.append(
            "GPUs are asked for, and the engine has no runtime for them: install the NVIDIA "
            "Container Toolkit and restart the engine, or give gpus=None and an image for CPUs"
        )
    if not present and not pull:
        problems.append(
            f"the image {spec.image} is not there: docker pull {spec.image}, or give pull=True"
        )
    if not present and disk is not None and disk < _IMAGE_BYTES:
        problems.append(
            f"{disk / _GB:.0f} GB are free where the engine keeps its images, and vLLM's take "
            f"about {_IMAGE_BYTES / _GB:.0f} GB: free some, or pull a smaller image"
        )
    if not port_free:
        problems.append(f"port {spec.port} is taken: choose another, or ports=None for a free one")
    if holder is not None and not ours:
        problems.append(
            f"the name {holder.name} belongs to a container of {holder.image}: choose another, or "
            f"docker rm -f {holder.name}"
        )
    memory = int(info.get("MemTotal") or 0) or None
    if spec.gpus is None and memory and memory < model_bytes(spec.server.model):
        problems.append("the model's weights do not fit into the memory: take a smaller model")
    return ContainerCapabilities(
        engine=_engine_name(version),
        api_version=version.get("ApiVersion"),
        gpu_runtime=gpus,
        image_present=present,
        port_free=port_free,
        memory_bytes=memory,
        disk_free_bytes=disk,
        problems=tuple(problems),
    )


def gpu_runtime(version: Mapping[str, Any], info: Mapping[str, Any]) -> bool | None:
    """Whether an engine can hand out NVIDIA's GPUs; ``None`` for Podman, which does not tell."""
    if "nvidia" in (info.get("Runtimes") or {}):
        return True
    devices = info.get("DiscoveredDevices") or ()
    if any("nvidia.com/gpu" in str(device.get("ID")) for device in devices):
        return True
    return None if "Podman" in _engine_name(version) else False


def _engine_name(version: Mapping[str, Any]) -> str:
    components = version.get("Components") or [{}]
    name = components[0].get("Name") or "Engine"
    # Docker calls its daemon "Engine".
    return f"{'Docker' if name == 'Engine' else name} {version.get('Version', '')}".strip()


def _problems_of_place(spec: ContainerSpec, engine: ContainerEngine) -> Iterator[str]:
    try:
        reachable_host(spec.server.host, engine.host)
    except VllmError as error:
        yield str(error)
    if engine.host is None:
        for host in spec.volumes:
            if Path(host).is_absolute() and not Path(host).exists():
                yield f"volumes: there is no {host}: make it, or correct its path"


def _disk_free(info: Mapping[str, Any]) -> int | None:
    root = info.get("DockerRootDir")
    if not root:
        return None
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return None


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _nothing(problem: str) -> ContainerCapabilities:
    return ContainerCapabilities(
        engine=None,
        api_version=None,
        gpu_runtime=None,
        image_present=False,
        port_free=False,
        memory_bytes=None,
        disk_free_bytes=None,
        problems=(problem,),
    )
