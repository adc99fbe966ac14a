"""A job's prompts, asked by workers on a Ray cluster. Needs ray."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self

import msgspec

from vllm_unified.batch.answer import BatchAnswer
from vllm_unified.batch.errors import BatchStoppedError
from vllm_unified.batch.jobs.shared_limit import LimitKeeper, SharedLimit
from vllm_unified.batch.requests import RequestMaker
from vllm_unified.batch.runner import BatchRun
from vllm_unified.batch.source import Source
from vllm_unified.batch.stream import BatchStream
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.errors import ConfigurationError, VllmError
from vllm_unified.fleet.directory import Directory
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.settings import Settings
from vllm_unified.wire.http import HttpTransport
from vllm_unified.wire.requests import GenerationInput

try:
    from ray.exceptions import RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    import ray
except ImportError:
    raise ConfigurationError(
        "jobs on a Ray cluster need the extra 'ray'", hint="pip install 'vllm-unified[ray]'"
    ) from None

BLOCK = 128
"""Prompts that go to a worker at a time."""
LEAST_BLOCKS = 3
"""Of each worker at a time, so that it does not wait for the slowest prompt of one; or as many as
all servers take, for the others may have nothing to do."""
MOST_DEATHS = 3
"""Workers that a block may take with it before it is given up."""
_ANSWERS_WAITING = 4096
_KNOCK_SECONDS = 10.0


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to ask the same servers."""

    settings: Settings
    endpoints: tuple[dict[str, Any], ...]
    """What ``create_endpoint`` takes, with an even share of what a server may have at once."""
    most: dict[str, int]
    """What all workers together may have in flight at each server."""
    workers: int
    patience: float | None

    def keeper(self) -> Any:
        """The actor that shares out the servers' limits among the workers."""
        actor = ray.remote(LimitKeeper).options(**beside_us())
        return actor.remote(self.most, self.workers)

    async def fleet(self, keeper: Any) -> tuple[Fleet, SharedLimit]:
        """A client of its own, for the event loop that runs, and what keeps it to its leases."""
        directory = Directory(self.settings, None, HttpTransport)
        members = [directory.create_endpoint(None, each) for each in self.endpoints]
        fleet = directory.create_fleet(members, {}, {})
        shares = {each.id: each.settings.max_concurrent_requests for each in fleet.endpoints}
        limit = SharedLimit(fleet, keeper, shares)
        await limit.begin()
        return fleet, limit


def recipe(fleet: Fleet, patience: float | None, workers: int) -> Recipe:
    """Of a fleet, for so many workers: together they have no more in flight at a server than one
    client would.

    Raises:
        ConfigurationError: a server has a quota, which workers cannot keep together, or takes fewer
            requests at once than there are workers.
    """
    for endpoint in fleet.endpoints:
        if endpoint.quota is not None:
            raise ConfigurationError("workers on Ray cannot keep a server's quota together")
        most = endpoint.settings.max_concurrent_requests
        if workers > most:
            raise ConfigurationError(
                f"{workers} workers on Ray cannot share the {most} requests that {endpoint.id} may "
                "have at once",
                hint="Lower ray_workers (--ray-workers), or raise max_concurrent_requests.",
            )
    return Recipe(
        settings=fleet.settings,
        endpoints=tuple(_share(endpoint, workers) for endpoint in fleet.endpoints),
        most={each.id: each.settings.max_concurrent_requests for each in fleet.endpoints},
        workers=workers,
        patience=patience,
    )


def _share(endpoint: Endpoint, workers: int) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in msgspec.structs.asdict(endpoint.settings).items()
        if value is not None
    }
    most = settings["max_concurrent_requests"]
    settings["max_concurrent_requests"] = most // workers
    return {**settings, "id": endpoint.id, "weight": endpoint.weight}


class BatchWorker:
    """An actor: a client of its own, and the prompts that it is given."""

    def __init__(self, made_of: Recipe, keeper: Any) -> None:
        self._made_of = made_of
        self._keeper = keeper
        # On the first call, for a client belongs to its event loop.
        self._client: asyncio.Task[tuple[Fleet, SharedLimit]] | None = None

    async def connect(self) -> None:
        """Be known to whoever shares out the limits, also while there is nothing to do."""
        await self._connected()

    async def _connected(self) -> Fleet:
        if self._client is None:
            self._client = asyncio.create_task(self._made_of.fleet(self._keeper))
        fleet, _ = await asyncio.shield(self._client)
        return fleet

    async def answer(
        self, prompts: list[GenerationInput], params: Mapping[str, Any], pack: int | None
    ) -> AsyncIterator[list[BatchAnswer] | VllmError]:
        """The answers as they come; in the end, why there are no more, if there should be."""
        try:
            fleet = await self._connected()
            requests = RequestMaker(fleet.settings, params, embeddings=True)
            run = BatchRun(
                fleet,
                Source(prompts, by_priority=False),
                requests,
                ordered=False,
                patience=self._made_of.patience,
                pack=pack,
            )
            async with BatchStream(run) as stream:
                while ready := await stream.read_ready():
                    yield ready
        except VllmError as error:
            yield error


class _Block:
    """Prompts that are asked together, by their position."""

    def __init__(self, prompts: dict[int, GenerationInput]) -> None:
        self.prompts = prompts
        """Without an answer yet."""
        self.deaths = 0


class RayStream:
    """The answers of workers on a cluster, as they come; to be read as :class:`BatchStream`.

    A worker that is lost is replaced, and what it had not answered is asked by another. One that
    reaches no server rests, and when all do, this ends.

    Attributes:
        trouble: Why a worker gave up, while others go on.
    """

    def __init__(
        self,
        address: str,
        made_of: Recipe,
        prompts: AsyncIterator[GenerationInput],
        params: Mapping[str, Any],
        pack: int | None,
        *,
        workers: int,
    ) -> None:
        self.trouble: VllmError | None = None
        self._address = address
        self._made_of = made_of
        self._prompts = prompts
        self._params = params
        self._pack = pack
        self._workers = workers
        self._blocks = max(LEAST_BLOCKS, sum(made_of.most.values()) // BLOCK + 2)
        self._count = 0
        self._reading = asyncio.Lock()
        self._read_all = False
        self._again: deque[_Block] = deque()
        self._under_way = 0
        self._changed = asyncio.Event()
        self._answers: asyncio.Queue[BatchAnswer | None] = asyncio.Queue(_ANSWERS_WAITING)
        self._work: asyncio.Task[None] | None = None
        self._actors: list[Any] = []
        self._keeper: Any = None
        self._own_cluster = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BatchAnswer:
        if self._work is None:
            self._work = asyncio.create_task(self._run())
        answer = await self._answers.get()
        if answer is None:
            await self._work
            raise StopAsyncIteration
        return answer

    async def close(self) -> None:
        """Leave what is under way, and the cluster. May be called twice."""
        if self._work is not None:
            self._work.cancel()
            with contextlib.suppress(BaseException):
                await self._work
        for actor in (*self._actors, self._keeper):
            if actor is not None:
                ray.kill(actor)
        self._actors, self._keeper = [], None
        if self._own_cluster:
            self._own_cluster = False
            ray.shutdown()

    async def _run(self) -> None:
        try:
            self._own_cluster = join_cluster(self._address)
            self._keeper = self._made_of.keeper()
            async with asyncio.TaskGroup() as group:
                for _ in range(self._workers):
                    group.create_task(self._employ())
            if self.trouble is not None and (self._again or not self._read_all):
                raise self.trouble
        except BaseExceptionGroup as failed:
            first: BaseException = failed
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from first.__cause__
        finally:
            if not asyncio.current_task().cancelling():  # type: ignore[union-attr]
                await self._answers.put(None)

    async def _employ(self) -> None:
        """A worker, and its replacements, until there is nothing to do, or it reaches no server."""
        while True:
            actor = (
                ray.remote(BatchWorker)
                .options(num_cpus=1, scheduling_strategy="SPREAD", max_concurrency=self._blocks + 1)
                .remote(self._made_of, self._keeper)
            )
            self._actors.append(actor)
            actor.connect.remote()
            async with asyncio.TaskGroup() as group:
                feeding = [group.create_task(self._feed(actor)) for _ in range(self._blocks)]
            self._actors.remove(actor)
            ray.kill(actor)
            if all(feed.result() != "lost" for feed in feeding):
                return

    async def _feed(self, actor: Any) -> str:
        """Blocks for one worker, one after the other; how that ended."""
        while (block := await self._next_block()) is not None:
            self._under_way += 1
            try:
                stopped = await self._ask(actor, block)
            except RayActorError:
                block.deaths += 1
                if block.deaths >= MOST_DEATHS:
                    raise BatchStoppedError(
                        f"{MOST_DEATHS} workers died with the same {len(block.prompts)} prompts",
                        hint="Look at the workers' logs on the cluster.",
                    ) from None
                return "lost"
            finally:
                self._under_way -= 1
                if block.prompts:
                    self._again.append(block)
                self._changed.set()
            if stopped is not None:
                self.trouble = stopped
                return "stopped"
        return "done"

    async def _ask(self, actor: Any, block: _Block) -> VllmError | None:
        indices = list(block.prompts)
        answers = actor.answer.remote(list(block.prompts.values()), self._params, self._pack)
        async for reference in answers:
            found = await reference
            if isinstance(found, VllmError):
                return found
            for answer in found:
                index = indices[answer.index]
                del block.prompts[index]
                await self._answers.put(msgspec.structs.replace(answer, index=index))
        return None

    async def _next_block(self) -> _Block | None:
        """What is to be asked again, or new prompts; ``None`` when all is answered."""
        while True:
            if self._again:
                return self._again.popleft()
            if not self._read_all:
                async with self._reading:
                    if block := await self._read():
                        return block
                continue
            if not self._under_way:
                return None
            self._changed.clear()
            await self._changed.wait()

    async def _read(self) -> _Block | None:
        prompts: dict[int, GenerationInput] = {}
        while not self._read_all and len(prompts) < BLOCK:
            prompt = await anext(self._prompts, None)
            if prompt is None:
                self._read_all = True
                self._changed.set()
            else:
                prompts[self._count] = prompt
                self._count += 1
        return _Block(prompts) if prompts else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def join_cluster(address: str) -> bool:
    """Become a part of a cluster; whether that is new, and has to be left.

    Raises:
        ConfigurationError: there is none.
    """
    if ray.is_initialized():
        return False
    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"there is no Ray cluster at {address!r}: {error}",
            hint="'auto' is the one of this machine, 'local' makes one, HOST:PORT is another.",
        ) from error
    return True


def beside_us() -> dict[str, Any]:
    """Options of an actor that takes no CPU, on this node if it can be: it is lost with us only."""
    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


def _knock(address: str) -> None:
    """See that somebody listens there: Ray itself tries for more than a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), _KNOCK_SECONDS).close()
