"""Which request fails, and how: a plan of faults, without any I/O."""

from __future__ import annotations

import random
from typing import Any, Literal, get_args

import msgspec

FaultKind = Literal[
    "refuse",
    "reset",
    "reset_after",
    "close_after",
    "stall",
    "stall_after",
    "error_frame",
    "error_500",
    "busy",
    "rate_limit",
    "wrong_length",
    "malformed_json",
    "html",
    "split_utf8",
    "byte_per_packet",
    "long_line",
    "stale_connection",
    "slow_reader",
    "hang",
    "die",
    "restart",
    "slow",
]
"""What can go wrong; ``docs/simulator.md`` says what each one does on the wire."""
KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fault and the requests it meets."""

    kind: FaultKind
    times: int | None = 1
    """How many requests it meets; ``None``: all."""
    probability: float = 1.0
    """Chance for each request that matches."""
    model: str | None = None
    """Only requests that name this model."""
    header: str | None = None
    """Only requests with this header: ``name`` or ``name: value``."""
    path: str = "/v1/"
    """Only requests whose path begins so; ``/v1/`` leaves probes alone."""
    after_tokens: int = 0
    """For faults inside an answer: tokens that are delivered before."""
    seconds: float | None = None
    """How long a stall, a hang, a refusal or a slowness lasts, in seconds; ``None``: until
    cleared. For ``rate_limit``: what Retry-After says (default 1). For ``restart``: time until
    it listens again (default 0)."""
    retry_after: Literal["seconds", "date"] = "seconds"
    """Form of the Retry-After header of ``rate_limit``."""
    status: int = 502
    """Status of the ``html`` page."""
    offset: int = 64
    """How much more than the truth ``wrong_length`` announces, in bytes; it may be negative."""
    size: int = 4 * 1024 * 1024
    """Length of ``long_line``, in bytes."""
    factor: float = 10.0
    """How much slower ``slow`` makes everything."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a request when its fault is chosen."""

    path: str
    headers: dict[str, str]
    model: str | None = None
    body_known: bool = True
    """Whether the body has arrived, and the model in it."""


class FaultPlan:
    """The faults in force; the first that matches a request meets it."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._armed: list[tuple[Fault, int | None]] = []

    def __repr__(self) -> str:
        return f"FaultPlan({[fault.kind for fault, _ in self._armed]})"

    @property
    def active(self) -> list[Fault]:
        """The faults in force, with the number of requests they still meet."""
        return [msgspec.structs.replace(fault, times=left) for fault, left in self._armed]

    def add(self, fault: Fault) -> None:
        """Put a fault in force.

        Raises:
            ValueError: if ``times`` is below 1, or the probability is not within 0 and 1.
        """
        if fault.times is not None and fault.times < 1:
            raise ValueError(f"times must be at least 1, got {fault.times}")
        if not 0.0 <= fault.probability <= 1.0:
            raise ValueError(f"probability must be within 0 and 1, got {fault.probability}")
        self._armed.append((fault, fault.times))

    def clear(self) -> None:
        """Put none in force."""
        self._armed.clear()

    def choose(self, facts: Facts) -> Fault | None:
        """The fault that meets this request, counted down; ``None`` for a healthy one."""
        for index, (fault, left) in enumerate(self._armed):
            if not _matches(fault, facts):
                continue
            if fault.probability < 1.0 and self._random.random() >= fault.probability:
                continue
            if left is None:
                return fault
            if left == 1:
                del self._armed[index]
            else:
                self._armed[index] = (fault, left - 1)
            return fault
        return None


def _matches(fault: Fault, facts: Facts) -> bool:
    if (fault.kind == "slow_reader") is facts.body_known:
        return False
    if not facts.path.startswith(fault.path):
        return False
    if fault.model is not None and fault.model != facts.model:
        return False
    if fault.header is None:
        return True
    name, colon, value = fault.header.partition(":")
    sent = facts.headers.get(name.strip().lower())
    return sent is not None and (not colon or sent.strip() == value.strip())


def parse_fault(text: str) -> Fault:
    """A fault from one word of a command line: ``kind`` or ``kind:name=value,name=value``.

    Without ``times`` such a fault stays in force.

    Raises:
        ValueError: for an unknown kind or option, or a value of the wrong type.
    """
    kind, _, options = text.partition(":")
    fields: dict[str, Any] = {"kind": kind, "times": None}
    for option in filter(None, options.split(",")):
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"{option!r} in fault {text!r} is not name=value")
        fields[name.strip()] = value.strip()
    try:
        return msgspec.convert(fields, Fault, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"fault {text!r}: {error}; kinds are {', '.join(KINDS)}") from None
