"""Which endpoint of a fleet a call may go to, and goes to."""

from __future__ import annotations

import sys
from random import random

from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.endpoint import Endpoint, Slot
from vllm_unified.errors import (
    CircuitOpenError,
    ClientClosedError,
    ConfigurationError,
    VllmError,
)
from vllm_unified.fleet.policies import LeastLoaded, Route, Strategy
from vllm_unified.wire.requests import WireRequest

# With every server shut out, one attempt at each in so many seconds.
_TRIAL_SECONDS = 0.25
_NOWHERE: frozenset[str] = frozenset()


class Router:
    """The members of a fleet, and the choice among them. Times are monotonic seconds."""

    def __init__(self, strategy: Strategy | None) -> None:
        self.endpoints: list[Endpoint] = []
        self.closed = False
        self._strategy = strategy or LeastLoaded()
        self._enough: int = getattr(self._strategy, "enough", None) or sys.maxsize
        self._next_trial: dict[str, float] = {}

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the members' capacity decides who may send."""
        return all(each.is_plain for each in self.endpoints)

    def add(self, endpoint: Endpoint) -> None:
        """Take a member in."""
        self.endpoints.append(endpoint)

    def remove(self, endpoint: Endpoint) -> None:
        """Choose it no more."""
        self.endpoints.remove(endpoint)
        self._strategy.forget(endpoint.id)
        self._next_trial.pop(endpoint.id, None)

    def free(self, request: WireRequest, now: float) -> list[Endpoint]:
        """The endpoints that can take this request now; none: it has to wait.

        Raises:
            CircuitOpenError: all of them are shut out, and no trial is due.
            ConfigurationError: there is none.
        """
        free = self._plainly_free(request.model)
        if free is not None:
            return free
        serving = self._serving(request.model, now)
        if not serving:
            raise self._nobody()
        available = [each for each in serving if each.is_open(now)]
        if not available:
            return [self._least_bad(serving, now)]
        return [each for each in available if each.has_room(now, request.tokens)]

    def _plainly_free(self, model: str | None) -> list[Endpoint] | None:
        """What :meth:`free` gives where all members are well and serve the model, as they mostly
        do, or as many as are enough for the strategy; ``None`` where it takes more to know."""
        endpoints, enough = self.endpoints, self._enough
        count = len(endpoints)
        first = int(random() * count) if count > enough else 0
        free = []
        for place in range(first - count, first):
            each = endpoints[place]
            if not each.is_plain:
                return None
            if model is not None and each.models is not None and model not in each.models:
                return None
            if each.in_flight < each.limit.capacity:
                free.append(each)
                if len(free) == enough:
                    break
        return free if endpoints else None

    def take(self, call: Call, free: list[Endpoint], now: float) -> Slot:
        """A slot at one of these, as the strategy chooses, for the call's next attempt."""
        return Slot(self._choose(call, free, now), now, tokens=call.request.tokens)

    def take_elsewhere(self, call: Call, now: float) -> Slot | None:
        """A slot where the call is not and was not, if there is one now."""
        others = [
            each
            for each in self._elsewhere(call, now)
            if each is not call.endpoint and each.has_room(now, call.request.tokens)
        ]
        return self.take(call, others, now) if others else None

    def is_elsewhere(self, call: Call, now: float) -> bool:
        """Whether there is an endpoint where this call has not failed."""
        return len(self.endpoints) > 1 and bool(self._elsewhere(call, now))

    def _elsewhere(self, call: Call, now: float) -> list[Endpoint]:
        return [
            each
            for each in self._serving(call.request.model, now)
            if each.id not in call.tried and each.is_open(now)
        ]

    def _choose(self, call: Call, free: list[Endpoint], now: float) -> Endpoint:
        if len(self.endpoints) == 1:
            return free[0]
        if call.tried:
            free = [each for each in free if each.id not in call.tried] or free
        request = call.request
        route = Route(
            model=request.model,
            session=request.session,
            body=request.body or b"",
            tried=frozenset(call.tried) if call.tried else _NOWHERE,
        )
        return self._strategy.choose(free, route, now, random)  # type: ignore[return-value]

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
