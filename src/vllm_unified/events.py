"""What happens inside a client, told to handlers: circuits, health, requests, adapters."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Container
from typing import Any, ClassVar

import msgspec

from vllm_unified.errors import ConfigurationError, VllmError

_LOG = logging.getLogger("vllm_unified")


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened. The class attribute ``name`` says what."""

    name: ClassVar[str]
    at: float = msgspec.field(default_factory=time.time)
    """When, in seconds since the Unix epoch."""


class _CircuitEvent(Event, frozen=True, kw_only=True):
    endpoint: str
    """Id of the endpoint."""


class CircuitOpenEvent(_CircuitEvent, frozen=True, kw_only=True):
    """An endpoint failed too often, and gets no more requests for a while."""

    name = "circuit_open"
    error: VllmError | None = None
    """The last failure."""


class CircuitHalfOpenEvent(_CircuitEvent, frozen=True, kw_only=True):
    """An endpoint that was shut out is tried again."""

    name = "circuit_half_open"


class CircuitClosedEvent(_CircuitEvent, frozen=True, kw_only=True):
    """An endpoint takes requests again."""

    name = "circuit_closed"


class EndpointUnhealthyEvent(Event, frozen=True, kw_only=True):
    """The health check found an endpoint that does not generate."""

    name = "endpoint_unhealthy"
    endpoint: str
    error: VllmError


class EndpointRecoveredEvent(Event, frozen=True, kw_only=True):
    """The health check saw an unhealthy endpoint generate."""

    name = "endpoint_recovered"
    endpoint: str


class RequestStartEvent(Event, frozen=True, kw_only=True):
    """A call begins."""

    name = "request_start"
    request_id: str
    path: str
    model: str | None


class RequestEndEvent(Event, frozen=True, kw_only=True):
    """A call has ended: answered, failed, or left by its caller."""

    name = "request_end"
    request_id: str
    endpoint: str
    """Id of the endpoint of the last attempt; ``""`` if there was none."""
    model: str | None
    duration: float
    """Seconds."""
    attempts: int
    error: VllmError | None = None
    cancelled: bool = False


class RetryEvent(Event, frozen=True, kw_only=True):
    """An attempt failed, and another will be made."""

    name = "retry"
    request_id: str
    endpoint: str
    """Id of the endpoint that failed."""
    error: VllmError
    pause: float
    """Seconds until the next attempt."""


class QueueFullEvent(Event, frozen=True, kw_only=True):
    """A call was turned away, because as many wait as may."""

    name = "queue_full"
    request_id: str
    error: VllmError


class StreamContinuedEvent(Event, frozen=True, kw_only=True):
    """A stream lost its server, and goes on at another."""

    name = "stream_continued"
    request_id: str
    from_endpoint: str
    to_endpoint: str
    tokens: int
    """How many had come by then."""
    error: VllmError


class _AdapterEvent(Event, frozen=True, kw_only=True):
    adapter: str
    """Its name in requests."""
    path: str
    endpoint: str
    """Id of the endpoint; of the client's first one, where several are one server."""


class AdapterLoadedEvent(_AdapterEvent, frozen=True, kw_only=True):
    """A LoRA adapter was loaded, and has generated a token."""

    name = "adapter_loaded"


class AdapterUnloadedEvent(_AdapterEvent, frozen=True, kw_only=True):
    """A LoRA adapter was unloaded by this client."""

    name = "adapter_unloaded"


class AdapterLostEvent(_AdapterEvent, frozen=True, kw_only=True):
    """A server that should have a LoRA adapter has it no more, or is gone for long."""

    name = "adapter_lost"
    error: VllmError | None = None
    """Why it could not be loaded again there, if that failed."""


EVENTS: dict[str, type[Event]] = {
    event.name: event
    for event in (
        CircuitOpenEvent,
        CircuitHalfOpenEvent,
        CircuitClosedEvent,
        EndpointUnhealthyEvent,
        EndpointRecoveredEvent,
        RequestStartEvent,
        RequestEndEvent,
        RetryEvent,
        QueueFullEvent,
        StreamContinuedEvent,
        AdapterLoadedEvent,
        AdapterUnloadedEvent,
        AdapterLostEvent,
    )
}

Handler = Callable[[Any], object]


class Events:
    """Handlers by the name of their event. They run at once, on the client's event loop: quickly,
    and without waiting. One that raises is logged, and harms nobody."""

    def __init__(self) -> None:
        self._handlers: dict[str, tuple[Handler, ...]] = {}
        self.wanted: Container[str] = self._handlers.keys()
        """The names that anybody listens to; other events need not be made."""

    def on(self, name: str, handler: Handler) -> None:
        """Call ``handler(event)`` for every event of this name.

        Raises:
            ConfigurationError: no such event, or nothing that can be called at once.
        """
        _check(name)
        _check_handler(name, handler)
        self._handlers[name] = (*self._handlers.get(name, ()), handler)

    def once(self, name: str, handler: Handler) -> None:
        """Call ``handler(event)`` for the next event of this name only.

        Raises:
            ConfigurationError: as :meth:`on`.
        """
        _check_handler(name, handler)

        def first(event: Event) -> None:
            self.off(name, first)
            handler(event)

        first.__wrapped__ = handler  # type: ignore[attr-defined]
        self.on(name, first)

    def off(self, name: str, handler: Handler | None = None) -> None:
        """Forget a handler, or all of this event."""
        _check(name)
        kept = tuple(
            known
            for known in self._handlers.get(name, ())
            if handler is not None and handler not in (known, getattr(known, "__wrapped__", None))
        )
        if kept:
            self._handlers[name] = kept
        else:
            self._handlers.pop(name, None)

    def emit(self, event: Event) -> None:
        """Tell everybody who listens."""
        for handler in self._handlers.get(event.name, ()):
            try:
                handler(event)
            except Exception:  # noqa: BLE001 - whatever it is, it is not ours
                _LOG.exception("a handler of %r raised", event.name)


def _check(name: str) -> None:
    if name not in EVENTS:
        raise ConfigurationError(
            f"there is no event {name!r}", hint=f"Events: {', '.join(EVENTS)}."
        )


def _check_handler(name: str, handler: object) -> None:
    call = getattr(handler, "__call__", None)  # noqa: B004 - it may be asynchronous
    if call is None or inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(call):
        raise ConfigurationError(
            f"the handler of {name!r} must be an ordinary function, not {handler!r}",
            hint="Start a task in it, or put the event into a queue, if there is more to do.",
        )
