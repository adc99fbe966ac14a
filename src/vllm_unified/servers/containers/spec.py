"""What to run in a container, and what is sent to the container engine for it. Pure."""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from vllm_unified.errors import ConfigurationError
from vllm_unified.servers import spec as server_spec
from vllm_unified.servers.engines import Engine
from vllm_unified.servers.spec import ServerSpec

DEFAULT_IMAGE = "vllm/vllm-openai:v0.32.0"
LABEL = "vllm-unified"
"""Every label of ours is ``vllm-unified.SOMETHING``."""

# As `docker run --gpus` asks for them.
_GPU_CAPABILITIES = [["gpu"]]
# A limit, of which what is needed is taken. Docker's default of 64 MB is too little even on a CPU.
_SHM_SIZE = "8g"
_INNER_PORT = 8000
# Not the image's own: what that is has changed between versions of vLLM.
_PYTHON = "python3"
_MEMORY = re.compile(r"\d+[bkmg]?", re.IGNORECASE)
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ALL_ADDRESSES = ("0.0.0.0", "::")


class ContainerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One vLLM server in a container, as its user wants it.

    Raises:
        ConfigurationError: a value is out of range, two contradict each other, or an argument
            carries the key.
    """

    server: ServerSpec = ServerSpec()
    """What to serve. Its ``host`` and ``port`` are those of this machine, at which the container's
    port is published. A local model folder is mounted, for reading only."""
    image: str = DEFAULT_IMAGE
    gpus: Literal["all"] | int | tuple[str, ...] | None = "all"
    """All, so many, or those with these ids (``"0"``, ``"GPU-3faa..."``). ``None``: no GPU, which
    needs an image of vLLM for CPUs."""
    volumes: dict[str, str] = {}
    """A folder of this machine, or a volume's name -> its path in the container, perhaps with
    ``:ro`` for reading only."""
    ports: int | None = None
    """This machine's port; ``None``: ``server.port``, or a free one."""
    environment: dict[str, str] = {}
    """More environment variables; they win over ``server.env``."""
    shm_size: str | None = None
    """The most shared memory, such as ``"16g"``; ``None``: 8 GB."""
    ipc_host: bool = False
    """Share this machine's memory in place of ``shm_size``."""
    name: str | None = None
    """``None``: ``vllm-unified-`` and the fingerprint."""
    network: str | None = None
    """A network of the engine, or ``"host"``; ``None``: the engine's default."""
    command: tuple[str, ...] | None = None
    """In place of all arguments that are made of ``server``; the server has to listen on port 8000,
    for every address."""
    entrypoint: tuple[str, ...] | None = None
    """What the arguments are given to; ``None``: vLLM's API server, by ``python3``."""
    extra_args: tuple[str, ...] = ()
    """More arguments for vLLM, after those of ``server``."""
    docker_url: str | None = None
    """Such as ``unix:///run/podman/podman.sock``; ``None``: as for the command ``docker``."""

    def __post_init__(self) -> None:
        _check_gpus(self.gpus)
        _check_texts(self)
        for host, inside in self.volumes.items():
            _check_volume(host, inside)
        _check_port(self.ports, self.server.port)
        if self.ipc_host and self.shm_size:
            raise ConfigurationError("shm_size and ipc_host contradict each other: keep one")
        _check_no_key(self)

    @property
    def port(self) -> int | None:
        """This machine's port, where one was chosen."""
        return self.ports or self.server.port

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["environment"] = dict.fromkeys(self.environment, "...")
        return f"ContainerSpec({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def container_fingerprint(spec: ContainerSpec) -> str:
    """16 hex digits that are equal for two specs that can share one container.

    The key enters only through a digest.
    """
    key = hashlib.sha256((spec.server.api_key or "").encode()).hexdigest()
    server = msgspec.structs.replace(spec.server, api_key=key)
    material = msgspec.json.encode(msgspec.structs.replace(spec, server=server), order="sorted")
    return hashlib.sha256(material).hexdigest()[:16]


def container_name(spec: ContainerSpec) -> str:
    """The one that was chosen, or one that no other spec has."""
    return spec.name or f"{LABEL}-{container_fingerprint(spec)}"


def container_order(
    spec: ContainerSpec, port: int, *, folders: tuple[str, ...] = (), keep: bool = False
) -> dict[str, Any]:
    """The arguments for the ``containers.create`` of Docker's SDK. The key is in ``environment``,
    and nowhere else.

    Args:
        spec: With ``server`` resolved.
        port: This machine's.
        folders: What the model needs of this machine; mounted at the same paths, for reading.
        keep: Whether it is meant to outlive the program; a label says so.
    """
    engine = _inner_engine(spec)
    server = _inner_server(spec, port)
    python, *call = server_spec.command(server, engine, server.port or _INNER_PORT)
    module, args = call[:2], call[2:]
    order: dict[str, Any] = {
        "image": spec.image,
        "name": container_name(spec),
        "entrypoint": list(spec.entrypoint or (python, *module)),
        "command": [*args, *spec.extra_args] if spec.command is None else list(spec.command),
        "environment": server_spec.environment(server, engine, {}) | spec.environment,
        "labels": _labels(spec, port, keep=keep),
        "volumes": _volumes(spec, folders),
        "detach": True,
    }
    if spec.network != "host":
        # Docker takes addresses only.
        address = {"localhost": "127.0.0.1"}.get(spec.server.host, spec.server.host)
        order["ports"] = {f"{_INNER_PORT}/tcp": (address, port)}
    if spec.network:
        # Docker's SDK takes "host" by another name than a network that was made.
        order["network_mode" if spec.network == "host" else "network"] = spec.network
    if spec.gpus is not None:
        order["device_requests"] = [_device_request(spec.gpus)]
    if spec.ipc_host:
        order["ipc_mode"] = "host"
    else:
        order["shm_size"] = spec.shm_size or _SHM_SIZE
    return order


def engine_host(docker_url: str | None) -> str | None:
    """The machine of a container engine, where that is another than this one."""
    parts = urlsplit(docker_url or "")
    if parts.scheme not in ("tcp", "ssh", "http", "https") or parts.hostname in _LOOPBACK:
        return None
    return parts.hostname


def reachable_host(listen: str, engine: str | None) -> str:
    """The host at which a client finds a server that listens at ``listen``.

    Args:
        engine: The machine of the container engine, if it is another.

    Raises:
        ConfigurationError: the server would be reachable on the engine's machine only.
    """
    if engine is None:
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen, listen)
    if listen in _LOOPBACK:
        raise ConfigurationError(
            f"the container engine is at {engine}, and its port would be published at {listen} "
            "there, where only that machine reaches it",
            hint='Give server=ServerSpec(host="0.0.0.0", api_key=...), or another address of it.',
        )
    return engine if listen in _ALL_ADDRESSES else listen


def _inner_engine(spec: ContainerSpec) -> Engine:
    """The vLLM in the image, as the helpers of ``ServerSpec`` know it."""
    return Engine(
        name=spec.image,
        kind="cpu" if spec.gpus is None else "cuda",
        version="",
        python=_PYTHON,
        origin="environment",
        path="",
    )


def _inner_server(spec: ContainerSpec, port: int) -> ServerSpec:
    if spec.network == "host":
        return msgspec.structs.replace(spec.server, port=port)
    return msgspec.structs.replace(spec.server, host="0.0.0.0", port=_INNER_PORT)


def _labels(spec: ContainerSpec, port: int, *, keep: bool) -> dict[str, str]:
    return {
        f"{LABEL}.fingerprint": container_fingerprint(spec),
        f"{LABEL}.model": spec.server.name,
        f"{LABEL}.port": str(port),
        f"{LABEL}.keep": "true" if keep else "false",
    }


def _volumes(spec: ContainerSpec, folders: tuple[str, ...]) -> dict[str, dict[str, str]]:
    mounted = {folder: {"bind": folder, "mode": "ro"} for folder in folders}
    for host, inside in spec.volumes.items():
        path, _, mode = inside.partition(":")
        mounted[host] = {"bind": path, "mode": mode or "rw"}
    return mounted


def _device_request(gpus: Literal["all"] | int | tuple[str, ...]) -> dict[str, Any]:
    if isinstance(gpus, tuple):
        return {"device_ids": list(gpus), "capabilities": _GPU_CAPABILITIES}
    return {"count": -1 if gpus == "all" else gpus, "capabilities": _GPU_CAPABILITIES}


def _check_gpus(gpus: object) -> None:
    match gpus:
        case None | "all":
            return
        case int() if not isinstance(gpus, bool) and gpus > 0:
            return
        case tuple() if gpus and all(isinstance(each, str) and each for each in gpus):
            return
    raise ConfigurationError(
        f"gpus: {gpus!r} is not 'all', a number of GPUs, or a tuple of their ids",
        hint="None runs on the CPU, with an image of vLLM for CPUs.",
    )


def _check_texts(spec: ContainerSpec) -> None:
    if not spec.image or any(character.isspace() for character in spec.image):
        raise ConfigurationError(f"image: {spec.image!r} is not the name of an image")
    if spec.name is not None and not _NAME.fullmatch(spec.name):
        raise ConfigurationError(
            f"name: {spec.name!r} is not a name for a container",
            hint="At least two of: letters, digits, and, not as the first one, _ . -",
        )
    if spec.shm_size is not None and not _MEMORY.fullmatch(spec.shm_size):
        raise ConfigurationError(f"shm_size: {spec.shm_size!r} is not a size such as '8g'")
    if spec.network in ("", "none"):
        raise ConfigurationError("network: without a network nobody reaches the server")
    if spec.docker_url is not None and "://" not in spec.docker_url:
        raise ConfigurationError(
            f"docker_url: {spec.docker_url!r} is not a URL",
            hint="It looks like unix:///var/run/docker.sock, tcp://host:2376 or ssh://host.",
        )


def _check_volume(host: str, inside: str) -> None:
    path, _, mode = inside.partition(":")
    if not host or not PurePosixPath(path).is_absolute() or mode not in ("", "ro", "rw"):
        raise ConfigurationError(
            f"volumes: {host!r}: {inside!r} is not a folder or volume, and a path for it",
            hint='For example {"/data/models": "/models:ro"}.',
        )


def _check_port(ports: object, server_port: int | None) -> None:
    if ports is None:
        return
    if isinstance(ports, bool) or not isinstance(ports, int) or not 0 < ports < 65536:
        raise ConfigurationError(f"ports: {ports!r} is not a port of this machine, in 1..65535")
    if server_port not in (None, ports):
        raise ConfigurationError(f"ports is {ports}, and server.port is {server_port}: keep one")


def _check_no_key(spec: ContainerSpec) -> None:
    arguments = (*spec.extra_args, *(spec.command or ()), *(spec.entrypoint or ()))
    if any(arg.partition("=")[0].replace("_", "-") == "--api-key" for arg in arguments):
        raise ConfigurationError(
            "--api-key among the arguments would show the key in the process list",
            hint="Use server=ServerSpec(api_key=...) instead.",
        )
    if "VLLM_API_KEY" in {**spec.environment, **spec.server.env}:
        raise ConfigurationError(
            "VLLM_API_KEY in the environment would be a key that nobody here knows",
            hint="Use server=ServerSpec(api_key=...) instead; it is sent in the environment.",
        )
