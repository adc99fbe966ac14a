"""Servers without a network, a fleet of them, and a clock that stands still."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from tests.support import answers
from tests.support.fleets import directory
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.endpoints.stats import EndpointStats, Statistics
from vllm_unified.errors import ConnectError, VllmError
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.results import GenerationResult, ModelCard
from vllm_unified.settings import Settings
from vllm_unified.wire.requests import generation_request
from vllm_unified.wire.responses import generation_decoder


@dataclass(frozen=True)
class Answer:
    """What a server says."""

    status: int = 200
    body: bytes = b""


COMPLETION = Answer(body=json.dumps(answers.completion_body("a")).encode())
MODELS = Answer(body=json.dumps({"data": [{"id": answers.MODEL}]}).encode())


def error(status: int, message: str, *, param: str | None = None) -> Answer:
    """An error answer in vLLM's shape."""
    body = {"error": answers.error_body(message, param=param, code=status)}
    return Answer(status, json.dumps(body).encode())


BUSY = error(503, answers.BUSY)
GATEWAY = Answer(503, b"<html><title>503 Service Temporarily Unavailable</title></html>")
BROKEN = error(500, answers.ENGINE_DEAD)
NO_SUCH_MODEL = error(404, answers.UNKNOWN_MODEL, param="model")

Reply = Answer | type[VllmError]
"""An answer, or what is raised in place of one."""


@dataclass(frozen=True)
class Sent:
    """A request, as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes | None

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body or b"null")


class FakeServer:
    """Answers at once, or when it is told to. Generations are what is scripted; a server that
    answers is also healthy, and has no gauges unless it is given some."""

    def __init__(self, name: str) -> None:
        self.url = f"http://{name}"
        self.requests: list[Sent] = []
        """Generations."""
        self.looks: list[str] = []
        """Paths of all other requests."""
        self.fixed: dict[str, Reply] = {"/health": Answer(), "/v1/models": MODELS}
        """Replies to other requests, by path."""
        self._always: Reply = COMPLETION
        self._next: deque[Reply] = deque()
        self._holds = False
        self._held: list[asyncio.Future[None]] = []

    @property
    def held(self) -> int:
        """How many generations it keeps."""
        return sum(not kept.done() for kept in self._held)

    def always(self, reply: Reply) -> None:
        """Reply so, from now on."""
        self._always = reply

    def reply(self, *replies: Reply) -> None:
        """Reply so to the next requests."""
        self._next.extend(replies)

    def hold(self) -> None:
        """Keep all generations until :meth:`finish`."""
        self._holds = True

    def finish(self, count: int = 1) -> None:
        """Answer the oldest of those that are kept."""
        waiting = [kept for kept in self._held if not kept.done()]
        for kept in waiting[:count]:
            kept.set_result(None)

    def release(self) -> None:
        """Keep no generations from now on; those that are kept stay."""
        self._holds = False

    def heal(self) -> None:
        """Answer well and at once, also what was kept."""
        self._holds, self._always = False, COMPLETION
        self.finish(self.held)

    async def take(self, sent: Sent) -> Reply:
        """The reply to a request."""
        if sent.path not in ("/v1/completions", "/v1/chat/completions"):
            self.looks.append(sent.path)
            return self.fixed.get(sent.path, Answer(404))
        self.requests.append(sent)
        reply = self._next.popleft() if self._next else None
        if self._holds:
            await self._keep()
        return reply or self._always

    async def _keep(self) -> None:
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.append(kept)
        try:
            await kept
        finally:
            self._held.remove(kept)


class _Response:
    headers: Mapping[str, str] = types.MappingProxyType({"content-type": "application/json"})

    def __init__(self, answer: Answer) -> None:
        self.status = answer.status
        self._body = answer.body

    async def packet(self) -> bytes:
        body, self._body = self._body, b""
        return body

    async def read(self, limit: int) -> bytes:
        return self._body

    def close(self) -> None:
        """Nothing is open."""


class FakeTransport:
    """To servers by the host in their address; there is one wherever it is asked for."""

    def __init__(self) -> None:
        self.servers: dict[str, FakeServer] = {}
        self.closed = False

    def server(self, name: str) -> FakeServer:
        """The server of that name."""
        return self.servers.setdefault(name, FakeServer(name))

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> _Response:
        if self.closed:
            raise ConnectError("the transport is closed")
        parts = urlsplit(url)
        reply = await self.server(parts.netloc).take(Sent(method, parts.path, headers, body))
        if isinstance(reply, Answer):
            return _Response(reply)
        raise reply("it is broken")

    async def close(self) -> None:
        self.closed = True


def in_turn() -> Callable[[Sequence[Any], object], Any]:
    """A strategy without chance: the one that was chosen least, the first of several."""
    chosen: Counter[str] = Counter()

    def choose(candidates: Sequence[Any], route: object) -> Any:
        least = min(candidates, key=lambda each: chosen[each.id])
        chosen[least.id] += 1
        return least

    return choose


class Rig:
    """A directory of fake servers, and a fleet of all of them."""

    def __init__(
        self,
        *names: str,
        settings: Mapping[str, Any] | None = None,
        endpoint: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """``endpoint`` is for each endpoint, ``options`` are those of the fleet."""
        defaults = Settings(api_url="http://a", max_retries=0, timeout=3)
        self.settings = msgspec.structs.replace(defaults, **(settings or {}))
        self.transport = FakeTransport()
        self.servers = [self.transport.server(name) for name in names]
        self.directory = directory(self.settings, transport=self.transport)
        self.tasks: list[asyncio.Task[GenerationResult]] = []
        members = [{"id": name, "url": f"http://{name}", **(endpoint or {})} for name in names]
        options = {"strategy": in_turn(), **options}
        self.fleet: Fleet = self.directory.create_fleet(members, options)
        self.endpoints: tuple[Endpoint, ...] = self.fleet.endpoints
        self.told: list[Any] = []
        """Events, of those that :meth:`listen` was asked for."""

    def listen(self, *names: str) -> None:
        """Keep these events."""
        for name in names:
            self.directory.events.on(name, self.told.append)

    async def ask(
        self,
        *,
        fleet: Fleet | None = None,
        settings: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> GenerationResult:
        """One completion."""
        request = generation_request({"prompt": "a", **fields})
        chosen = (fleet or self.fleet).settings.for_call(settings or {})
        return await (fleet or self.fleet).send(request, chosen, generation_decoder(request))

    def start(self, **fields: Any) -> asyncio.Task[GenerationResult]:
        """One completion, in a task."""
        task = asyncio.create_task(self.ask(**fields))
        self.tasks.append(task)
        return task

    async def fail(self, times: int = 1) -> list[BaseException]:
        """Ask so often; what is raised."""
        outcomes = [
            (await asyncio.gather(self.ask(), return_exceptions=True))[0] for _ in range(times)
        ]
        return [outcome for outcome in outcomes if isinstance(outcome, BaseException)]

    def sent(self) -> list[int]:
        """How many generations each server got."""
        return [len(server.requests) for server in self.servers]

    def serve(self, *models: str) -> None:
        """One model at each server, and only there."""
        for endpoint, model in zip(self.endpoints, models, strict=True):
            endpoint.serve([ModelCard(id=model)])

    def statistics(self) -> Statistics:
        """What became of all requests."""
        found = self.directory.get_stats(None)
        assert isinstance(found, Statistics)
        return found

    def stats(self, place: int = 0) -> EndpointStats:
        """What became of the requests to one endpoint."""
        found = self.directory.get_stats(self.endpoints[place])
        assert isinstance(found, EndpointStats)
        return found

    async def close(self) -> None:
        """Leave what is under way, and close everything."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.directory.close()


MakeRig = Callable[..., Rig]


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


class Clock:
    """What ``vllm_unified`` sees in place of the module ``time``; it goes on when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self.now += seconds

    def monotonic(self) -> float:
        """The monotonic time that is shown."""
        return self.now

    def time(self) -> float:
        """The time of day that is shown."""
        return 1.78e9 + self.now

    def thread_time(self) -> float:
        """The thread does nothing that takes time."""
        return 0.0


def stop_time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock for endpoints and fleets; the event loop keeps its own."""
    clock = Clock()
    for name, module in list(sys.modules.items()):
        if name.startswith(("vllm_unified.fleet.", "vllm_unified.endpoints.")) and (
            getattr(module, "time", None) is time
        ):
            monkeypatch.setattr(module, "time", clock)
    return clock
