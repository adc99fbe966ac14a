"""The endpoints and fleets of one client, and what they share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from vllm_unified.endpoints.config import EndpointConfig, endpoint_config
from vllm_unified.endpoints.endpoint import Endpoint, EndpointState
from vllm_unified.endpoints.stats import EndpointStats, Statistics, StatsCollector
from vllm_unified.errors import ClientClosedError, ConfigurationError
from vllm_unified.events import Events
from vllm_unified.fleet.fleet import AdapterHook, Fleet
from vllm_unified.fleet.monitor import Monitor, health_check
from vllm_unified.fleet.policies import strategy
from vllm_unified.settings import (
    Settings,
    check_keywords,
    check_metadata,
    server_address,
    snake_case,
)
from vllm_unified.wire.transport import Transport

EndpointInput = Endpoint | str | Mapping[str, Any]
"""An endpoint, an address, or what ``create_endpoint`` takes."""
FleetInput = Sequence[EndpointInput] | Mapping[str, EndpointInput]
"""Several of them, perhaps by name."""


class EndpointStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint at one moment."""

    id: str
    url: str
    state: EndpointState
    """Of its circuit breaker; ``draining`` when it is being removed."""
    in_flight: int
    capacity: int
    """How many requests may be in flight, as found out so far."""
    max_concurrent_requests: int
    """The most that the capacity may become."""
    waiting: int
    """Calls in the lines of the fleets that it belongs to."""
    weight: float
    latency: float | None
    """Mean seconds to the first token or the answer, of late."""
    models: tuple[str, ...] | None
    """What it serves, where it was asked."""
    server_running: float | None
    """The server's own count, everybody's, where it is known and fresh."""
    server_waiting: float | None
    error: str | None
    """Its last failure, until it succeeds again."""
    stats: EndpointStats


class Directory:
    """Every endpoint has an id. Those that were never created are made of their address on first
    use. Each can be used alone, and in any number of fleets."""

    def __init__(
        self,
        settings: Settings,
        resources: Mapping[str, Any] | None,
        make_transport: Callable[[Settings], Transport],
    ) -> None:
        """``resources`` may hold ``transport``, ``endpoints``, ``strategy``, ``health_check``.

        Raises:
            ConfigurationError: an unknown key, or a wrong value.
        """
        given = {snake_case(str(key)): value for key, value in (resources or {}).items()}
        transport: Transport | None = given.pop("transport", None)
        members: FleetInput | None = given.pop("endpoints", None)
        options: dict[str, Any] = {}
        for name in ("strategy", "health_check"):
            options[name] = given.pop(name, None)
        if given:
            raise ConfigurationError(
                f"resources has the unknown key {next(iter(given))!r}",
                hint="Known keys: transport, endpoints, strategy, health_check.",
            )
        self.settings = settings
        self.events = Events()
        self.stats = StatsCollector(now_unix=time.time())
        self._make_transport = make_transport
        self._transport = transport or make_transport(settings)
        self._transports = [self._transport]
        self._own_transports: dict[str, Transport] = {}
        """Of the endpoints that cannot share the client's, which are in the list above too."""
        self._endpoints: dict[str, Endpoint] = {}
        self._alone: dict[str, Fleet] = {}
        self._moved: dict[str, str] = {}
        """Ids of endpoints by the addresses that they moved to."""
        self._fleets: dict[Fleet, Mapping[str, Any]] = {}
        """With the settings that each has in place of the client's."""
        self._adapters: AdapterHook | None = None
        self._closed = False
        self._default = None if members is None else self.create_fleet(members, options)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All of them, in the order of their making."""
        return tuple(self._endpoints.values())

    def route(self, where: str | Endpoint | Fleet | None) -> Fleet:
        """The fleet, perhaps of one endpoint, that a call goes to; a string is an id or an address.

        Raises:
            ClientClosedError: the client is closed.
            ConfigurationError: not an address, or an endpoint of another client.
        """
        self._check_open()
        if where is None and self._default is not None:
            return self._default
        if isinstance(where, Fleet):
            return where
        if isinstance(where, str) and where in self._alone:
            return self._alone[where]
        if isinstance(where, Endpoint):
            self._check_own(where)
            return self._alone[where.id]
        url = self.settings.api_url if where is None else server_address(where)
        if url not in self._alone and self._moved.get(url) in self._alone:
            return self._alone[self._moved[url]]
        if url not in self._alone:
            config = EndpointConfig(settings=msgspec.structs.replace(self.settings, api_url=url))
            self._add(url, config)
        return self._alone[url]

    def create_endpoint(
        self,
        given: str | Mapping[str, Any] | None,
        keywords: Mapping[str, Any],
        shared: Mapping[str, Any] | None = None,
    ) -> Endpoint:
        """A new endpoint; see :func:`endpoint_config`. ``shared`` are a fleet's checked settings.

        Raises:
            ConfigurationError: the id is taken, or something in it is wrong.
        """
        self._check_open()
        config = endpoint_config(given, keywords, self.settings, shared)
        if config.id is not None and config.id in self._endpoints:
            raise ConfigurationError(f"there is an endpoint {config.id!r} already")
        return self._add(config.id or self._free_id(config.settings.api_url), config)

    def hold(self, url: str) -> None:
        """Let requests to the server at this address wait until :meth:`move`."""
        for endpoint in self._at(url):
            endpoint.hold()

    def move(self, url: str, new_url: str) -> None:
        """The server at ``url`` is at ``new_url`` from now on, which may be the same; both mean it.

        Endpoints keep their ids, and with them their statistics.
        """
        for endpoint in self._at(url):
            endpoint.move(new_url)
            self._moved[new_url] = endpoint.id

    def _at(self, url: str) -> list[Endpoint]:
        return [each for each in self._endpoints.values() if each.url == url]

    def _free_id(self, url: str) -> str:
        """``gpu1:8000``, or ``gpu1:8000#2`` if there is such an endpoint."""
        parts = urlsplit(url)
        name = parts.netloc + parts.path.rstrip("/")
        number = 1
        while (id := name if number == 1 else f"{name}#{number}") in self._endpoints:
            number += 1
        return id

    def _add(self, id: str, config: EndpointConfig) -> Endpoint:
        transport = self._transport
        if config.own_transport:
            transport = self._make_transport(config.settings)
            self._transports.append(transport)
            self._own_transports[id] = transport
        endpoint = self._endpoints[id] = Endpoint(id, config, transport, self.events)
        alone = Fleet([endpoint], config.settings, stats=self.stats, events=self.events)
        alone.adapters = self._adapters
        self._alone[id] = alone
        return endpoint

    def create_fleet(
        self,
        members: FleetInput,
        options: Mapping[str, Any],
        keywords: Mapping[str, Any] | None = None,
    ) -> Fleet:
        """A fleet of endpoints.

        Args:
            options: ``strategy``, ``health_check``, and settings in place of the client's, also for
                members that are made here; times in milliseconds or with their unit.
            keywords: The same, with times in seconds; they win.

        Raises:
            ConfigurationError: no members, or something in it is wrong.
        """
        self._check_open()
        given, extra = dict(options), dict(keywords or {})
        chosen = strategy(_last("strategy", given, extra) or "least_loaded")
        in_seconds = extra.get("health_check") is not None
        check = health_check(_last("health_check", given, extra), milliseconds=not in_seconds)
        shared = {**check_metadata(given, "a fleet"), **check_keywords(extra)}
        # The client's headers are sent as those of its endpoints, which may have others.
        settings = {"headers": {}, **shared}
        fleet = Fleet(
            self._members(members, shared),
            msgspec.structs.replace(self.settings, **settings),
            stats=self.stats,
            events=self.events,
            strategy=chosen,
            monitor=None if check is None else Monitor(check, self.events),
        )
        fleet.adapters = self._adapters
        self._fleets[fleet] = shared
        return fleet

    def hook(self, adapters: AdapterHook) -> None:
        """Who loads adapters for the requests of all fleets, from now on."""
        self._check_open()
        self._adapters = adapters
        for fleet in [*self._fleets, *self._alone.values()]:
            fleet.adapters = adapters

    def add_member(self, fleet: Fleet, given: EndpointInput) -> Endpoint:
        """Take an endpoint into a fleet, or a new one, which has the fleet's settings.

        Raises:
            ClientClosedError: the client or the fleet is closed.
            ConfigurationError: something in it is wrong.
        """
        self._check_open()
        if fleet not in self._fleets:
            raise ClientClosedError("this fleet is closed")
        endpoint = self.member(given, shared=self._fleets[fleet])
        fleet.add(endpoint)
        return endpoint

    async def close_fleet(self, fleet: Fleet) -> None:
        """End a fleet; its endpoints stay. May be called twice."""
        self._fleets.pop(fleet, None)
        await fleet.close()

    def _members(self, members: FleetInput, shared: Mapping[str, Any]) -> list[Endpoint]:
        if isinstance(members, str) or not isinstance(members, Sequence | Mapping) or not members:
            raise ConfigurationError(
                "endpoints must be several, not "
                + ("none" if members in ([], {}, ()) else type(members).__name__),
                hint='For example ["http://gpu1:8000", {"url": "http://gpu2:8000", "weight": 2}].',
            )
        named = members.items() if isinstance(members, Mapping) else ((None, m) for m in members)
        known = set(self._endpoints)
        try:
            return [self.member(each, id=id, shared=shared) for id, each in named]
        except ConfigurationError:
            for id in self._endpoints.keys() - known:
                del self._endpoints[id], self._alone[id]
            raise

    def member(
        self,
        given: EndpointInput,
        *,
        id: str | None = None,
        shared: Mapping[str, Any] | None = None,
    ) -> Endpoint:
        """An endpoint as it is, or a new one, for which ``shared`` are checked settings."""
        if isinstance(given, Endpoint):
            self.route(given)
            return given
        return self.create_endpoint(given, {"id": id}, shared)

    async def remove_endpoint(self, endpoint: Endpoint, *, timeout: float | None) -> bool:
        """Send nothing more there, and wait for what is in flight; whether all of it ended.

        ``timeout`` is in seconds; ``None``: as long as it takes.
        """
        self.route(endpoint)
        endpoint.drain()
        for fleet in self._fleets:
            fleet.remove(endpoint)
        drained = await _is_idle(endpoint, timeout)
        if self._endpoints.pop(endpoint.id, None) is not None:
            await self._alone.pop(endpoint.id).close()
            self.stats.forget(endpoint.id)
            transport = self._own_transports.pop(endpoint.id, None)
            if transport is not None and drained:  # otherwise what is in flight would be cut
                self._transports.remove(transport)
                await transport.close()
        return drained

    def status(self) -> list[EndpointStatus]:
        """How all endpoints do."""
        return [self._status(endpoint) for endpoint in self._endpoints.values()]

    def _status(self, endpoint: Endpoint) -> EndpointStatus:
        fleets = [self._alone[endpoint.id], *self._fleets]
        running, waiting = endpoint.server_running, endpoint.server_waiting
        return EndpointStatus(
            id=endpoint.id,
            url=endpoint.url,
            state=endpoint.state,
            in_flight=endpoint.in_flight,
            capacity=endpoint.capacity,
            max_concurrent_requests=endpoint.settings.max_concurrent_requests,
            waiting=sum(fleet.waiting for fleet in fleets if endpoint in fleet.endpoints),
            weight=endpoint.weight,
            latency=endpoint.latency,
            models=None if endpoint.models is None else tuple(endpoint.models),
            server_running=running if running == running else None,
            server_waiting=waiting if waiting == waiting else None,
            error=None if endpoint.error is None else _one_line(endpoint.error.message),
            stats=self.stats.endpoint(endpoint.id, endpoint.in_flight),
        )

    def get_stats(self, where: Endpoint | str | None) -> EndpointStats | Statistics:
        """What became of the requests to an endpoint, or of all."""
        in_flight = {each.id: each.in_flight for each in self._endpoints.values()}
        if where is None:
            return self.stats.snapshot(in_flight, time.time())
        id = self._id(where)
        return self.stats.endpoint(id, in_flight.get(id, 0))

    def reset_stats(self, where: Endpoint | str | None) -> None:
        """Start at zero, for an endpoint or for all."""
        id = None if where is None else self._id(where)
        self.stats.reset(id, now_unix=time.time())

    def _id(self, where: Endpoint | str) -> str:
        """The id of an endpoint, perhaps one that was never used."""
        if isinstance(where, Endpoint):
            self._check_own(where)
            return where.id
        if where in self._endpoints:
            return where
        address = server_address(where)
        return self._moved.get(address, address)

    def _check_own(self, endpoint: Endpoint) -> None:
        if self._endpoints.get(endpoint.id) is not endpoint:
            raise ConfigurationError(f"{endpoint!r} was removed, or belongs to another client")

    async def close(self) -> None:
        """End everything. May be called twice."""
        self._closed = True
        try:
            if self._adapters is not None:
                await self._adapters.close()
            for fleet in [*self._fleets, *self._alone.values()]:
                await fleet.close()
        finally:
            for transport in self._transports:
                await transport.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosedError("this client is closed")


def _last(name: str, options: dict[str, Any], keywords: dict[str, Any]) -> Any:
    """An option that may be given as a keyword, which wins; it is taken out of both."""
    spelled = [key for key in options if isinstance(key, str) and snake_case(key) == name]
    given = [options.pop(key) for key in spelled]
    given.append(keywords.pop(name, None))
    return next((value for value in reversed(given) if value is not None), None)


async def _is_idle(endpoint: Endpoint, timeout: float | None) -> bool:
    idle = asyncio.Event()

    def look(endpoint: Endpoint) -> None:
        if not endpoint.in_flight:
            idle.set()

    endpoint.watchers.append(look)
    try:
        look(endpoint)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await idle.wait()
        return idle.is_set()
    finally:
        endpoint.watchers.remove(look)


def _one_line(text: str) -> str:
    return " ".join(text.split())
