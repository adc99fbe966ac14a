"""The container engine (Docker, Podman), by Docker's SDK.

Its calls block, each for a minute at most; :func:`in_thread` makes them from an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from datetime import UTC, datetime
from typing import Any, Self, TypeVar

import msgspec

from vllm_unified.errors import ImageNotFoundError
from vllm_unified.servers.containers.errors import (
    PULL_HINT,
    absent_is_fine,
    docker_sdk,
    mapped_errors,
)
from vllm_unified.servers.containers.spec import engine_host

T = TypeVar("T")

_CALL_SECONDS = 60.0
_LOG_LINES = 10_000
_LOG_BYTES = 2**20


class ContainerState(msgspec.Struct, frozen=True, kw_only=True):
    """A container as the engine tells it."""

    id: str
    name: str
    image: str
    status: str
    """``created``, ``running``, ``paused``, ``restarting``, ``removing``, ``exited``, ``dead``."""
    exit_code: int
    out_of_memory: bool
    error: str
    """The engine's own words for why it could not be run."""
    started_at: float | None
    """Seconds since the Unix epoch."""
    labels: dict[str, str]

    @property
    def runs(self) -> bool:
        """Whether it has processes."""
        return self.status in ("running", "paused", "restarting")


class ContainerEngine:
    """A connection to a container engine. Its methods raise :class:`ContainerError`."""

    def __init__(self, client: Any, docker_url: str | None) -> None:
        self._client = client
        self.host = engine_host(docker_url)
        """The engine's machine, if it is another."""

    @classmethod
    def connect(cls, docker_url: str | None) -> Self:
        """Connect, and ask for its version.

        Raises:
            ConfigurationError: Docker's SDK is not installed.
            ContainerEngineError: no engine is there, or it cannot be used.
        """
        docker = docker_sdk()
        where = docker_url or os.environ.get("DOCKER_HOST")
        with mapped_errors(where):
            if docker_url:
                tls = _tls_of_environment(docker) if docker_url.startswith("tcp://") else {}
                client = docker.DockerClient(docker_url, timeout=_CALL_SECONDS, **tls)
            else:
                client = docker.from_env(timeout=_CALL_SECONDS)
        return cls(client, where)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def version(self) -> Mapping[str, Any]:
        """What the engine says of itself."""
        with mapped_errors():
            return dict(self._client.version())

    def info(self) -> Mapping[str, Any]:
        """What it says of its machine."""
        with mapped_errors():
            return dict(self._client.info())

    def has_image(self, name: str) -> bool:
        """Whether the engine has the image, so that it need not be pulled."""
        with mapped_errors():
            try:
                self._client.images.get(name)
            except docker_sdk().errors.ImageNotFound:
                return False
            return True

    def pull(self, name: str, say: Callable[[str], None], cancel: threading.Event) -> None:
        """Have the engine download an image. ``say`` gets short messages, in this thread.

        Raises:
            ImageNotFoundError: the registry does not have it, or refuses.
            concurrent.futures.CancelledError: ``cancel`` was set.
        """
        repository, tag = docker_sdk().utils.parse_repository_tag(name)
        layers = _Layers(name)
        with mapped_errors(image=name):
            stream = self._client.api.pull(
                repository, tag=tag or "latest", stream=True, decode=True
            )
            with contextlib.closing(stream):
                for news in stream:
                    if cancel.is_set():
                        raise CancelledError
                    if said := layers.said(news):
                        say(said)
        if not self.has_image(name):
            raise ImageNotFoundError(f"the image {name} cannot be pulled", hint=PULL_HINT)

    def find(self, label: str, value: str) -> ContainerState | None:
        """A container with this label, running or not."""
        with mapped_errors():
            found = self._client.containers.list(
                all=True, filters={"label": f"{label}={value}"}, ignore_removed=True
            )
            return _state(found[0].attrs) if found else None

    def inspect(self, id: str) -> ContainerState | None:
        """A container by its id or name; ``None``: there is none."""
        with mapped_errors():
            try:
                return _state(self._client.containers.get(id).attrs)
            except docker_sdk().errors.NotFound:
                return None

    def create(self, order: dict[str, Any]) -> str:
        """Make a container; its id.

        Raises:
            ImageNotFoundError: the engine does not have the image.
            ContainerConflictError: the name is taken.
        """
        with mapped_errors(image=order["image"]):
            made = self._client.containers.create(**order)
        return str(made.id)

    def start(self, id: str) -> None:
        """Run it; nothing happens where it runs already.

        Raises:
            ContainerConflictError: the port is taken.
        """
        with mapped_errors():
            self._client.api.start(id)

    def stop(self, id: str, timeout: float) -> None:
        """SIGTERM, and SIGKILL after ``timeout`` seconds."""
        with mapped_errors(), absent_is_fine():
            self._client.api.stop(id, timeout=max(0, round(timeout)))

    def remove(self, id: str) -> None:
        """End and remove it, with what it wrote."""
        with mapped_errors(), absent_is_fine():
            self._client.api.remove_container(id, force=True, v=True)

    def logs(self, id: str, lines: int, since: float | None = None) -> str:
        """The last lines of what it wrote, ``since`` a Unix time; ``""`` where it is gone."""
        said = b""
        with mapped_errors(), absent_is_fine():
            said = self._client.containers.get(id).logs(
                tail=min(lines, _LOG_LINES), since=int(since) if since else None
            )
        return str(said[-_LOG_BYTES:], "utf-8", "replace").rstrip("\n")


class _Layers:
    """How far a pull is, from what the engine tells of each layer."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._done: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self._percent = -1

    def said(self, news: Mapping[str, Any]) -> str | None:
        """A message, whenever another percent is there.

        Raises:
            ImageNotFoundError: the pull failed, in the engine's words.
        """
        if "error" in news:
            raise ImageNotFoundError(
                f"the image {self._image} cannot be pulled: {news['error']}", hint=PULL_HINT
            )
        detail = news.get("progressDetail") or {}
        if news.get("status") != "Downloading" or not detail.get("total"):
            return None
        layer = str(news.get("id"))
        self._done[layer], self._total[layer] = int(detail["current"]), int(detail["total"])
        percent = 100 * sum(self._done.values()) // sum(self._total.values())
        if percent == self._percent:
            return None
        self._percent = percent
        return f"pulling {self._image}: {percent} % of what is known to come"


async def in_thread(
    work: Callable[[], T],
    *,
    discard: Callable[[T], object] | None = None,
    patient: bool = True,
) -> T:
    """Run a blocking call in a thread that never holds up the program's end.

    Args:
        work: What is called there.
        discard: Gets a result, in a thread too, that came after a cancellation.
        patient: Whether the call's end is awaited when it is cancelled.
    """
    outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    outcome.add_done_callback(lambda done: done.cancelled() or done.exception())
    threading.Thread(target=_run, args=(work, outcome), daemon=True, name="container").start()
    try:
        return await asyncio.shield(outcome)
    except asyncio.CancelledError:
        if patient:
            await asyncio.wait([outcome])
        if discard and outcome.done() and outcome.exception() is None:
            result = outcome.result()
            await in_thread(lambda: discard(result))
        raise


def _run(work: Callable[[], T], outcome: asyncio.Future[T]) -> None:
    error: BaseException | None = None
    result: T | None = None
    try:
        result = work()
    except BaseException as raised:  # noqa: BLE001 - it is raised where the call is awaited
        error = raised

    def settle() -> None:
        if outcome.done():
            return
        if error is None:
            outcome.set_result(result)  # type: ignore[arg-type]
        else:
            outcome.set_exception(error)

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        outcome.get_loop().call_soon_threadsafe(settle)


def _tls_of_environment(docker: Any) -> dict[str, Any]:
    """As the command ``docker`` does: ``DOCKER_TLS_VERIFY`` and ``DOCKER_CERT_PATH``."""
    found: Mapping[str, Any] = docker.utils.kwargs_from_env()
    return {"tls": found["tls"]} if "tls" in found else {}


def _state(attrs: Mapping[str, Any]) -> ContainerState:
    state, config = attrs["State"], attrs["Config"]
    return ContainerState(
        id=attrs["Id"],
        name=attrs["Name"].lstrip("/"),
        image=config["Image"],
        # "stopped" is Podman's word, for a moment, for what exits.
        status={"stopped": "exited"}.get(state["Status"], state["Status"]),
        exit_code=state.get("ExitCode") or 0,
        out_of_memory=bool(state.get("OOMKilled")),
        error=state.get("Error") or "",
        started_at=_unix_time(state.get("StartedAt") or ""),
        labels=config.get("Labels") or {},
    )


def _unix_time(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(text)
        if moment.year > 1:
            return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    return None
