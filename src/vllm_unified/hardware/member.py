"""A backend that is registered, and how it does."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import msgspec

from vllm_unified.endpoints.breaker import BreakerConfig, CircuitBreaker
from vllm_unified.errors import RequestTimeoutError, VllmError
from vllm_unified.hardware.backend import (
    Backend,
    Batching,
    Capabilities,
    Checked,
    Described,
    Streaming,
)
from vllm_unified.hardware.failures import as_failure, meaning_of
from vllm_unified.hardware.selection import BackendFacts
from vllm_unified.hardware.statistics import BackendStatistics, Tally

_FRESH_SECONDS = 30.0
_ASK_SECONDS = 20.0
_PROBE_SECONDS = 60.0
_BUSY_SECONDS = 1.0
_DEFAULT_APPETITE = 16


class BackendStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a registered backend does."""

    name: str
    tasks: dict[str, int]
    """The tasks that it is registered for, with its priority in each."""
    state: str
    """Of its breaker: ``closed`` is well, ``open`` is shut out, ``half_open`` is being tried."""
    trouble: str | None
    """What it failed with last, while it is not ``closed``."""
    capabilities: Capabilities
    streams: bool
    batches: bool
    statistics: BackendStatistics


class Member:
    """One backend of a layer, whatever tasks it is registered for. Belongs to one event loop."""

    def __init__(
        self, name: str, value: object, backend: Backend, order: int, breaker: BreakerConfig
    ) -> None:
        self.name = name
        self.value = value
        """As its user registered it."""
        self.backend = backend
        self.order = order
        self.tasks: dict[str, int] = {}
        self.breaker = CircuitBreaker(breaker)
        self.tally = Tally()
        self.capabilities = Capabilities()
        self.trouble: str | None = None
        self._busy_until = 0.0
        self._asked_at: float | None = None
        self._asking: asyncio.Task[None] | None = None
        self._probe: asyncio.Task[None] | None = None

    @property
    def streaming(self) -> Streaming | None:
        """The backend, if it streams."""
        return cast("Streaming", self.backend) if hasattr(self.backend, "stream") else None

    @property
    def batching(self) -> Batching | None:
        """The backend, if it has a way of its own for many requests."""
        return cast("Batching", self.backend) if hasattr(self.backend, "batch") else None

    @property
    def _checked(self) -> Checked | None:
        return cast("Checked", self.backend) if hasattr(self.backend, "health") else None

    @property
    def appetite(self) -> int:
        """How many requests at once keep it busy."""
        return int(getattr(self.backend, "appetite", _DEFAULT_APPETITE))

    def facts(self, task: str, now: float, *, failed: bool) -> BackendFacts:
        """What a choice is made from."""
        state = self.breaker.state
        # A backend that can be looked at is let in by that, and not by a request's misfortune.
        if self._checked is None and self.breaker.allows(now):
            state = "closed"
        return BackendFacts(
            name=self.name,
            priority=self.tasks[task],
            order=self.order,
            capabilities=self.capabilities,
            state=state,
            trouble=self.trouble,
            is_busy=now < self._busy_until,
            streams=self.streaming is not None,
            failed=failed,
        )

    def status(self) -> BackendStatus:
        """How it does."""
        return BackendStatus(
            name=self.name,
            tasks=dict(self.tasks),
            state=self.breaker.state,
            trouble=self.trouble if self.breaker.shut else None,
            capabilities=self.capabilities,
            streams=self.streaming is not None,
            batches=self.batching is not None,
            statistics=self.tally.snapshot(),
        )

    def prepare(self) -> asyncio.Task[None] | None:
        """Ask now and then what it can do, and look whether it is back, if it is shut out and its
        time has come. What has to be waited for, before it is known for the first time."""
        now = time.monotonic()
        if self.breaker.shut:
            if self._checked and now >= self.breaker.ready_at and _is_over(self._probe):
                self._probe = asyncio.create_task(self._look(self._checked))
        elif _is_over(self._asking) and (
            self._asked_at is None or now > self._asked_at + _FRESH_SECONDS
        ):
            self._asking = asyncio.create_task(self._ask())
        return self._asking if self._asked_at is None else None

    async def _ask(self) -> None:
        if not hasattr(self.backend, "capabilities"):
            self._asked_at = time.monotonic()
            return
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                self.capabilities = await cast("Described", self.backend).capabilities()
        except Exception as error:  # noqa: BLE001 - of a foreign backend it may be any
            self._found_dead(error)
        finally:
            self._asked_at = time.monotonic()

    async def _look(self, backend: Checked) -> None:
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                found = await backend.health()
        except Exception as error:  # noqa: BLE001 - of a foreign backend it may be any
            self._found_dead(error)
            return
        if found:
            self.breaker.reset()
            self._asked_at = None  # it may be another server, with other models
        else:
            self._found_dead(getattr(found, "error", None))

    def _found_dead(self, error: Exception | None) -> None:
        if isinstance(error, TimeoutError) and not isinstance(error, VllmError):
            error = RequestTimeoutError("it did not say how it does in time")
        if error is not None:
            self.trouble = _words(as_failure(error, self.name))
        self.breaker.trip(time.monotonic())

    def begin(self) -> Use:
        """A request goes there."""
        return Use(self)

    def note(self, error: VllmError, token: int) -> None:
        """A request of this token failed there."""
        now = time.monotonic()
        meaning = meaning_of(error)
        if meaning == "failed":
            self.trouble = _words(error)
            self.breaker.fail(token, now)
        elif meaning == "overloaded":
            self._busy_until = now + (error.retry_after or _BUSY_SECONDS)
            self.breaker.forget(token)
        else:
            self.breaker.succeed(token)

    def stop(self) -> list[asyncio.Task[None]]:
        """Look no more; what ends now."""
        tasks = [task for task in (self._asking, self._probe) if task is not None]
        for task in tasks:
            task.cancel()
        return tasks

    def __repr__(self) -> str:
        return f"<backend {self.name} for {', '.join(self.tasks)}: {self.breaker.state}>"


class Use:
    """One request at one backend. It ends once, however it ends."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.started = time.monotonic()
        self.started_at = time.time()
        self._token = member.breaker.begin()
        self._held = True
        member.tally.in_flight += 1

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.started

    def succeed(self, *, taken_over: bool) -> None:
        """It was answered."""
        if self._end():
            self.member.breaker.succeed(self._token)
            self.member.tally.succeeded(self.elapsed, taken_over=taken_over)

    def fail(self, error: VllmError) -> None:
        """It was not."""
        if self._end():
            self.member.note(error, self._token)
            self.member.tally.failed(error)

    def leave(self) -> None:
        """The caller left."""
        if self._end():
            self.member.breaker.forget(self._token)
            self.member.tally.cancelled += 1

    def _end(self) -> bool:
        held, self._held = self._held, False
        if held:
            self.member.tally.in_flight -= 1
        return held


def _is_over(task: asyncio.Task[Any] | None) -> bool:
    return task is None or task.done()


def _words(error: VllmError) -> str:
    return f"{type(error).__name__}: {error.message}"
