"""Servers used as one: which of them gets a request, what waits, and what is tried again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from random import random
from typing import Any, Protocol, TypeVar

from vllm_unified.deadlines import Deadlines
from vllm_unified.endpoints.budget import RetryBudget
from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.endpoint import Endpoint, Slot, attempt_clock
from vllm_unified.endpoints.retry import RetryPolicy, pause_before_retry
from vllm_unified.endpoints.stats import NO_ENDPOINT, StatsCell, StatsCollector
from vllm_unified.errors import (
    AuthenticationError,
    ClientClosedError,
    ModelNotFoundError,
    PermissionDeniedError,
    QueueFullError,
    RequestTimeoutError,
    VllmError,
)
from vllm_unified.events import (
    Events,
    QueueFullEvent,
    RequestEndEvent,
    RequestStartEvent,
    RetryEvent,
    StreamContinuedEvent,
)
from vllm_unified.fleet.candidates import Strategy
from vllm_unified.fleet.hedge import first_answer
from vllm_unified.fleet.line import Line
from vllm_unified.fleet.monitor import Monitor
from vllm_unified.fleet.router import Router
from vllm_unified.results import ContinuationNote, ResultMetadata, Usage
from vllm_unified.settings import Settings
from vllm_unified.wire.requests import WireRequest

T = TypeVar("T")
Decode = Callable[[bytes, ResultMetadata], T]
"""Makes a typed result of an answer's body."""

# What another endpoint, with another key, may well answer.
_NOT_HERE = (ModelNotFoundError, AuthenticationError, PermissionDeniedError)
# A deadline cancels what it interrupts; the clock may read a little less than it.
_CLOCK_STEP = 0.002


class AdapterHook(Protocol):
    """Who loads LoRA adapters for the requests that need them."""

    async def prepare(self, fleet: Fleet, call: Call) -> None:
        """Before each attempt: have the adapter that it names on one of the servers."""

    async def missed(self, fleet: Fleet, call: Call, endpoint: Endpoint) -> bool:
        """The server does not know the adapter; whether another attempt will do."""

    def ended(self, call: Call) -> None:
        """The call has ended."""

    async def close(self) -> None:
        """Load nothing more."""


class Fleet:
    """One endpoint or many, and the one way to them.

    Every request takes a slot at an endpoint for each of its attempts, in line if there is none.
    The line is the fleet's, not an endpoint's: whichever has room first gets the next in turn.
    Belongs to one event loop.
    """

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        settings: Settings,
        *,
        stats: StatsCollector,
        events: Events,
        strategy: Strategy | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self.settings = settings
        self.budget = RetryBudget()
        self.deadlines = Deadlines()
        self.adapters: AdapterHook | None = None
        """Set where the client has LoRA adapters."""
        self._router = Router(strategy)
        self._line = Line(self._router, queue_size=settings.queue_size)
        self._monitor = monitor
        self._is_watched = False
        self._stats = stats
        self._events = events
        self._uncounted = StatsCell()
        for endpoint in endpoints:
            self.add(endpoint)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The members."""
        return self._router.endpoints

    @property
    def waiting(self) -> int:
        """Calls in line."""
        return len(self._line)

    @property
    def capacity(self) -> int:
        """How many calls it lets through at a time."""
        endpoints = self._router.endpoints
        if len(endpoints) == 1:
            return endpoints[0].limit.capacity
        return sum([each.limit.capacity for each in endpoints])

    @property
    def appetite(self) -> int:
        """How many calls keep it busy: as many as it lets through, and a few in line, so that no
        slot is free for long. More would only wait, and their time with them."""
        capacity = self.capacity
        return capacity + max(1, capacity // 8)

    def widen(self, calls: int | None) -> None:
        """So many calls come, and nobody waits for a single one; ``None``: any number. Servers of
        which nothing is known yet get their share of them at once."""
        endpoints = self._router.endpoints
        for each in endpoints:
            each.limit.widen(each.limit.ceiling if calls is None else -(-calls // len(endpoints)))

    def add(self, endpoint: Endpoint) -> None:
        """Take a member in; who waits may go there at once.

        Raises:
            ClientClosedError: the fleet is closed.
        """
        if self._router.closed:
            raise ClientClosedError("this fleet is closed")
        if endpoint not in self._router.endpoints:
            self._router.add(endpoint)
            endpoint.watchers.append(self._line.serve)
            self._members_changed()

    def remove(self, endpoint: Endpoint) -> None:
        """Send nothing more there. What is there goes on."""
        if endpoint in self._router.endpoints:
            self._router.remove(endpoint)
            endpoint.watchers.remove(self._line.serve)
            self._members_changed()

    def _members_changed(self) -> None:
        if self._monitor is not None and self._is_watched:
            self._monitor.watch(self._router.endpoints)
        self._line.serve()

    async def close(self) -> None:
        """Turn everybody in line away, and end the health check. May be called twice."""
        self._router.closed = True
        for endpoint in self.endpoints:
            self.remove(endpoint)
        self._line.cancel_alarm()
        if self._monitor is not None:
            await self._monitor.close()

    async def send(self, request: WireRequest, settings: Settings, decode: Decode[T]) -> T:
        """Send a request, and decode its answer.

        ``settings.timeout`` covers everything: the line, every attempt and the pauses between.

        Raises:
            VllmError: with its attempts; nothing but this tree.
        """
        call = Call(request, settings)
        self.begin(call)
        once = partial(self._exchange, call, decode)
        if settings.hedge_after is not None and request.generates:
            once = partial(self._hedged, call, decode, settings.hedge_after)
        try:
            with self.deadlines.within(settings.timeout):
                result = await self.attempt(call, once, settings.timeout)
        except VllmError as error:
            raise self.failed(call, error) from error.__cause__
        except TimeoutError:
            raise self.failed(call, self.out_of_time(call, settings.timeout)) from None
        except asyncio.CancelledError:
            self.ended(call, cancelled=True)
            raise
        self.ended(call, usage=getattr(result, "usage", None))
        return result

    async def attempt(self, call: Call, once: Callable[[Slot], Awaitable[T]], timeout: float) -> T:
        """Try until an attempt succeeds or another one makes no sense.

        Args:
            once: One attempt, at the endpoint of the slot; it ends the slot if it succeeds.
            timeout: Seconds that the whole call has, from its beginning.
        """
        failed = 0
        while True:
            slot: Slot | None = None
            try:
                if self.adapters is not None:
                    await self.adapters.prepare(self, call)
                slot = self._line.take(call) or await self._line.wait(call)
                call.begin_attempt(slot.endpoint, slot.since)
                self.cell(call).attempt(retry=failed > 0)
                if call.settings.attempt_timeout is None:
                    return await once(slot)
                async with attempt_clock(call.settings.attempt_timeout):
                    return await once(slot)
            except VllmError as error:
                if slot is not None:
                    self.attempt_failed(call, slot, error)
                    if await self._was_missed(call, error, slot.endpoint):
                        self._tell_retry(call, error, 0.0)
                        continue
                failed += 1
                pause = self._pause(call, error, slot, failed, timeout)
                if pause is None:
                    raise
            except asyncio.CancelledError:
                self._attempt_left(call, slot, timeout)
                raise
            except BaseException:
                if slot is not None:
                    slot.leave()
                raise
            await asyncio.sleep(pause)

    async def _was_missed(self, call: Call, error: VllmError, endpoint: Endpoint) -> bool:
        """Whether it failed for a LoRA adapter that the server should have, and has now."""
        if self.adapters is None or not isinstance(error, ModelNotFoundError):
            return False
        return await self.adapters.missed(self, call, endpoint)

    def attempt_failed(self, call: Call, slot: Slot, error: VllmError) -> None:
        """Say so to all whom it concerns, once: the endpoint, the call, the statistics."""
        if not slot.held:
            return
        self.cell(call).failed_attempt(type(error).__name__)
        call.end_attempt(error)
        slot.fail(error, time.monotonic())

    def cell(self, call: Call) -> StatsCell:
        """Where the numbers of this call's last attempt are kept."""
        if call.cell is not None:
            return call.cell
        request, endpoint = call.request, call.endpoint
        if not request.generates:
            return self._uncounted
        if endpoint is not None:
            cell = call.cell = self._stats.cell(endpoint.id, request.model or "")
            return cell
        endpoints = self._router.endpoints
        # It was never sent; where there is only one, it was meant for that.
        place = endpoints[0].id if len(endpoints) == 1 else NO_ENDPOINT
        return self._stats.cell(place, request.model or "")

    def begin(self, call: Call) -> None:
        """A call begins."""
        if self._monitor is not None and not self._is_watched:
            self._is_watched = True
            self._monitor.watch(self._router.endpoints)
        self.budget.deposit(call.started)
        endpoints = self._router.endpoints
        if len(endpoints) == 1:
            call.meant_for = endpoints[0].url
        if "request_start" in self._events.wanted:
            self._events.emit(
                RequestStartEvent(
                    request_id=call.request_id, path=call.request.path, model=call.request.model
                )
            )

    def failed(self, call: Call, error: VllmError) -> VllmError:
        """A call ends with this error, which is completed."""
        error = call.complete_error(error)
        self.ended(call, error=error)
        return error

    def ended(
        self,
        call: Call,
        *,
        error: VllmError | None = None,
        cancelled: bool = False,
        usage: Usage | None = None,
        time_to_first_token: float | None = None,
    ) -> None:
        """A call has ended."""
        if self.adapters is not None:
            self.adapters.ended(call)
        duration = time.monotonic() - call.started
        cell = self.cell(call) if call.cell is None else call.cell
        cell.finished(
            duration=duration,
            error=None if error is None else type(error).__name__,
            cancelled=cancelled,
            queue_wait=call.queue_wait,
            time_to_first_token=time_to_first_token,
            prompt_tokens=0 if usage is None else usage.prompt_tokens,
            completion_tokens=0 if usage is None else usage.completion_tokens,
        )
        if isinstance(error, QueueFullError) and "queue_full" in self._events.wanted:
            self._events.emit(QueueFullEvent(request_id=call.request_id, error=error))
        if "request_end" in self._events.wanted:
            self._events.emit(
                RequestEndEvent(
                    request_id=call.request_id,
                    endpoint=call.place,
                    model=call.request.model,
                    duration=duration,
                    attempts=len(call.attempts),
                    error=error,
                    cancelled=cancelled,
                )
            )

    def continued(self, call: Call, lost: Endpoint, tokens: int, error: VllmError) -> None:
        """A stream lost this endpoint after so many tokens, and went on where it is now."""
        assert call.endpoint is not None
        note = ContinuationNote(
            from_endpoint=lost.url,
            to_endpoint=call.endpoint.url,
            tokens=tokens,
            reason=call.words(error),
        )
        call.continuations += (note,)
        if "stream_continued" in self._events.wanted:
            self._events.emit(
                StreamContinuedEvent(
                    request_id=call.request_id,
                    from_endpoint=lost.id,
                    to_endpoint=call.place,
                    tokens=tokens,
                    error=error,
                )
            )

    async def _exchange(self, call: Call, decode: Decode[T], slot: Slot) -> T:
        result = await slot.endpoint.exchange(call, decode)
        usage: Usage | None = getattr(result, "usage", None)
        if usage is None:
            slot.leave()  # it says nothing about the engine
        else:
            slot.succeed(
                time.monotonic(), tokens=usage.completion_tokens, prompt_tokens=usage.prompt_tokens
            )
        return result

    async def _hedged(self, call: Call, decode: Decode[T], after: float, slot: Slot) -> T:
        """One attempt, and a second beside it if the first takes longer than ``after`` seconds."""

        def second() -> Coroutine[Any, Any, tuple[Call, T]] | None:
            twin = call.twin()
            other = self._slot_beside(twin)
            return None if other is None else self._beside(twin, other, decode)

        winner, result = await first_answer(self._racing(call, slot, decode), after, second)
        if slot.held:
            self._attempt_left(call, slot, call.settings.timeout)
        call.endpoint, call.cell = winner.endpoint, winner.cell
        return result

    def _slot_beside(self, twin: Call) -> Slot | None:
        """A slot for an attempt beside another one, where there is room and budget for it."""
        now = time.monotonic()
        if not self.budget.remaining(now):
            return None
        slot = self._router.take_elsewhere(twin, now)
        if slot is not None:
            self.budget.withdraw(now)
            twin.begin_attempt(slot.endpoint, now)
            self.cell(twin).attempt(retry=False)
            self.cell(twin).hedged += 1
        return slot

    async def _beside(self, twin: Call, slot: Slot, decode: Decode[T]) -> tuple[Call, T]:
        """The second of two attempts; however it ends, its slot is given back."""
        try:
            return await self._racing(twin, slot, decode)
        except asyncio.CancelledError:
            self._attempt_left(twin, slot, twin.settings.timeout)
            raise
        finally:
            slot.leave()

    async def _racing(self, call: Call, slot: Slot, decode: Decode[T]) -> tuple[Call, T]:
        """One of two attempts; it may fail while the other goes on."""
        try:
            return call, await self._exchange(call, decode, slot)
        except VllmError as error:
            self.attempt_failed(call, slot, error)
            raise

    def _attempt_left(self, call: Call, slot: Slot | None, timeout: float) -> None:
        """The attempt was cancelled, by the caller or by the call's deadline."""
        call.end_attempt(RequestTimeoutError("ended before it was answered"))
        if slot is None:
            return
        now = time.monotonic()
        mostly_there = now - slot.since > timeout / 2
        if mostly_there and call.elapsed > timeout - _CLOCK_STEP:
            slot.fail(RequestTimeoutError(f"no answer within {now - slot.since:.3g} s"), now)
        else:
            slot.leave()

    def out_of_time(self, call: Call, timeout: float) -> VllmError:
        """The error of a call whose time is over; ``timeout`` is in seconds."""
        if call.waiting:
            return self._line.out_of_time(call, timeout)
        return RequestTimeoutError(f"no answer within {timeout:g} s")

    # Another attempt?

    def _pause(
        self, call: Call, error: VllmError, slot: Slot | None, failed: int, timeout: float
    ) -> float | None:
        """Seconds until the next attempt; ``None`` for no other."""
        now = time.monotonic()
        elsewhere = slot is not None and self._router.is_elsewhere(call, now)
        if slot is not None and elsewhere and isinstance(error, _NOT_HERE):
            if isinstance(error, ModelNotFoundError) and call.request.model is not None:
                slot.endpoint.lacks(call.request.model, now)
            self._tell_retry(call, error, 0.0)
            return 0.0
        pause = pause_before_retry(
            RetryPolicy(max_retries=call.settings.max_retries),
            error,
            failed_attempts=failed,
            remaining=timeout - call.elapsed,
            elsewhere=elsewhere,
            random=random,
        )
        # What was never sent multiplies nothing.
        if pause is None or (slot is not None and not self.budget.withdraw(now)):
            return None
        self._tell_retry(call, error, pause)
        return pause

    def _tell_retry(self, call: Call, error: VllmError, pause: float) -> None:
        if "retry" in self._events.wanted:
            self._events.emit(
                RetryEvent(
                    request_id=call.request_id, endpoint=call.place, error=error, pause=pause
                )
            )

    def __repr__(self) -> str:
        members = ", ".join(each.id for each in self._router.endpoints)
        return f"<Fleet of {members or 'nobody'}, {len(self._line)} waiting>"
