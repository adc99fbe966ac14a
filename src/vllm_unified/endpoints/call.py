"""One call: its id, its attempts, and what they add to a result or an error."""

from __future__ import annotations

import time
from random import getrandbits
from typing import TYPE_CHECKING

from vllm_unified.errors import Attempt, VllmError
from vllm_unified.results import ContinuationNote, ResultMetadata
from vllm_unified.settings import Settings
from vllm_unified.wire.requests import WireRequest

if TYPE_CHECKING:
    from vllm_unified.endpoints.endpoint import Endpoint
    from vllm_unified.endpoints.stats import StatsCell


class Call:
    """A request on its way, over all of its attempts."""

    __slots__ = (
        "_attempt_started",
        "attempts",
        "cell",
        "continuations",
        "endpoint",
        "error",
        "meant_for",
        "queue_wait",
        "request",
        "request_id",
        "settings",
        "started",
        "tried",
        "waiting",
    )

    def __init__(self, request: WireRequest, settings: Settings) -> None:
        self.request = request
        self.settings = settings
        self.request_id = request.request_id or getrandbits(96).to_bytes(12).hex()
        self.attempts: list[Attempt] = []
        self.cell: StatsCell | None = None
        """Where the numbers of the last attempt are kept, also when its endpoint is removed."""
        self.continuations: tuple[ContinuationNote, ...] = ()
        self.endpoint: Endpoint | None = None
        """Of the attempt that began last."""
        self.meant_for: str | None = None
        """Address of the only endpoint that it can go to."""
        self.tried: set[str] = set()
        """Ids of the endpoints where it failed."""
        self.error: VllmError | None = None
        """Why the last attempt failed."""
        self.queue_wait = 0.0
        """Seconds in line, over all attempts."""
        self.waiting = False
        """Whether it stands in line now."""
        self.started = time.monotonic()
        """Monotonic seconds."""
        self._attempt_started: float | None = None

    def twin(self) -> Call:
        """The same call, for an attempt at the same time; both have one list of attempts."""
        twin = Call(self.request, self.settings)
        twin.request_id, twin.started = self.request_id, self.started
        twin.attempts, twin.tried = self.attempts, self.tried
        twin.endpoint = self.endpoint
        return twin

    @property
    def elapsed(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.started

    @property
    def place(self) -> str:
        """Id of the endpoint of the last attempt; ``""`` if there was none."""
        return "" if self.endpoint is None else self.endpoint.id

    def headers(self, endpoint: Endpoint) -> dict[str, str]:
        """The headers of an attempt there; the caller's own win, however they are spelled."""
        headers = {**endpoint.headers, "X-Request-Id": self.request_id}
        if self.request.body is not None:
            headers["Content-Type"] = "application/json"
        if endpoint.settings.headers or self.settings.headers:
            own = {**endpoint.settings.headers, **self.settings.headers}
            lower = {name.lower() for name in own}
            headers = {name: value for name, value in headers.items() if name.lower() not in lower}
            headers.update(own)
        return headers

    def begin(self) -> None:
        """The call begins now, and not when it was made."""
        self.started = time.monotonic()

    def begin_attempt(self, endpoint: Endpoint, now: float) -> None:
        """An attempt starts at this endpoint."""
        self.endpoint = endpoint
        self.cell = None
        self._attempt_started = now

    def end_attempt(self, error: VllmError | None = None) -> None:
        """The attempt that began last is over. One that looked like a success may fail later."""
        if error is not None:
            self._censor(error)
            self.error = error
            self.tried.add(self.place)
        if self._attempt_started is None:
            self._fail_last_attempt(error)
            return
        assert self.endpoint is not None
        url, duration = self.endpoint.url, time.monotonic() - self._attempt_started
        began = time.time() - duration
        self._attempt_started = None
        if error is None:
            attempt = Attempt(endpoint=url, started_at=began, duration=duration)
        else:
            words, status = self.words(error), error.status_code
            attempt = Attempt(
                endpoint=url, started_at=began, duration=duration, error=words, status_code=status
            )
        self.attempts.append(attempt)

    def _fail_last_attempt(self, error: VllmError | None) -> None:
        if error is not None and self.attempts and self.attempts[-1].error is None:
            last = self.attempts[-1]
            self.attempts[-1] = Attempt(
                endpoint=last.endpoint,
                started_at=last.started_at,
                duration=last.duration,
                error=self.words(error),
                status_code=error.status_code,
            )

    def metadata(self, *, time_to_first_token: float | None = None) -> ResultMetadata:
        """What a result says about how it came about."""
        return ResultMetadata(
            endpoint="" if self.endpoint is None else self.endpoint.url,
            request_id=self.request_id,
            duration=time.monotonic() - self.started,
            time_to_first_token=time_to_first_token,
            attempts=tuple(self.attempts),
            continuations=self.continuations,
        )

    def complete_error(self, error: VllmError) -> VllmError:
        """The error, with all that is known of the call, and without its key."""
        self._censor(error)
        error.endpoint = self.meant_for if self.endpoint is None else self.endpoint.url
        error.request_id = self.request_id
        error.model = self.request.model
        error.attempts = tuple(self.attempts)
        return error

    def _censor(self, error: VllmError) -> None:
        error.message = self._without_key(error.message)
        error.args = (error.message,)

    def words(self, error: VllmError) -> str:
        """The error in one line, without the key."""
        return f"{type(error).__name__}: {self._without_key(error.message)}"

    def _without_key(self, text: str) -> str:
        """Gateways quote the key that they refuse, and an echo quotes the whole request."""
        for settings in (self.settings, None if self.endpoint is None else self.endpoint.settings):
            key = None if settings is None else settings.api_key
            if key is not None and key.reveal():
                text = text.replace(key.reveal(), "***")
        return text
