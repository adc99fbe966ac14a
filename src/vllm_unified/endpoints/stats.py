"""What became of the requests: counted once, and shown by endpoint, by model and overall. Pure.

All of it belongs to one event loop: whoever asks from another thread asks through that loop.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from vllm_unified.endpoints.histogram import BUCKET_BOUNDS, Distribution, Histogram

MAX_MODELS = 256
"""Names of models that one collector tells apart: a server may be asked for any."""
OTHER_MODELS = "other"
"""The model that all further ones are counted as."""
NO_ENDPOINT = ""
"""The endpoint of calls that were never sent."""

PROMETHEUS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class EndpointStats(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of an endpoint, of a model, or of all.

    A call is counted where it ended, a try where it was made.
    """

    requests: int
    """Calls that ended: ``success`` + ``errors`` + ``cancelled``."""
    success: int
    errors: int
    cancelled: int
    """Calls that the caller left; no errors."""
    errors_by_class: dict[str, int]
    """``errors``, by the name of the exception's class."""
    attempts: int
    """Tries that were begun."""
    retries: int
    """Of the tries, those after a call's first one."""
    failed_attempts: dict[str, int]
    """Tries that failed, by the name of the exception's class, whatever became of the call."""
    prompt_tokens: int
    completion_tokens: int
    continued: int
    """Streams that broke here and went on elsewhere."""
    hedged: int
    """Tries that ran beside another one of their call."""
    in_flight: int | None
    """Now; ``None`` for a model, of which it is not known."""
    queue_wait: Distribution | None
    """From the call until it could be sent; ``None``, as below, if nothing was recorded."""
    time_to_first_token: Distribution | None
    between_tokens: Distribution | None
    duration: Distribution | None
    """From the call to the whole answer, of calls that succeeded."""

    @property
    def success_rate(self) -> float | None:
        """Of the calls that were not cancelled, those that succeeded; ``None`` without any."""
        ended = self.success + self.errors
        return self.success / ended if ended else None


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of one model at one endpoint."""

    endpoint: str
    model: str
    stats: EndpointStats


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """All numbers at one moment."""

    since: float
    """Unix time, in seconds, of the start or the last reset of everything."""
    until: float
    """Unix time, in seconds, of this snapshot."""
    overall: EndpointStats
    """The sum over the models, and so over the endpoints, those included that are forgotten."""
    endpoints: dict[str, EndpointStats]
    """By endpoint; calls that were never sent are at ``""``."""
    models: dict[str, EndpointStats]
    series: tuple[Series, ...] = ()
    """What Prometheus gets, which makes the sums itself."""

    def to_json(self) -> bytes:
        """The three views and their time. Durations are in seconds."""
        shown = [name for name in self.__struct_fields__ if name != "series"]
        return msgspec.json.encode({name: getattr(self, name) for name in shown})

    def to_prometheus(self) -> str:
        """The series in Prometheus' text format, version 0.0.4.

        It is to be served with ``PROMETHEUS_CONTENT_TYPE``. The series of a forgotten endpoint are
        absent: to Prometheus they end.
        """
        return "".join(f"{line}\n" for line in _exposition(self))


class StatsCell:
    """The numbers of one model at one endpoint, as they grow.

    A call holds its cell, and not the cell's histograms, from its beginning to its end: so what
    it records is counted also when the endpoint is forgotten in the meantime.
    """

    def __init__(self) -> None:
        self.success = 0
        self.cancelled = 0
        self.attempts = 0
        self.retries = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.continued = 0
        self.hedged = 0
        self.errors_by_class: Counter[str] = Counter()
        self.failed_attempts: Counter[str] = Counter()
        self.queue_wait = Histogram()
        self.time_to_first_token = Histogram()
        self.between_tokens = Histogram()
        self.duration = Histogram()

    def attempt(self, *, retry: bool) -> None:
        """A try begins here; ``retry`` if its call had another one before, wherever."""
        self.attempts += 1
        if retry:
            self.retries += 1

    def failed_attempt(self, error: str) -> None:
        """A try failed here. ``error`` is the name of the exception's class."""
        self.failed_attempts[error] += 1

    def finished(
        self,
        *,
        duration: float,
        error: str | None = None,
        cancelled: bool = False,
        queue_wait: float | None = None,
        time_to_first_token: float | None = None,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
    ) -> None:
        """A call ended here: with success, unless ``error`` or ``cancelled`` says otherwise.

        Args:
            duration: Seconds since the call began. It is recorded for success only: errors are
                often fast, and would make an overloaded server look so ("Monitoring Distributed
                Systems" in Beyer et al., "Site Reliability Engineering", 2016).
            error: Name of the exception's class.
            cancelled: Whether the caller left; then ``error`` is not counted.
            queue_wait: Seconds from the call until it could be sent, or gave up waiting.
            time_to_first_token: Seconds from the call to the first token, if there was one.
            prompt_tokens: As far as they are known, whatever the end.
            completion_tokens: The same.
        """
        if cancelled:
            self.cancelled += 1
        elif error is not None:
            self.errors_by_class[error] += 1
        else:
            self.success += 1
            self.duration.record(duration)
        if queue_wait is not None:
            self.queue_wait.record(queue_wait)
        if time_to_first_token is not None:
            self.time_to_first_token.record(time_to_first_token)
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def merge(self, other: StatsCell) -> None:
        """Add another's numbers to these."""
        self.success += other.success
        self.cancelled += other.cancelled
        self.attempts += other.attempts
        self.retries += other.retries
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.continued += other.continued
        self.hedged += other.hedged
        self.errors_by_class.update(other.errors_by_class)
        self.failed_attempts.update(other.failed_attempts)
        self.queue_wait.merge(other.queue_wait)
        self.time_to_first_token.merge(other.time_to_first_token)
        self.between_tokens.merge(other.between_tokens)
        self.duration.merge(other.duration)

    def become(self, heir: StatsCell) -> None:
        """Hand the numbers over, and be one with the heir from now on."""
        heir.merge(self)
        # Calls on their way hold this object, and will record into it.
        self.__dict__ = heir.__dict__

    def clear(self) -> None:
        """Start at zero, in place."""
        self.__dict__.update(StatsCell().__dict__)

    def stats(self, *, in_flight: int | None) -> EndpointStats:
        """The numbers now."""
        errors = self.errors_by_class.total()
        return EndpointStats(
            requests=self.success + errors + self.cancelled,
            success=self.success,
            errors=errors,
            cancelled=self.cancelled,
            errors_by_class=dict(self.errors_by_class),
            attempts=self.attempts,
            retries=self.retries,
            failed_attempts=dict(self.failed_attempts),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            continued=self.continued,
            hedged=self.hedged,
            in_flight=in_flight,
            queue_wait=self.queue_wait.distribution(),
            time_to_first_token=self.time_to_first_token.distribution(),
            between_tokens=self.between_tokens.distribution(),
            duration=self.duration.distribution(),
        )


class StatsCollector:
    """A cell for every endpoint and model, and the sums over them.

    Memory is bounded by the endpoints, times ``max_models`` + 1 cells of about 8 kB, and
    40 kB at most, once every bucket of a cell holds a large number.
    """

    def __init__(self, *, now_unix: float, max_models: int = MAX_MODELS) -> None:
        """``now_unix`` is in seconds."""
        self._since = now_unix
        self._max_models = max_models
        self._models: set[str] = set()
        self._cells: defaultdict[tuple[str, str], StatsCell] = defaultdict(StatsCell)
        self._forgotten: defaultdict[str, StatsCell] = defaultdict(StatsCell)

    def cell(self, endpoint: str, model: str) -> StatsCell:
        """Where to record. To be asked for once a call, when it begins.

        After ``max_models`` names, further models share the cell of ``OTHER_MODELS``.
        """
        found = self._cells.get((endpoint, model))
        return self._cells[endpoint, self._known(model)] if found is None else found

    def snapshot(self, in_flight: Mapping[str, int], now_unix: float) -> Statistics:
        """All numbers now.

        Args:
            in_flight: Requests by endpoint. Its endpoints are shown also without any request.
            now_unix: Unix time, in seconds.
        """
        endpoints, models, overall = self._sums()
        ids = dict.fromkeys([*in_flight, *endpoints])
        return Statistics(
            since=self._since,
            until=now_unix,
            overall=overall.stats(in_flight=sum(in_flight.values())),
            endpoints={id: endpoints[id].stats(in_flight=in_flight.get(id, 0)) for id in ids},
            models={model: cell.stats(in_flight=None) for model, cell in models.items()},
            series=tuple(
                Series(endpoint=endpoint, model=model, stats=cell.stats(in_flight=None))
                for (endpoint, model), cell in self._cells.items()
            ),
        )

    def endpoint(self, endpoint: str, in_flight: int) -> EndpointStats:
        """The numbers of one endpoint now; zeros for one that nothing is known of."""
        return _sum(self._cells_of(endpoint)).stats(in_flight=in_flight)

    def reset(self, endpoint: str | None = None, *, now_unix: float) -> None:
        """Start at zero: all numbers, or those of one endpoint.

        The sums are without them then. Cells stay valid. ``since`` is ``now_unix``, in seconds,
        after a reset of everything, and is kept by one of an endpoint.
        """
        if endpoint is not None:
            _clear(self._cells_of(endpoint))
            return
        _clear(self._cells.values())
        _clear(self._forgotten.values())
        self._since = now_unix

    def forget(self, endpoint: str) -> None:
        """An endpoint is gone: it is shown no more, but the sums by model and overall keep it.

        What calls on their way still record into its cells is added to those sums.
        """
        for key in [key for key in self._cells if key[0] == endpoint]:
            self._cells.pop(key).become(self._forgotten[key[1]])

    def _known(self, model: str) -> str:
        if model not in self._models and len(self._models) >= self._max_models:
            return OTHER_MODELS
        self._models.add(model)
        return model

    def _cells_of(self, endpoint: str) -> list[StatsCell]:
        return [cell for (id, _), cell in self._cells.items() if id == endpoint]

    def _sums(self) -> tuple[defaultdict[str, StatsCell], dict[str, StatsCell], StatsCell]:
        """By endpoint, by model, overall."""
        endpoints: defaultdict[str, StatsCell] = defaultdict(StatsCell)
        models: defaultdict[str, StatsCell] = defaultdict(StatsCell)
        for (endpoint, model), cell in self._cells.items():
            endpoints[endpoint].merge(cell)
            models[model].merge(cell)
        for model, cell in self._forgotten.items():
            models[model].merge(cell)
        return endpoints, models, _sum(models.values())


def _sum(cells: Iterable[StatsCell]) -> StatsCell:
    total = StatsCell()
    for cell in cells:
        total.merge(cell)
    return total


def _clear(cells: Iterable[StatsCell]) -> None:
    for cell in cells:
        cell.clear()


_Labels = Mapping[str, str]

_COUNTERS = {
    "errors_by_class": ("errors_total", "Calls that failed, by class of exception."),
    "attempts": ("attempts_total", "Tries that were begun."),
    "retries": ("retries_total", "Tries after the first one of their call."),
    "failed_attempts": ("failed_attempts_total", "Tries that failed, by class of exception."),
    "prompt_tokens": ("prompt_tokens_total", "Tokens of prompts."),
    "completion_tokens": ("completion_tokens_total", "Tokens of answers."),
    "continued": ("continued_streams_total", "Streams that broke here and went on elsewhere."),
    "hedged": ("hedged_attempts_total", "Tries that ran beside another one of their call."),
}
_HISTOGRAMS = {
    "queue_wait": ("queue_wait_seconds", "From the call until it could be sent."),
    "time_to_first_token": ("time_to_first_token_seconds", "From the call to the first token."),
    "between_tokens": ("time_between_tokens_seconds", "From one token to the next."),
    "duration": ("request_duration_seconds", "From the call to the whole answer, on success."),
}


def _exposition(statistics: Statistics) -> Iterator[str]:
    """All lines; the samples of a metric stand together, as the format asks."""
    labelled = [({"endpoint": s.endpoint, "model": s.model}, s.stats) for s in statistics.series]
    yield from _head("in_flight_requests", "gauge", "Requests that are in flight.")
    for id, stats in statistics.endpoints.items():
        yield _sample("in_flight_requests", {"endpoint": id}, stats.in_flight or 0)
    yield from _head("requests_total", "counter", "Calls that ended, by outcome.")
    for labels, stats in labelled:
        for outcome, count in _outcomes(stats).items():
            yield _sample("requests_total", {**labels, "outcome": outcome}, count)
    for field, (name, text) in _COUNTERS.items():
        yield from _head(name, "counter", text)
        for labels, stats in labelled:
            yield from _counter(name, labels, getattr(stats, field))
    for field, (name, text) in _HISTOGRAMS.items():
        yield from _head(name, "histogram", text)
        for labels, stats in labelled:
            yield from _histogram(name, labels, getattr(stats, field))


def _outcomes(stats: EndpointStats) -> dict[str, int]:
    return {"success": stats.success, "error": stats.errors, "cancelled": stats.cancelled}


def _counter(name: str, labels: _Labels, value: int | dict[str, int]) -> Iterator[str]:
    if isinstance(value, int):
        yield _sample(name, labels, value)
        return
    for error, count in value.items():
        yield _sample(name, {**labels, "error": error}, count)


def _histogram(name: str, labels: _Labels, value: Distribution | None) -> Iterator[str]:
    if value is None:
        return
    for bound, count in zip(BUCKET_BOUNDS, value.buckets, strict=True):
        yield _sample(f"{name}_bucket", {**labels, "le": str(bound)}, count)
    yield _sample(f"{name}_bucket", {**labels, "le": "+Inf"}, value.count)
    yield _sample(f"{name}_sum", labels, value.sum)
    yield _sample(f"{name}_count", labels, value.count)


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP vllm_unified_{name} {text}"
    yield f"# TYPE vllm_unified_{name} {kind}"


def _sample(name: str, labels: _Labels, value: float) -> str:
    pairs = ",".join(f'{label}="{_escape(text)}"' for label, text in labels.items())
    return f"vllm_unified_{name}{{{pairs}}} {value}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
