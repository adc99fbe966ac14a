"""What a backend is: one method, and what else it may have."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from vllm_unified.hardware.request import InferenceRequest
from vllm_unified.results import StreamChunk


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend can do, as far as it knows."""

    models: Mapping[str, int | None] | None = None
    """Names that it answers to, with the tokens that prompt and answer may have together; ``None``
    where a number, or all of it, is not known: then it is taken to serve anything."""
    device: str | None = None
    """``cuda``, ``rocm``, ``xpu``, ``mps`` or ``cpu``; ``None`` where it is not known."""
    unavailable: str | None = None
    """Why it cannot be used here at all."""

    def context(self, model: str | None) -> int | None:
        """Tokens of prompt and answer together, where they are known."""
        if not self.models:
            return None
        if model is not None:
            return self.models.get(model)
        return next(iter(self.models.values()))


@runtime_checkable
class Backend(Protocol):
    """Whatever can answer. A class of one's own needs :meth:`infer` only.

    If it has them, these are used, too::

        def stream(self, request) -> AsyncIterator[StreamChunk | str]
        async def batch(self, requests) -> list        # in order
        async def health(self) -> object               # true if it is well; it may raise
        async def capabilities(self) -> Capabilities
        appetite: int                                  # how many at once keep it busy

    An error of the tree says by ``is_transient_error`` whether another backend is worth a try.
    """

    async def infer(self, request: InferenceRequest) -> Any:
        """The answer."""


class Streaming(Protocol):
    """A backend that answers piece by piece."""

    def stream(self, request: InferenceRequest) -> AsyncIterator[StreamChunk | str]:
        """The pieces. Nothing happens before the first is asked for; ``close()`` or ``aclose()``,
        if there is one, ends it early."""


class Batching(Protocol):
    """A backend that has a better way for many requests than one by one."""

    async def batch(self, requests: Sequence[InferenceRequest]) -> list[Any]:
        """The answers, in order."""


class Checked(Protocol):
    """A backend that can be looked at."""

    async def health(self) -> object:
        """True in a condition if it is well; it may raise as well."""


class Described(Protocol):
    """A backend that knows what it can do."""

    async def capabilities(self) -> Capabilities:
        """What it can do now."""
