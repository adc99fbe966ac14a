"""Strategies by name: which server of a fleet gets a request. Pure.

A strategy sees servers as candidates, and has the state that it needs to choose among them; it
belongs to one client. Load is compared per weight, and ties are broken at random: many clients
that start at once do not all begin with the same server.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from vllm_unified.errors import ConfigurationError
from vllm_unified.fleet.affinity import PrefixAware, Session
from vllm_unified.fleet.candidates import C, Candidate, Random, Room, Route, Stateless, Strategy
from vllm_unified.fleet.load import LeastLoaded, LowestLatency, PowerOfTwo
from vllm_unified.fleet.turns import RoundRobin, Weighted

ChooseFunction = Callable[[Sequence[Candidate], Route], Candidate]
"""A user's own strategy: one of the candidates, for a request."""


class _Custom(Stateless):
    def __init__(self, function: ChooseFunction) -> None:
        self._function = function
        self._name = getattr(function, "__qualname__", None) or repr(function)

    def choose(
        self, members: Sequence[C], room: Room[C], route: Route, now: float, random: Random
    ) -> C | None:
        """What the function says; it sees all members that have room.

        Raises:
            ConfigurationError: it raised, or returned none of the candidates.
        """
        candidates = room.among(members)
        if not candidates:
            return None
        try:
            chosen = self._function(candidates, route)
        except Exception as error:
            raise ConfigurationError(
                f"the routing function {self._name} raised {type(error).__name__}: {error}"
            ) from error
        for candidate in candidates:
            if chosen is candidate:
                return candidate
        raise ConfigurationError(
            f"the routing function {self._name} returned {chosen!r:.80}, which is none of the "
            "candidates",
            hint="It must return one of the objects in its first argument.",
        )


STRATEGIES: Mapping[str, Callable[[], Strategy]] = MappingProxyType(
    {
        "round_robin": RoundRobin,
        "weighted": Weighted,
        "least_loaded": LeastLoaded,
        "power_of_two": PowerOfTwo,
        "prefix_aware": PrefixAware,
        "session": Session,
        "latency": LowestLatency,
    }
)
"""The strategies by name; calling one makes it, without any state."""


def strategy(spec: str | ChooseFunction) -> Strategy:
    """A new strategy, of that name or around a function ``(candidates, route) -> candidate``.

    Raises:
        ConfigurationError: there is no strategy of that name, or the function is asynchronous.
    """
    if isinstance(spec, str):
        make = STRATEGIES.get(spec)
        if make is not None:
            return make()
        raise ConfigurationError(
            f"there is no routing strategy {spec!r}",
            hint=f"There are {', '.join(STRATEGIES)}; or give a function of your own.",
        )
    if not callable(spec):
        raise ConfigurationError(
            f"a routing strategy is a name or a function, not {spec!r:.80}",
            hint=f"The names are {', '.join(STRATEGIES)}.",
        )
    if inspect.iscoroutinefunction(spec):
        raise ConfigurationError(
            "the routing function must not be async: it is called between two steps of a request"
        )
    return _Custom(spec)
