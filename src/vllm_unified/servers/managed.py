"""What every server that is run here can do, whether it is a process or a container."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

from vllm_unified.servers.engines import Progress


class ManagedStatus(Protocol):
    """How a server does."""

    @property
    def state(self) -> str: ...
    @property
    def health(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def restarts(self) -> int: ...
    @property
    def last_exit(self) -> str: ...


class ManagedServer(Protocol):
    """A server that is run here: :class:`LocalServer`, :class:`ContainerServer`."""

    @property
    def url(self) -> str:
        """Such as ``http://127.0.0.1:40123``."""

    @property
    def model(self) -> str:
        """The model's name in requests."""

    @property
    def api_key(self) -> str | None:
        """The key that requests must carry."""

    async def follow(
        self,
        changed: Callable[[Any], object] | None = None,
        *,
        progress: Progress | None = None,
    ) -> str:
        """Wait until the server is over; why it is. ``changed`` is called after a restart."""

    async def status(self) -> ManagedStatus:
        """How it does now."""

    async def restart(self, *, progress: Progress | None = None) -> None:
        """End vLLM and start it again, with the same spec; return when it is ready."""

    async def stop(self) -> None:
        """Use it no longer; it ends if it was run for this user only."""

    async def end(self) -> None:
        """End it for everybody."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
