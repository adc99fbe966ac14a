"""Reads the statistics of servers, and remembers when it did so last."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import msgspec

from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.errors import (
    BadRequestError,
    ConfigurationError,
    ModelNotFoundError,
    RequestTimeoutError,
    VllmError,
)
from vllm_unified.models.asking import ask, read_page
from vllm_unified.models.metrics import Scrape
from vllm_unified.models.served import base_name
from vllm_unified.models.statistics import (
    ModelStatistics,
    Tally,
    check_series,
    statistics_of,
    tally,
    was_restarted,
)
from vllm_unified.wire.responses import decode_models


class _Look(msgspec.Struct, frozen=True):
    """What one server said."""

    endpoint: Endpoint
    model: str
    tally: Tally
    restarted: bool


class StatisticsReader:
    """Of one client: its throughputs are of the time since it asked last."""

    def __init__(self) -> None:
        self._last: WeakKeyDictionary[Endpoint, Scrape] = WeakKeyDictionary()

    async def read(
        self,
        endpoints: Sequence[Endpoint],
        model: str | None,
        *,
        window: float | None,
        timeout: float,
    ) -> ModelStatistics:
        """The statistics of all of them together, and of each.

        Raises:
            BadRequestError: ``window`` is no time.
            VllmError: none of them answers, or serves the model; the first one's.
        """
        if window is not None and not 0 < window < math.inf:
            raise BadRequestError(f"window must be a positive number of seconds, not {window!r}")
        members = _each_server_once(endpoints)
        found = await asyncio.gather(
            *(self._look(endpoint, model, window, timeout) for endpoint in members),
            return_exceptions=True,
        )
        looks = [each for each in found if isinstance(each, _Look)]
        errors = {
            endpoint.id: each
            for endpoint, each in zip(members, found, strict=True)
            if isinstance(each, BaseException)
        }
        for error in errors.values():
            if not looks or not isinstance(error, VllmError):
                raise error
        return _model_statistics(looks, errors)

    async def _look(
        self, endpoint: Endpoint, model: str | None, window: float | None, timeout: float
    ) -> _Look:
        wanted = await _base(endpoint, model or endpoint.settings.model, timeout)
        last = self._last.get(endpoint)
        since = None
        if window is not None:
            last = since = await self._scrape(endpoint, timeout)
            await asyncio.sleep(window)
        now = await self._scrape(endpoint, timeout)
        name = _label(now, wanted)
        before = None if last is None else last.of(name)
        return _Look(
            endpoint,
            name,
            tally(now.of(name), since=None if since is None else since.of(name), last=before),
            before is not None and was_restarted(before, now.of(name)),
        )

    async def _scrape(self, endpoint: Endpoint, timeout: float) -> Scrape:
        def read(body: bytes) -> Scrape:
            scrape = read_page(body)
            check_series(scrape)
            return scrape

        scrape = self._last[endpoint] = await ask(endpoint, "/metrics", read, timeout)
        return scrape


async def _base(endpoint: Endpoint, model: str | None, timeout: float) -> str | None:
    """The name that the series of this model have; the model's own where no list is to be had."""
    if model is None:
        return None
    try:
        cards = await ask(endpoint, "/v1/models", decode_models, timeout)
    except (ConnectionError, RequestTimeoutError):
        raise
    except VllmError:
        return model
    try:
        return base_name(cards, model)
    except ModelNotFoundError as error:
        error.endpoint = endpoint.url
        raise


def _label(scrape: Scrape, wanted: str | None) -> str:
    names = scrape.models
    if wanted in names:
        return str(wanted)
    if len(names) > 1 and wanted is not None:
        raise ModelNotFoundError(
            f"/metrics has nothing about {wanted!r}, only about {', '.join(names)}"
        )
    return names[0] if names else wanted or ""


def _each_server_once(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    """Two endpoints may be one server with two keys; its numbers count once."""
    by_url: dict[str, Endpoint] = {}
    for endpoint in endpoints:
        by_url.setdefault(endpoint.url, endpoint)
    if not by_url:
        raise ConfigurationError("there is no endpoint to look at")
    return list(by_url.values())


def _model_statistics(looks: Sequence[_Look], errors: dict[str, BaseException]) -> ModelStatistics:
    intervals = [look.tally.interval for look in looks if look.tally.interval is not None]
    return ModelStatistics(
        model=looks[0].model,
        endpoint=", ".join(look.endpoint.url for look in looks),
        statistics=statistics_of([look.tally for look in looks]),
        interval=max(intervals, default=None),
        restarted=any(look.restarted for look in looks),
        endpoints={look.endpoint.id: statistics_of([look.tally]) for look in looks},
        unavailable={
            id: " ".join(f"{type(error).__name__}: {getattr(error, 'message', error)}".split())
            for id, error in errors.items()
        },
    )
