"""Docker's SDK for Python: where it comes from, and what its errors become."""

from __future__ import annotations

import contextlib
import importlib
import re
import ssl
import traceback
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

from vllm_unified.errors import (
    ConfigurationError,
    ContainerConflictError,
    ContainerEngineError,
    ContainerError,
    ImageNotFoundError,
    VllmError,
)

PULL_HINT = (
    "Is the name right, and can the registry be reached? A private one needs `docker login` first."
)

_PORT_TAKEN = re.compile(
    r"port is already allocated|address already in use|ports are not available", re.IGNORECASE
)
_NAME_TAKEN = re.compile(r"name .*(already in use|in use by)", re.IGNORECASE | re.DOTALL)
_NO_GPU = re.compile(r"could not select device driver|nvidia-container|libnvidia-ml", re.IGNORECASE)


def docker_sdk() -> Any:
    """The SDK, which is imported when the first container is asked for.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return importlib.import_module("docker")
    except ImportError as error:
        raise ConfigurationError(
            "containers need Docker's SDK for Python, which is not installed",
            hint='Install it with: pip install "vllm-unified[docker]"',
        ) from error


@contextlib.contextmanager
def absent_is_fine() -> Iterator[None]:
    """What is to be ended, and is not there, has ended."""
    errors = docker_sdk().errors
    with contextlib.suppress(errors.NotFound):
        yield


@contextlib.contextmanager
def mapped_errors(where: str | None = None, *, image: str = "") -> Iterator[None]:
    """The one edge at which the SDK's exceptions become ours."""
    try:
        yield
    except (VllmError, CancelledError):
        raise
    except Exception as error:
        chain = list(_chain(error))
        for each in chain:
            _forget_request(each)
            # What was sent, with the key, is in its frames, too; and the SDK's open sockets.
            traceback.clear_frames(each.__traceback__)
        raise _own_error(error, chain, where, image) from error


def _own_error(
    error: Exception, chain: list[BaseException], where: str | None, image: str
) -> VllmError:
    errors = docker_sdk().errors
    said = str(getattr(error, "explanation", None) or "") or str(error) or type(error).__name__
    if isinstance(error, errors.ImageNotFound):
        return ImageNotFoundError(
            f"the container engine does not have the image {image}",
            hint=f"Have it pulled with pull=True, or first: docker pull {image}",
        )
    if _PORT_TAKEN.search(said):
        return ContainerConflictError(
            f"the port is taken: {said}", hint="Choose another, or ports=None for a free one."
        )
    if _NAME_TAKEN.search(said):
        return ContainerConflictError(f"the container's name is taken: {said}")
    if isinstance(error, errors.APIError):
        return ContainerError(f"the container engine says: {said}", hint=_hint(said))
    return _unreachable(chain, where, said)


def _hint(said: str) -> str | None:
    if _NO_GPU.search(said):
        return (
            "The engine cannot hand out GPUs: install the NVIDIA Container Toolkit and restart it, "
            "or give gpus=None and an image of vLLM for CPUs."
        )
    if "no such file or directory" in said or "bind source path does not exist" in said:
        return "A folder that is to be mounted is not on the engine's machine."
    return None


def _unreachable(chain: list[BaseException], where: str | None, said: str) -> ContainerEngineError:
    at = f" at {where}" if where else ""
    for each in chain:
        match each:
            case PermissionError():
                return ContainerEngineError(
                    f"this user may not use the container engine{at}: permission denied",
                    hint="Join the group docker (sudo usermod -aG docker $USER, and log in anew), "
                    "or use a rootless engine, with docker_url=...",
                )
            case FileNotFoundError() | ConnectionRefusedError():
                return ContainerEngineError(
                    f"no container engine answers{at}: {each.strerror}",
                    hint="Is Docker running? For Podman: podman system service --time=0 & "
                    "and docker_url=unix:///run/podman/podman.sock",
                )
            case ssl.SSLError():
                return ContainerEngineError(
                    f"the TLS connection to the container engine{at} failed: {each}",
                    hint="Check DOCKER_TLS_VERIFY and DOCKER_CERT_PATH (ca.pem, cert.pem, key.pem)",
                )
    return ContainerEngineError(
        f"the container engine{at} cannot be used: {said}",
        hint="Does `docker version` work, with the same DOCKER_HOST?",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that stand behind it; requests puts some among the arguments."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        behind = [each.__cause__, each.__context__, *each.args, getattr(each, "reason", None)]
        waiting += [one for one in behind if isinstance(one, BaseException)]


def _forget_request(error: BaseException) -> None:
    """It stands in ``__cause__``, and its body has the environment, with the key."""
    for holder in (error, getattr(error, "response", None)):
        if getattr(holder, "request", None) is not None:
            with contextlib.suppress(AttributeError):
                holder.request = None  # type: ignore[union-attr]
