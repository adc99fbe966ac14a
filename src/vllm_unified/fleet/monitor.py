"""The health check of a fleet: what its servers say of themselves, and whether they generate."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterable, Mapping
from random import random

import msgspec

from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.endpoints.health import Health, check_health
from vllm_unified.endpoints.verdict import verdict_of
from vllm_unified.errors import (
    AuthenticationError,
    ConfigurationError,
    PermissionDeniedError,
    RequestTimeoutError,
    VllmError,
)
from vllm_unified.events import EndpointRecoveredEvent, EndpointUnhealthyEvent, Events
from vllm_unified.settings import check_keywords, check_metadata, snake_case
from vllm_unified.wire.requests import get_request
from vllm_unified.wire.responses import decode_models


class HealthCheck(msgspec.Struct, frozen=True, kw_only=True):
    """How often a fleet looks at its servers. Times are in seconds."""

    interval: float = 10.0
    """Between two proofs that a server generates, where its traffic gives none."""
    recovery_interval: float = 1.0
    """The same, while it is shut out."""
    load_interval: float = 1.0
    """Between two looks at its own gauges of running and waiting requests."""
    models_interval: float = 30.0
    """Between two looks at the models and adapters that it serves."""
    timeout: float = 5.0
    """For one look."""


def health_check(given: object, *, milliseconds: bool = True) -> HealthCheck | None:
    """From ``True``, ``False`` or a dict.

    Args:
        milliseconds: Whether that is the unit of the times in a dict, which may then have units of
            their own; seconds otherwise.

    Raises:
        ConfigurationError: anything else.
    """
    if given is None or given is False:
        return None
    if given is True:
        return HealthCheck()
    if isinstance(given, HealthCheck):
        return given
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"health_check must be True, False or a dict, not {given!r}")
    seconds = _from_milliseconds if milliseconds else _seconds
    return HealthCheck(**{_field(key): seconds(key, value) for key, value in given.items()})


def _field(key: object) -> str:
    name = snake_case(key) if isinstance(key, str) else ""
    if name not in HealthCheck.__struct_fields__:
        raise ConfigurationError(
            f"health_check has the unknown key {key!r}",
            hint=f"Known keys: {', '.join(HealthCheck.__struct_fields__)}.",
        )
    return name


def _seconds(key: str, value: object) -> float:
    try:
        checked: float = check_keywords({"timeout": value})["timeout"]
    except (ConfigurationError, KeyError):
        raise ConfigurationError(
            f"health_check: {key} must be a positive number of seconds, not {value!r}"
        ) from None
    return checked


def _from_milliseconds(key: str, value: object) -> float:
    try:
        checked: float = check_metadata({"timeout": value})["timeout"]
    except (ConfigurationError, KeyError):
        raise ConfigurationError(
            f"health_check: {key} must be a positive number of milliseconds, or a time such as "
            f'"10s", not {value!r}'
        ) from None
    return checked


_LOCKED = (AuthenticationError, PermissionDeniedError)


class Monitor:
    """Looks at the servers of one fleet, each in a task of its own, until it is closed.

    Traffic comes first: a server that answers is not asked, and one that answers others while a
    proof waits is overloaded, not dead.
    """

    def __init__(self, check: HealthCheck, events: Events) -> None:
        self._check = check
        self._events = events
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        """Those that were cancelled, and have not ended yet."""
        self._unhealthy: set[str] = set()

    def watch(self, endpoints: Iterable[Endpoint]) -> None:
        """Look at these servers, and no others, from now on. Needs a running event loop."""
        wanted = {endpoint.id: endpoint for endpoint in endpoints}
        for gone in self._tasks.keys() - wanted.keys():
            self._end(self._tasks.pop(gone))
            self._unhealthy.discard(gone)
        for id, endpoint in wanted.items():
            if id not in self._tasks:
                self._tasks[id] = asyncio.create_task(self._look(endpoint), name=f"health of {id}")

    async def check(self, endpoint: Endpoint) -> Health:
        """Look at one server now, whatever is known of it."""
        health = await self._prove(endpoint)
        if not endpoint.breaker.shut:
            await asyncio.gather(self._ask_models(endpoint), self._ask_load(endpoint))
        return health

    async def close(self) -> None:
        """End all tasks."""
        while self._tasks:
            self._end(self._tasks.popitem()[1])
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _end(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _look(self, endpoint: Endpoint) -> None:
        proof = models = -float("inf")
        while True:
            now = time.monotonic()
            shut = endpoint.breaker.shut
            pause = self._check.recovery_interval if shut else self._check.interval
            if now - max(proof, endpoint.succeeded_at) >= pause or (shut and now - proof >= pause):
                proof = now
                await self._prove(endpoint)
            if not endpoint.breaker.shut:
                if now - models >= self._check.models_interval:
                    models = now
                    await self._ask_models(endpoint)
                await self._ask_load(endpoint)
            else:
                models = -float("inf")  # it may come back with others
                endpoint.forget_load()
            # Not all at once, of many clients and many servers.
            await asyncio.sleep(min(self._check.load_interval, pause) * (0.75 + 0.5 * random()))

    async def _prove(self, endpoint: Endpoint) -> Health:
        began = time.monotonic()
        model = next(iter(endpoint.models or ()), None)
        health = await check_health(endpoint, probe=True, timeout=self._check.timeout, model=model)
        if health.error is None or verdict_of(health.error) == "overloaded":
            self._is_well(endpoint)
        elif not self._is_excused(endpoint, health.error, began):
            self._is_dead(endpoint, health.error)
        return health

    def _is_excused(self, endpoint: Endpoint, error: VllmError, began: float) -> bool:
        """Whether its silence means a full queue, or its refusal a wrong question."""
        if isinstance(error, RequestTimeoutError):
            return endpoint.succeeded_at > began
        return verdict_of(error) != "failed" and not isinstance(error, _LOCKED)

    def _is_well(self, endpoint: Endpoint) -> None:
        endpoint.succeeded_at = time.monotonic()
        endpoint.recover()
        if endpoint.id in self._unhealthy:
            self._unhealthy.discard(endpoint.id)
            if "endpoint_recovered" in self._events.wanted:
                self._events.emit(EndpointRecoveredEvent(endpoint=endpoint.id))

    def _is_dead(self, endpoint: Endpoint, error: VllmError) -> None:
        endpoint.shut_out(error)
        if endpoint.id not in self._unhealthy:
            self._unhealthy.add(endpoint.id)
            if "endpoint_unhealthy" in self._events.wanted:
                self._events.emit(EndpointUnhealthyEvent(endpoint=endpoint.id, error=error))

    async def _ask_models(self, endpoint: Endpoint) -> None:
        with contextlib.suppress(VllmError, TimeoutError):
            async with asyncio.timeout(self._check.timeout):
                call = Call(get_request("/v1/models"), endpoint.settings)
                call.begin_attempt(endpoint, time.monotonic())
                endpoint.serve(await endpoint.exchange(call, lambda body, _: decode_models(body)))

    async def _ask_load(self, endpoint: Endpoint) -> None:
        load = None
        with contextlib.suppress(VllmError, TimeoutError):
            async with asyncio.timeout(self._check.timeout):
                call = Call(get_request("/metrics"), endpoint.settings)
                call.begin_attempt(endpoint, time.monotonic())
                load = await endpoint.exchange(call, lambda body, _: server_load(body))
        if load is None:
            endpoint.forget_load()
        else:
            endpoint.polled(running=load[0], waiting=load[1])


_GAUGE = re.compile(
    rb"^vllm:num_requests_(running|waiting)(?:\{[^}\n]*\})? ([0-9.eE+-]+)", re.MULTILINE
)


def server_load(exposition: bytes) -> tuple[float, float] | None:
    """Requests that run and that wait, over all engines of a server; ``None`` without the gauges.

    Two lines of a text of thousands, asked for every second: a whole parser would take longer than
    the server takes to answer.
    """
    sums = {b"running": 0.0, b"waiting": 0.0}
    found = set()
    for name, value in _GAUGE.findall(exposition):
        with contextlib.suppress(ValueError):
            sums[name] += float(value)
            found.add(name)
    return (sums[b"running"], sums[b"waiting"]) if len(found) == len(sums) else None
