"""LoRA adapters across servers: what they have, loading one, unloading it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

import msgspec

from vllm_unified.errors import AdapterError, ConfigurationError, NotFoundError, VllmError
from vllm_unified.fleet.directory import Directory
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.models.lora.adapters import Adapter, LoraAdapter, LoraResult, union
from vllm_unified.models.lora.folder import folder_here
from vllm_unified.models.lora.keeper import LOAD_SECONDS, Keeper
from vllm_unified.models.lora.placement import Place, Replicas, by_preference
from vllm_unified.models.lora.registry import Registration
from vllm_unified.results import ModelCard
from vllm_unified.settings import check_keywords


class Lora:
    """The adapters at the servers of one client."""

    def __init__(self, directory: Directory) -> None:
        self.keeper = Keeper(directory)

    async def listed(self, fleet: Fleet, *, timeout: float) -> list[LoraAdapter]:
        """The adapters that its servers have, and those that are loaded when they are asked for.

        Raises:
            VllmError: no server answers; the first one's error.
        """
        listings = await self._listings(fleet, _seconds(timeout))
        found = union(listings)
        names = {adapter.name for adapter in found}
        for each in self.keeper.registry.all:
            if each.on_demand and each.name not in names and each.concerns(fleet.endpoints):
                wanted = each.adapter
                found.append(
                    LoraAdapter(name=each.name, path=wanted.path, base_model=wanted.base_model)
                )
        return found

    async def load(self, wanted: Registration, *, check: bool, timeout: float) -> LoraResult:
        """Have an adapter at as many of a fleet's servers as are wanted.

        Raises:
            AdapterError: it is on fewer; what was loaded stays, and is kept if that was wanted.
            VllmError: the only server's own error.
        """
        began = time.monotonic()
        deadline = began + _seconds(timeout)
        urls = _urls(wanted.fleet)
        count = _count(wanted.replicas, len(urls))
        wanted.adapter = _with_folder(wanted.adapter)
        if wanted.on_demand:
            if check:
                await self._check_somewhere(wanted.adapter, urls, deadline)
            self.keeper.register(wanted)
            return LoraResult(success=True, name=wanted.name, duration=time.monotonic() - began)
        round = _Round(self.keeper, wanted.adapter, check, deadline)
        with self.keeper.changing(wanted):
            await round.run(urls, count)
        if round.urls:
            wanted.places = set(round.urls)
            self.keeper.register(wanted)
        result = LoraResult(
            success=len(round.urls) >= count,
            name=wanted.name,
            endpoints=_ids(wanted.fleet, round.urls),
            already_loaded=bool(round.urls) and not round.loaded,
            failed={
                id: error for url, error in round.failed.items() for id in _ids(wanted.fleet, [url])
            },
            notes=tuple(round.notes),
            duration=time.monotonic() - began,
        )
        if result.success:
            return result
        raise _too_few(result, count, len(urls))

    async def unload(self, fleet: Fleet, name: str, *, timeout: float) -> LoraResult:
        """Have an adapter at none of a fleet's servers, and keep it no more.

        Raises:
            NotFoundError: none of them has it.
            AdapterError: a server still has it, or cannot be asked.
            VllmError: the only server's own error.
        """
        began = time.monotonic()
        registration = self.keeper.registry.find(name, fleet.endpoints)
        if registration is not None:
            self.keeper.registry.remove(registration)
        urls = _urls(fleet)
        found = await asyncio.gather(
            *(self.keeper.unload(url, name, timeout=_seconds(timeout)) for url in urls),
            return_exceptions=True,
        )
        failed: dict[str, VllmError] = {}
        for url, each in zip(urls, found, strict=True):
            if isinstance(each, VllmError):
                failed |= dict.fromkeys(_ids(fleet, [url]), each)
            elif isinstance(each, BaseException):
                raise each
        if failed:
            first = next(iter(failed.values()))
            if len(urls) == 1:
                raise first
            raise AdapterError(
                f"{name!r} was not unloaded at {len(failed)} of {len(urls)} servers; "
                f"{next(iter(failed))}: {first.message}",
                hint=first.hint,
                failed=failed,
            ) from first
        if registration is None and not any(found):
            raise NotFoundError(
                f"there is no adapter {name!r}",
                endpoint=urls[0] if len(urls) == 1 else None,
                hint="list_lora_adapters() (or `vllm-unified lora list`) shows which there are.",
            )
        return LoraResult(success=True, name=name, duration=time.monotonic() - began)

    async def _check_somewhere(
        self, adapter: Adapter, urls: Sequence[str], deadline: float
    ) -> None:
        """Raise if it fits none of the servers that can be asked."""
        errors: list[VllmError] = []
        for url in urls:
            try:
                await self.keeper.check(url, adapter, timeout=deadline - time.monotonic())
            except VllmError as error:
                errors.append(error)
        if len(errors) == len(urls) and all(isinstance(error, AdapterError) for error in errors):
            raise errors[0]

    async def _listings(self, fleet: Fleet, timeout: float) -> dict[str, list[ModelCard]]:
        """What the servers serve that answer, by the id of each of their endpoints."""
        urls = _urls(fleet)
        found = await asyncio.gather(
            *(self.keeper.site(url).cards(timeout) for url in urls), return_exceptions=True
        )
        listings: dict[str, list[ModelCard]] = {}
        errors: list[BaseException] = []
        for url, each in zip(urls, found, strict=True):
            if isinstance(each, BaseException):
                errors.append(each)
            else:
                listings |= dict.fromkeys(_ids(fleet, [url]), each)
        if not listings:
            raise errors[0]
        return listings


class _Round:
    """One way through the servers, to have an adapter at some of them."""

    def __init__(self, keeper: Keeper, adapter: Adapter, check: bool, deadline: float) -> None:
        self.urls: list[str] = []
        """Where it is."""
        self.loaded: list[str] = []
        """Where it was not before."""
        self.failed: dict[str, VllmError] = {}
        self.notes: list[str] = []
        self._keeper = keeper
        self._adapter = adapter
        self._check = check
        self._deadline = deadline

    async def run(self, urls: Sequence[str], count: int) -> None:
        """One server first: what is wrong with the adapter shows there. Then as many at once as
        are lacking; one that has another version goes alone, so that the others carry on."""
        places = await self._look(urls)
        width = 1
        while places and len(self.urls) < count:
            if places[0].version == "other":
                width = 1
            wave = places[: min(width, count - len(self.urls))]
            places = places[len(wave) :]
            await asyncio.gather(*(self._load(place) for place in wave))
            width = count
        if len(self.urls) >= count:
            await self._remove_old([place for place in places if place.version == "other"])

    async def _look(self, urls: Sequence[str]) -> list[Place]:
        """The servers that answer, the best first."""

        async def look(url: str) -> None:
            try:
                await self._keeper.site(url).cards(self._left())
            except VllmError as error:
                self.failed[url] = error

        await asyncio.gather(*map(look, urls))
        here = [url for url in urls if url not in self.failed]
        return by_preference(self._keeper.places(self._adapter, here))

    async def _load(self, place: Place) -> None:
        try:
            was_there = await self._keeper.load(
                place.url, self._adapter, timeout=self._left(), check=self._check
            )
        except VllmError as error:
            self.failed[place.url] = error
            return
        self.urls.append(place.url)
        if not was_there:
            self.loaded.append(place.url)
            slots = self._keeper.site(place.url).slots
            if place.version is None and slots is not None and place.adapters >= slots:
                self.notes.append(
                    f"{place.url} has {place.adapters + 1} adapters now, and slots for {slots} at "
                    "a time (--max-loras): requests for the others wait"
                )

    async def _remove_old(self, places: Iterable[Place]) -> None:
        """Nobody is to be answered by another version."""
        for place in places:
            try:
                await self._keeper.unload(place.url, self._adapter.name, timeout=self._left())
                self.notes.append(f"{place.url} had another version, which was unloaded")
            except VllmError as error:
                self.failed[place.url] = error

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)


def _too_few(result: LoraResult, count: int, servers: int) -> VllmError:
    first = next(iter(result.failed.values()))
    if servers == 1:
        return first
    where = "on no server" if not result.endpoints else f"on {len(result.endpoints)} servers"
    error = AdapterError(
        f"{result.name!r} is {where} in place of {count}; "
        + "; ".join(f"{id}: {error.message}" for id, error in result.failed.items()),
        hint=first.hint,
        endpoints=result.endpoints,
        failed=result.failed,
    )
    error.__cause__ = first
    return error


def _count(replicas: Replicas, servers: int) -> int:
    if replicas == "all":
        return servers
    if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1:
        raise ConfigurationError(f'replicas must be a whole number or "all", not {replicas!r}')
    if replicas > servers:
        raise ConfigurationError(f"replicas is {replicas}, and there are {servers} servers")
    return replicas


def _urls(fleet: Fleet) -> list[str]:
    urls = list(dict.fromkeys(each.url for each in fleet.endpoints if not each.draining))
    if not urls:
        raise ConfigurationError("there is no endpoint, or all of them are draining")
    return urls


def _ids(fleet: Fleet, urls: Sequence[str]) -> tuple[str, ...]:
    return tuple(each.id for each in fleet.endpoints if each.url in urls)


def _with_folder(adapter: Adapter) -> Adapter:
    """With its folder's whole path, if it is on this machine: a server works in a directory of its
    own."""
    folder = folder_here(adapter.path)
    return adapter if folder is None else msgspec.structs.replace(adapter, path=str(folder))


def _seconds(timeout: object) -> float:
    checked: float = check_keywords({"timeout": timeout}).get("timeout", LOAD_SECONDS)
    return checked
