"""Which endpoint of a fleet a call may go to, and goes to."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from random import random

from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.endpoint import Endpoint, Slot
from vllm_unified.errors import (
    CircuitOpenError,
    ClientClosedError,
    ConfigurationError,
    VllmError,
)
from vllm_unified.fleet.candidates import Room, Route, Strategy
from vllm_unified.fleet.load import LeastLoaded
from vllm_unified.wire.requests import WireRequest

# With every server shut out, one attempt at each in so many seconds.
_TRIAL_SECONDS = 0.25
_NOWHERE: frozenset[str] = frozenset()


class Router:
    """The members of a fleet, and the choice among them. Times are monotonic seconds."""

    def __init__(self, strategy: Strategy | None) -> None:
        self.endpoints: tuple[Endpoint, ...] = ()
        self.closed = False
        self._strategy = strategy or LeastLoaded()
        self._next_trial: dict[str, float] = {}

    def add(self, endpoint: Endpoint) -> None:
        """Take a member in."""
        self.endpoints = (*self.endpoints, endpoint)

    def remove(self, endpoint: Endpoint) -> None:
        """Choose it no more."""
        self.endpoints = tuple([each for each in self.endpoints if each is not endpoint])
        self._strategy.forget(endpoint.id)
        self._next_trial.pop(endpoint.id, None)

    def take(self, call: Call, now: float, at: Endpoint | None = None) -> Slot | None:
        """A slot for the call's next attempt, as the strategy chooses; ``None``: it has to wait.

        Args:
            at: Who alone has room, if it has; to be found sooner.

        Raises:
            CircuitOpenError: all endpoints are shut out, and no trial is due.
            ConfigurationError: there is none.
        """
        chosen, request = None, call.request
        room: Room[Endpoint] = _Room(request, now)
        if at is not None and room.at(at):
            room = _RoomAt([at])
        elif call.tried:
            chosen = self._choose(call, _Room(request, now, without=call.tried), now)
        if chosen is None:
            chosen = self._choose(call, room, now) or self._last_resort(call, now)
        return None if chosen is None else Slot(chosen, now, tokens=request.tokens)

    def take_elsewhere(self, call: Call, now: float) -> Slot | None:
        """A slot where the call is not and was not, if there is one now."""
        tokens = call.request.tokens
        others = [
            each
            for each in self._elsewhere(call, now)
            if each is not call.endpoint and each.has_room(now, tokens)
        ]
        chosen = self._choose(call, _RoomAt(others), now) if others else None
        return None if chosen is None else Slot(chosen, now, tokens=tokens)

    def is_elsewhere(self, call: Call, now: float) -> bool:
        """Whether there is an endpoint where this call has not failed."""
        return len(self.endpoints) > 1 and bool(self._elsewhere(call, now))

    def _elsewhere(self, call: Call, now: float) -> list[Endpoint]:
        return [
            each
            for each in self._serving(call.request.model, now)
            if each.id not in call.tried and each.is_open(now)
        ]

    def _choose(self, call: Call, room: Room[Endpoint], now: float) -> Endpoint | None:
        members = self.endpoints
        if len(members) == 1:
            return members[0] if room.at(members[0]) else None
        if not members:
            return None
        request = call.request
        route = Route(
            model=request.model,
            session=request.session,
            body=request.body or b"",
            tried=frozenset(call.tried) if call.tried else _NOWHERE,
        )
        return self._strategy.choose(members, room, route, now, random)

    def _last_resort(self, call: Call, now: float) -> Endpoint | None:
        """An endpoint in spite of all that is known of them, where it makes no sense to wait."""
        model, tokens = call.request.model, call.request.tokens
        if any(each.serves(model, now) and each.is_open(now) for each in self.endpoints):
            return None
        serving = self._serving(model, now)
        if not serving:
            raise self._nobody()
        # Open ones are here only if the model is known nowhere.
        available = [each for each in serving if each.is_open(now)]
        if not available:
            return self._least_bad(serving, now)
        roomy = [each for each in available if each.has_room(now, tokens)]
        return self._choose(call, _RoomAt(roomy), now) if roomy else None

    def _serving(self, model: str | None, now: float) -> list[Endpoint]:
        """Where the model may be asked for; everywhere, if it is known nowhere: the servers' own
        answer is better than a guess."""
        members = [each for each in self.endpoints if not each.draining]
        return [each for each in members if each.serves(model, now)] or members

    def _least_bad(self, serving: list[Endpoint], now: float) -> Endpoint:
        """Of endpoints that are all shut out, the one that was left alone longest."""
        roomy = [each for each in serving if each.has_room(now)]
        first = min(roomy or serving, key=lambda each: self._next_trial.get(each.id, 0.0))
        due = self._next_trial.get(first.id, 0.0)
        if due <= now and roomy:
            # With some chance in it, so that many clients do not keep step.
            self._next_trial[first.id] = now + _TRIAL_SECONDS * (0.5 + random())
            return first
        last = max(serving, key=lambda each: each.failed_at)
        servers = "the server is" if len(serving) == 1 else f"all {len(serving)} servers are"
        reason = "" if last.error is None else f"; the last one: {last.error.message}"
        error = CircuitOpenError(f"{servers} shut out after failures{reason}")
        error.retry_after = max(due - now, 0.0)
        error.__cause__ = last.error
        raise error

    def _nobody(self) -> VllmError:
        if self.closed:
            return ClientClosedError("this client, or this fleet of it, is closed")
        return ConfigurationError("there is no endpoint, or all of them are draining")


class _Room:
    """Where a request can go now, for all that is known; of most endpoints nothing has to be asked
    but their models and capacity."""

    __slots__ = ("_model", "_now", "_tokens", "_without")

    def __init__(self, request: WireRequest, now: float, *, without: Container[str] = ()) -> None:
        self._model = request.model
        self._tokens = request.tokens
        self._now = now
        self._without = without

    def at(self, endpoint: Endpoint) -> bool:
        if not endpoint.is_plain or self._without:
            return self._at_special(endpoint)
        models, model = endpoint.models, self._model
        return endpoint.in_flight < endpoint.limit.capacity and (
            models is None or model is None or model in models
        )

    def among(self, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        if self._without:
            return [*filter(self._at_special, endpoints)]
        model = self._model
        # The same as in ``at``, which takes twice as long for many.
        return [
            each
            for each in endpoints
            if (
                each.in_flight < each.limit.capacity
                and (each.models is None or model is None or model in each.models)
                if each.is_plain
                else self._at_special(each)
            )
        ]

    def _at_special(self, endpoint: Endpoint) -> bool:
        return (
            endpoint.id not in self._without
            and endpoint.serves(self._model, self._now)
            and endpoint.is_open(self._now)
            and endpoint.has_room(self._now, self._tokens)
        )


class _RoomAt:
    """Endpoints that were found to have room."""

    __slots__ = ("_endpoints",)

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self._endpoints = dict.fromkeys(endpoints)
        """In their order."""

    def at(self, endpoint: Endpoint) -> bool:
        return endpoint in self._endpoints

    def among(self, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        return [each for each in self._endpoints if each in endpoints]
