"""Keeps adapters where they are meant to be, and loads them for the requests that need them."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.errors import AdapterError, ClientClosedError, RequestTimeoutError, VllmError
from vllm_unified.events import AdapterLoadedEvent, AdapterLostEvent, AdapterUnloadedEvent
from vllm_unified.fleet.directory import Directory
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.models.lora.adapters import Adapter, loaded_adapters
from vllm_unified.models.lora.fit import check_fit
from vllm_unified.models.lora.folder import digest, folder_here, read_adapter, read_model_config
from vllm_unified.models.lora.placement import (
    PATIENCE_SECONDS,
    Place,
    by_preference,
    to_evict,
    to_repair,
)
from vllm_unified.models.lora.registry import Registration, Registry
from vllm_unified.models.lora.site import Site

T = TypeVar("T")

LOAD_SECONDS = 120.0
"""How long loading an adapter may take, where nobody said."""
DEFAULT_SLOTS = 8
"""How many adapters on demand a server may have that does not say how many slots it has."""
_LOOK_SECONDS = 3.0
_FAREWELL_SECONDS = 5.0
_MAX_MISSES = 3


class Keeper:
    """The adapters of one client. What it does at a server runs to its end, also when the caller
    that wanted it has left: a server is never left with half of a change."""

    def __init__(self, directory: Directory, *, interval: float = 5.0) -> None:
        """``interval`` is the seconds from one look at the servers to the next."""
        self.registry = Registry()
        self._directory = directory
        self._interval = interval
        self._sites: dict[str, Site] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._misses: dict[Call, int] = {}
        self._closed = False

    def site(self, url: str) -> Site:
        """The server at this address."""
        if url not in self._sites:
            self._sites[url] = Site(
                url, lambda: [each for each in self._directory.endpoints if each.url == url]
            )
        return self._sites[url]

    def register(self, registration: Registration) -> None:
        """Load it when it is needed, and keep it, as it says."""
        self.registry.add(registration)
        self._directory.hook(self)
        if registration.keep and self._watch is None and not self._closed:
            self._watch = asyncio.create_task(self._keep(), name="LoRA adapters")

    @contextlib.contextmanager
    def changing(self, wanted: Registration) -> Iterator[None]:
        """Meanwhile nothing is loaded again by itself, and calls that miss it are helped."""
        known = self.registry.find(wanted.name, wanted.fleet.endpoints)
        meanwhile = known or Registration(wanted.adapter, wanted.fleet, wanted.replicas)
        self.register(meanwhile)
        meanwhile.changing += 1
        try:
            yield
        finally:
            meanwhile.changing -= 1
            if known is None:
                self.registry.remove(meanwhile)

    async def close(self) -> None:
        """Load nothing more; what is under way has a few seconds to end."""
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_FAREWELL_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # At one server

    async def load(self, url: str, adapter: Adapter, *, timeout: float, check: bool = True) -> bool:
        """Have an adapter at a server; whether it was there already.

        Raises:
            VllmError: why it is not there.
        """
        return await self._to_its_end(self._load(self.site(url), adapter, timeout, check))

    async def unload(self, url: str, name: str, *, timeout: float) -> bool:
        """Have it there no more; whether it was.

        Raises:
            VllmError: why it is still there.
        """
        return await self._to_its_end(self._unload(self.site(url), name, timeout))

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        if self._closed:
            work.close()
            raise ClientClosedError("this client is closed")
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited may have left

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        return await _outcome(self._start(work))

    async def _load(self, site: Site, adapter: Adapter, timeout: float, check: bool) -> bool:
        try:
            async with asyncio.timeout(timeout), site.lock:
                return await self._bring(site, adapter, check)
        except VllmError:
            raise
        except TimeoutError:
            raise _late(adapter.name, "loaded", site.url) from None

    async def _bring(self, site: Site, adapter: Adapter, check: bool) -> bool:
        folder = folder_here(adapter.path)
        content = None if folder is None else await asyncio.to_thread(digest, folder)
        self.registry.check_content(site.url, adapter, content)
        if check:
            await self._check(site, adapter)
        was_there = await site.bring(adapter)
        self.registry.remember_content(site.url, adapter, content)
        if not was_there and "adapter_loaded" in self._directory.events.wanted:
            self._directory.events.emit(
                AdapterLoadedEvent(adapter=adapter.name, path=adapter.path, endpoint=site.id)
            )
        return was_there

    async def check(self, url: str, adapter: Adapter, *, timeout: float) -> None:
        """Raise for an adapter that does not fit this server.

        Raises:
            AdapterError: it does not.
            VllmError: the server does not answer.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._check(self.site(url), adapter)
        except VllmError:
            raise
        except TimeoutError:
            raise RequestTimeoutError(f"no answer within {timeout:g} s", endpoint=url) from None

    async def _check(self, site: Site, adapter: Adapter) -> None:
        folder = folder_here(adapter.path)
        files = None if folder is None else await asyncio.to_thread(read_adapter, folder)
        facts = await site.facts()
        root = next((card.root for card in facts.bases), None)
        try:
            check_fit(adapter, files, facts, await asyncio.to_thread(read_model_config, root))
        except AdapterError as error:
            error.endpoint = site.url
            raise

    async def _unload(self, site: Site, name: str, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout), site.lock:
                return await self._drop(site, name)
        except VllmError:
            raise
        except TimeoutError:
            raise _late(name, "unloaded", site.url) from None

    async def _drop(self, site: Site, name: str) -> bool:
        card = loaded_adapters(await site.cards()).get(name)
        was_there = await site.unload(name) if card is not None else False
        if card is not None and "adapter_unloaded" in self._directory.events.wanted:
            self._directory.events.emit(
                AdapterUnloadedEvent(adapter=name, path=card.root or "", endpoint=site.id)
            )
        return was_there

    # For a request

    async def prepare(self, fleet: Fleet, call: Call) -> None:
        """See :class:`AdapterHook`."""
        registration = self.registry.find(call.request.model, fleet.endpoints)
        if registration is None:
            return
        now = time.monotonic()
        self.registry.use(call, registration, now)
        if not registration.on_demand or self._is_served(registration.name, fleet, now):
            return
        if registration.coming is None:
            registration.coming = self._start(self._fetch(registration, fleet))
        try:
            await _outcome(registration.coming)
        except VllmError as error:
            # Many calls wait for it, and each has an error of its own.
            raise copy.copy(error) from error

    async def missed(self, fleet: Fleet, call: Call, endpoint: Endpoint) -> bool:
        """See :class:`AdapterHook`."""
        registration = self.registry.find(call.request.model, [endpoint])
        misses = self._misses[call] = self._misses.get(call, 0) + 1
        if registration is None or misses > _MAX_MISSES:
            return False
        try:
            return await self._to_its_end(self._recover(registration, self.site(endpoint.url)))
        except (VllmError, TimeoutError):
            return False

    def ended(self, call: Call) -> None:
        """See :class:`AdapterHook`."""
        self._misses.pop(call, None)
        self.registry.ended(call, time.monotonic())

    def _is_served(self, name: str, fleet: Fleet, now: float) -> bool:
        """Whether a server has it that gets requests; with all shut out, none is better."""
        open_ones = [each for each in fleet.endpoints if each.is_open(now)]
        return not open_ones or any(name in (each.models or ()) for each in open_ones)

    async def _fetch(self, registration: Registration, fleet: Fleet) -> None:
        """Load it at the server that is best for it, or at the next one that takes it."""
        try:
            now = time.monotonic()
            urls = [each.url for each in fleet.endpoints if each.is_open(now)]
            urls = [url for url in urls if registration.concerns(self.site(url).endpoints)]
            failure: VllmError | None = None
            for place in by_preference(self.places(registration.adapter, urls)):
                try:
                    async with asyncio.timeout(LOAD_SECONDS):
                        return await self._fetch_to(registration, self.site(place.url))
                except VllmError as error:
                    failure = error
                except TimeoutError:
                    failure = _late(registration.name, "loaded", place.url)
            if failure is not None:
                raise failure
        finally:
            registration.coming = None

    async def _fetch_to(self, registration: Registration, site: Site) -> None:
        while True:
            async with site.lock:
                if registration not in self.registry.all:
                    return  # it was unloaded meanwhile
                if not site.was_asked:
                    await site.facts()
                victims = self._victims(registration, site)
                if victims is not None:
                    for name in victims:
                        await self._drop(site, name)
                    await self._bring(site, registration.adapter, check=False)
                    registration.places.add(site.url)
                    return
            await self.registry.freed()

    def _victims(self, registration: Registration, site: Site) -> list[str] | None:
        served = {name for each in site.endpoints for name in each.models or ()}
        there = {
            each.name: each
            for each in self.registry.all
            if each.on_demand and each is not registration and each.name in served
        }
        return to_evict(
            {name: each.used_at for name, each in there.items()},
            {name for name, each in there.items() if self.registry.is_busy(each, site.url)},
            registration.max_adapters or site.slots or DEFAULT_SLOTS,
        )

    async def _recover(self, registration: Registration, site: Site) -> bool:
        """A server said that it has it not; whether another attempt there makes sense."""
        async with asyncio.timeout(LOAD_SECONDS), site.lock:
            if registration.name in loaded_adapters(await site.cards()):
                return True
            if registration.on_demand:
                return True  # it is loaded before that
            if site.url not in registration.places or not registration.is_kept:
                return False
            self._mourn(registration, site)
            await self._bring(site, registration.adapter, check=False)
            registration.forget_loss(site.url)
            return True

    # Keeping

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            with contextlib.suppress(VllmError, TimeoutError):
                await self.look()

    async def look(self) -> None:
        """Look at all servers of adapters that are kept, and load what is missing."""
        kept = [each for each in self.registry.all if each.is_kept]
        for registration in kept:
            if not registration.fleet.endpoints:
                self.registry.remove(registration)  # its fleet is closed
        urls = {each.url for registration in kept for each in registration.fleet.endpoints}
        await asyncio.gather(*(self._look_at(self.site(url)) for url in urls))
        await asyncio.gather(*(self._repair(registration) for registration in kept))

    async def _look_at(self, site: Site) -> None:
        if site.lock.locked():
            return  # it is being changed, and looked at
        try:
            await site.cards(_LOOK_SECONDS)
            is_up = any(not each.breaker.shut for each in site.endpoints)
        except VllmError:
            is_up = False
        if is_up:
            site.down_since = None
        elif site.down_since is None:
            site.down_since = time.monotonic()

    async def _repair(self, registration: Registration) -> None:
        urls = [each.url for each in registration.fleet.endpoints if not each.draining]
        places = self.places(registration.adapter, urls, registration.places)
        for place in places:
            if place.meant and place.down_for >= PATIENCE_SECONDS:
                self._mourn(registration, self.site(place.url))
                if registration.replicas != "all":
                    registration.places.discard(place.url)
        tried: set[str] = set()
        for candidates in to_repair(places, registration.replicas):
            for place in candidates:
                if place.url not in tried:
                    tried.add(place.url)
                    if await self._reload(registration, place):
                        break

    async def _reload(self, registration: Registration, place: Place) -> bool:
        site = self.site(place.url)
        try:
            return await self._to_its_end(self._restore(registration, site, meant=place.meant))
        except VllmError as error:
            self._mourn(registration, site, error)
        except TimeoutError:
            pass
        return False

    async def _restore(self, registration: Registration, site: Site, *, meant: bool) -> bool:
        async with asyncio.timeout(LOAD_SECONDS), site.lock:
            # Much may have happened until the lock was free.
            if not registration.is_kept or registration not in self.registry.all:
                return False
            if registration.name not in loaded_adapters(await site.cards(_LOOK_SECONDS)):
                if meant:
                    self._mourn(registration, site)
                await self._bring(site, registration.adapter, check=False)
        registration.places.add(site.url)
        registration.forget_loss(site.url)
        return True

    def _mourn(
        self, registration: Registration, site: Site, error: VllmError | None = None
    ) -> None:
        """Say once that a server has lost it, and once why it cannot be loaded again."""
        if registration.mourn(site.url, error) and "adapter_lost" in self._directory.events.wanted:
            self._directory.events.emit(
                AdapterLostEvent(
                    adapter=registration.name,
                    path=registration.adapter.path,
                    endpoint=site.id,
                    error=error,
                )
            )

    def places(
        self, adapter: Adapter, urls: Iterable[str], meant: Iterable[str] = ()
    ) -> list[Place]:
        """What is known of these servers, each once."""
        now, meant = time.monotonic(), set(meant)
        return [
            self._place(self.site(url), adapter, url in meant, now) for url in dict.fromkeys(urls)
        ]

    def _place(self, site: Site, adapter: Adapter, meant: bool, now: float) -> Place:
        endpoints: Sequence[Endpoint] = site.endpoints
        return Place(
            url=site.url,
            version=_version(site, adapter),
            adapters=len(site.adapters.keys() - {adapter.name}),
            requests=sum(each.in_flight for each in endpoints),
            slots=site.slots,
            down_for=0.0 if site.down_since is None else max(now - site.down_since, 0.001),
            meant=meant,
        )


def _late(name: str, done: str, url: str) -> RequestTimeoutError:
    return RequestTimeoutError(
        f"{name!r} was not {done} in time",
        endpoint=url,
        hint="The server is slow, or its engine hangs: timeout=SECONDS allows more.",
    )


def _version(site: Site, adapter: Adapter) -> Literal["same", "other"] | None:
    path = site.adapters.get(adapter.name)
    if path is None:
        return None
    return "same" if path == adapter.path else "other"


async def _outcome(task: asyncio.Task[T]) -> T:
    """What the task leads to; it goes on when its caller is cancelled."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        me = asyncio.current_task()
        if task.cancelled() and me is not None and not me.cancelling():
            raise ClientClosedError("this client was closed meanwhile") from None
        raise
