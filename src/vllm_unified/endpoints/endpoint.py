"""One server as one key sees it: what it may be sent, and what its answers said of it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from random import random
from typing import Literal, TypeVar

import msgspec

from vllm_unified.endpoints.adaptive import AdaptiveLimit
from vllm_unified.endpoints.backoff import Backoff
from vllm_unified.endpoints.breaker import CircuitBreaker, State
from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.config import EndpointConfig
from vllm_unified.endpoints.quota import Quota
from vllm_unified.endpoints.verdict import verdict_of
from vllm_unified.errors import AttemptTimeoutError, ConnectError, VllmError
from vllm_unified.events import CircuitClosedEvent, CircuitHalfOpenEvent, CircuitOpenEvent, Events
from vllm_unified.results import ModelCard, ResultMetadata
from vllm_unified.wire.failures import error_in_answer
from vllm_unified.wire.requests import WireRequest, with_model
from vllm_unified.wire.transport import Response, Transport

T = TypeVar("T")

MAX_ERROR_BYTES = 2**20

EndpointState = Literal["closed", "open", "half_open", "draining"]

_LACKING_SECONDS = 30.0
"""How long a model that a server refused is not asked for there again."""
_LATENCY_WEIGHT = 0.3


class Endpoint:
    """A server, one key for it, and how much of it is used.

    Made by ``create_endpoint`` and given to ``make_request_with_endpoint`` and its like, or to
    ``create_load_balancer``. All of its attributes are there to be read only.
    """

    def __init__(
        self, id: str, config: EndpointConfig, transport: Transport, events: Events
    ) -> None:
        settings = config.settings
        self.id = id
        self.url = settings.api_url
        self.settings = settings
        self.weight = config.weight
        self.in_flight = 0
        """Requests that are there now, of this client."""
        self.limit = AdaptiveLimit(settings.max_concurrent_requests, cpu_time=time.thread_time)
        self.backoff = Backoff()
        self.breaker = CircuitBreaker(config.circuit_breaker, changed=self._tell)
        self.quota = (
            Quota(
                requests_per_minute=config.requests_per_minute,
                tokens_per_minute=config.tokens_per_minute,
            )
            if config.requests_per_minute or config.tokens_per_minute
            else None
        )
        self.is_plain = self.quota is None
        """Whether nothing but its capacity decides if it takes a request; read for each one."""
        self.draining = False
        self.held = False
        """Whether requests wait for it, as it is to be back soon."""
        self.latency: float | None = None
        """Mean seconds to the first token, or to the answer where it is not a stream; recent ones
        weigh more."""
        self.error: VllmError | None = None
        """Its last failure, until it succeeds again."""
        self.failed_at = -math.inf
        self.succeeded_at = -math.inf
        self.models: dict[str, int | None] | None = None
        """The models that it says it serves, and their context in tokens; ``None`` where it was not
        asked."""
        self.server_running = self.server_waiting = math.nan
        """The server's own numbers of requests, everybody's; NaN where not known."""
        self.polled_in_flight = 0
        """``in_flight`` when the server said them."""
        self.headers = _key_header(config)
        self.watchers: list[Callable[[Endpoint], None]] = []
        """To be called when a request may fit in that did not before."""
        self.aliases: dict[str, str] = {}
        """Models that the server is asked for by another name, for as long as one is replaced."""
        self.renamed: Counter[str] = Counter()
        """Requests that were sent with such a name, and are not answered yet."""
        self._lacking: dict[str, float] = {}
        self._transport = transport
        self._events = events

    @property
    def capacity(self) -> int:
        """How many requests may be there at once, as it was found out so far."""
        return self.limit.capacity

    def bound(self, most: int) -> None:
        """No more than this may be there at once from now on; what is there may end."""
        self.limit.bound(most)
        self.watch()

    @property
    def state(self) -> EndpointState:
        """The breaker's state, or ``draining``: nothing new is sent."""
        return "draining" if self.draining else self.breaker.state

    def serves(self, model: str | None, now: float) -> bool:
        """Whether this model may be asked for here, for all that is known."""
        if model is None:
            return True
        if self.models is not None and model not in self.models:
            return False
        until = self._lacking.get(model)
        if until is None or until > now:
            return until is None
        del self._lacking[model]
        self._look()
        return True

    def lacks(self, model: str, now: float) -> None:
        """The server said that it does not serve this model."""
        self.is_plain = False
        self._lacking[model] = now + _LACKING_SECONDS
        if len(self._lacking) > 1000:
            self._lacking = {name: end for name, end in self._lacking.items() if end > now}

    def serve(self, cards: Iterable[ModelCard]) -> None:
        """The server said what it serves. An adapter has the context of its base model."""
        cards = list(cards)
        contexts = {card.id: card.max_model_len for card in cards}
        self.models = {
            card.id: card.max_model_len or contexts.get(card.parent or "") for card in cards
        }
        for name, served in self.aliases.items():
            if served in self.models:
                self.models.setdefault(name, self.models[served])
        for name in self.models:
            self._lacking.pop(name, None)
        self._look()

    def polled(self, *, running: float, waiting: float) -> None:
        """The server said how loaded it is."""
        self.server_running, self.server_waiting = running, waiting
        self.polled_in_flight = self.in_flight
        self.limit.on_server_queue(running=running, waiting=waiting)

    def forget_load(self) -> None:
        """What the server said of its load is too old to be trusted."""
        self.server_running = self.server_waiting = math.nan

    def is_open(self, now: float) -> bool:
        """Whether it gets requests in the ordinary way."""
        # One that is held is expected back: who finds it dead meanwhile says nothing new.
        usable = self.held or not self.breaker.shut or self.breaker.allows(now)
        return usable and not self.draining

    def ready_at(self, now: float, tokens: int = 0) -> float:
        """When a request, of about so many tokens, may be sent, if only time has to pass."""
        ready = max(self.breaker.ready_at, self.backoff.ready_at)
        return ready if self.quota is None else max(ready, self.quota.ready_at(now, tokens))

    def has_room(self, now: float, tokens: int = 0) -> bool:
        """Whether one more request, of about so many tokens, fits in."""
        return (
            self.in_flight < self.limit.capacity
            and not self.held
            and self.backoff.ready_at <= now
            and (self.quota is None or self.quota.ready_at(now, tokens) <= now)
        )

    async def open(self, call: Call) -> Response:
        """Send the request once; an answer whose status is 2xx.

        Raises:
            VllmError: no connection, or another status.
        """
        response = await self._send(call)
        if 200 <= response.status < 300:
            return response
        raise await self._error(call.request, response)

    def _send(self, call: Call) -> Awaitable[Response]:
        request = call.request
        name = self.aliases.get(request.model or "") if self.aliases else None
        if name is not None:
            return self._send_renamed(call, name)
        return self._transport.open(
            request.method, self._address(request), headers=call.headers(self), body=request.body
        )

    async def _send_renamed(self, call: Call, name: str) -> Response:
        request = call.request
        self.renamed[name] += 1
        try:
            return await self._transport.open(
                request.method,
                self._address(request),
                headers=call.headers(self),
                body=with_model(request, name),
            )
        finally:
            self.renamed[name] -= 1

    def _address(self, request: WireRequest) -> str:
        url = self.url
        return f"{url}:{request.path}" if url.startswith("unix://") else url + request.path

    async def _error(self, request: WireRequest, response: Response) -> VllmError:
        """What the server says with another status."""
        words = b""
        try:
            # The status says what is wrong, also where the words after it cannot be read.
            with contextlib.suppress(VllmError):
                words = await response.read(MAX_ERROR_BYTES)
        finally:
            response.close()
        return error_in_answer(
            response.status, response.headers, words, path=f"{request.method} {request.path}"
        )

    async def exchange(self, call: Call, decode: Callable[[bytes, ResultMetadata], T]) -> T:
        """Send the request once, and decode its whole answer.

        Raises:
            VllmError: no answer, or one that is an error.
        """
        response = await self._send(call)
        if not 200 <= response.status < 300:
            raise await self._error(call.request, response)
        try:
            body = await response.read(call.settings.max_response_bytes)
        finally:
            response.close()
        call.end_attempt()
        return decode(body, call.metadata())

    def recover(self) -> None:
        """It generates again: begin slowly."""
        self.error = None
        if self.breaker.shut:
            self.breaker.reset()
            self.limit.restart()
        self.watch()

    def shut_out(self, error: VllmError) -> None:
        """It was found not to generate: send nothing there for a while."""
        self.error = error
        self.failed_at = time.monotonic()
        self.breaker.trip(self.failed_at)
        self.watch()

    def watch(self) -> None:
        """Tell who waits that a request may fit in now; who gets a place is the last one next."""
        if len(self.watchers) == 1:
            self.watchers[0](self)
            return
        for watcher in tuple(self.watchers):
            before = self.in_flight
            watcher(self)
            if self.in_flight > before and watcher in self.watchers:
                self.watchers.remove(watcher)
                self.watchers.append(watcher)

    def drain(self) -> None:
        """Send nothing new there; what is in flight goes on."""
        self.draining = True
        self._look()
        self.watch()

    def hold(self) -> None:
        """Let requests wait in line until :meth:`release`; what is in flight goes on."""
        self.held = True
        self._look()

    def release(self) -> None:
        """Send again, as to a server that has just started."""
        self.held = False
        self.recover()
        self.backoff.end()
        self._look()
        self.watch()

    def move(self, url: str) -> None:
        """The same server has another address: new requests go there, and what is in flight ends
        where it is."""
        self.url = url
        self.settings = msgspec.structs.replace(self.settings, api_url=url)
        self.models = None
        self._lacking.clear()
        self.forget_load()
        self.release()

    def refuse(self, now: float) -> None:
        """The server refused a request, and is alive."""
        self.limit.on_overload(in_flight=self.in_flight)
        if self.in_flight == 1:
            self.backoff.refuse(now, random)
            self._look()

    def accept(self) -> None:
        """The server took a request, after those that it refused."""
        self.backoff.end()
        self._look()

    def _look(self) -> None:
        waits = self.held or self.breaker.shut or self.backoff.is_on or self.quota is not None
        self.is_plain = not (waits or self.draining or self._lacking)

    def _tell(self, state: State) -> None:
        self._look()
        events = self._events
        if state == "open" and "circuit_open" in events.wanted:
            events.emit(CircuitOpenEvent(endpoint=self.id, error=self.error))
        elif state == "half_open" and "circuit_half_open" in events.wanted:
            events.emit(CircuitHalfOpenEvent(endpoint=self.id))
        elif state == "closed" and "circuit_closed" in events.wanted:
            events.emit(CircuitClosedEvent(endpoint=self.id))

    def __repr__(self) -> str:
        return f"<Endpoint {self.id} {self.state}, {self.in_flight}/{self.capacity} in flight>"


class Slot:
    """A place at an endpoint, for one attempt, from its beginning to its verdict.

    It is given back exactly once, however often it is ended.
    """

    __slots__ = ("_held", "_is_proven", "_quota", "_token", "endpoint", "since")

    def __init__(self, endpoint: Endpoint, now: float, *, tokens: int = 0) -> None:
        """``tokens`` is about how many it will take, prompt and answer."""
        self.endpoint = endpoint
        self.since = now
        """Monotonic seconds."""
        self._held = True
        self._is_proven = False
        self._token: int | None = endpoint.breaker.begin()
        self._quota = None if endpoint.quota is None else endpoint.quota.take(now, tokens)
        endpoint.in_flight += 1

    @property
    def held(self) -> bool:
        """Whether it was not given back yet."""
        return self._held

    def prove(self, now: float) -> None:
        """The endpoint generates: the first token, or the answer, has come."""
        endpoint = self.endpoint
        self._is_proven = True
        if endpoint.latency is None:
            endpoint.latency = now - self.since
        else:
            endpoint.latency += _LATENCY_WEIGHT * (now - self.since - endpoint.latency)
        endpoint.succeeded_at = now
        endpoint.error = None
        if endpoint.backoff.is_on:
            endpoint.accept()
        if endpoint.breaker.shut:
            # A trial need not last as long as its stream. Otherwise the end has the verdict: a
            # server that dies after every first token is not well.
            self._acquit(self._token)

    def _acquit(self, token: int | None) -> None:
        self._token = None
        if token is not None and self.endpoint.breaker.succeed(token):
            self.endpoint.limit.restart()

    def succeed(self, now: float, *, tokens: int, prompt_tokens: int = 0) -> None:
        """The whole answer has come."""
        if not self._held:
            return
        if not self._is_proven:
            self.prove(now)
        endpoint, token = self.endpoint, self._token
        self._token = None
        if token is not None and endpoint.breaker.succeed(token):
            endpoint.limit.restart()
        endpoint.succeeded_at = now
        endpoint.limit.on_success(in_flight=endpoint.in_flight, work=float(tokens or 1), now=now)
        if self._quota is not None and endpoint.quota is not None:
            endpoint.quota.settle(self._quota, tokens + prompt_tokens)
        self._held = False
        endpoint.in_flight -= 1
        endpoint.watch()

    def fail(self, error: VllmError, now: float) -> None:
        """The attempt failed; what that says about the endpoint is in the error's class."""
        if not self._held:
            return
        endpoint = self.endpoint
        verdict = verdict_of(error)
        if verdict == "overloaded":
            endpoint.refuse(now)
        elif verdict == "failed":
            endpoint.error = error
            endpoint.failed_at = now
            # After a proof it is a new verdict.
            token = endpoint.breaker.begin() if self._token is None else self._token
            self._token = None
            endpoint.breaker.fail(token, now)
        elif verdict == "answered":
            self._acquit(self._token)
        if isinstance(error, ConnectError) and self._quota is not None and endpoint.quota:
            endpoint.quota.refund(self._quota)  # nothing was sent
        self._release()

    def leave(self) -> None:
        """The attempt ended without a verdict: its caller left."""
        if self._held:
            self._release()

    def _release(self) -> None:
        self._held = False
        endpoint = self.endpoint
        if self._token is not None:
            endpoint.breaker.forget(self._token)
            self._token = None
        endpoint.in_flight -= 1
        endpoint.watch()

    def __repr__(self) -> str:
        return f"<Slot at {self.endpoint.id}{'' if self._held else ', given back'}>"


@contextlib.asynccontextmanager
async def attempt_clock(seconds: float) -> AsyncIterator[None]:
    """Raise AttemptTimeoutError after so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except VllmError:
        raise
    except TimeoutError:
        raise AttemptTimeoutError(f"no answer within {seconds:g} s") from None


def _key_header(config: EndpointConfig) -> dict[str, str]:
    key = config.settings.api_key
    return {"Authorization": f"Bearer {key.reveal()}"} if key and key.reveal() else {}
