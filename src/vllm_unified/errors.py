"""Every error this library raises, in one tree.

::

    VllmError
     ├── ConfigurationError (ValueError)        a setting, before anything is sent
     ├── BadRequestError (ValueError)           the request; found here, or by the server (400)
     │    └── ContextLengthError                prompt and answer do not fit the model's context
     ├── AuthenticationError                    401
     ├── PermissionDeniedError                  403
     ├── NotFoundError (LookupError)            404, 405: this server has no such thing
     │    └── ModelNotFoundError
     ├── RateLimitError                         429
     ├── ServerError                            5xx
     │    ├── OverloadedError                   503: admission control
     │    ├── EngineDeadError                   the engine behind the server died
     │    ├── GenerationAbortedError            paused, put to sleep or shutting down
     │    ├── NoSuchServerError                 no server of this machine is meant, or several are
     │    ├── QuantizationError                 a server's quantization was not changed
     │    └── UnsupportedError                  501: this model cannot do that
     ├── ConnectError (ConnectionError)         no connection, so nothing was sent
     │    ├── NameResolutionError
     │    ├── TLSError
     │    └── ConnectTimeoutError (TimeoutError)
     ├── ConnectionLostError (ConnectionError)  the connection broke after the request was sent
     │    └── StreamTruncatedError              a stream ended without its end
     ├── RequestTimeoutError (TimeoutError)     a clock of ours ran out
     │    ├── AttemptTimeoutError               of one attempt; the call may have more
     │    ├── QueueTimeoutError                 no slot came free in time; nothing was sent
     │    └── StreamStalledError                nothing came for too long in mid-stream
     ├── ProtocolError                          the answer is not what a vLLM sends
     │    └── ResponseTooLargeError
     ├── AdapterError                           a LoRA adapter cannot be served as asked
     ├── OutputValidationError (ValueError)     the text is not the structure asked for
     ├── QueueFullError                         more callers are waiting than the queue may hold
     ├── CircuitOpenError                       every server is shut out after failures
     ├── ClientClosedError (RuntimeError)       the client, or the stream, was closed
     ├── BatchFileError                         a file of a batch cannot be written
     ├── EngineError                            a vLLM engine cannot be found, installed or removed
     ├── ServerStartError                       a server of ours did not become ready
     ├── NoBackendError (LookupError)           no backend of a hardware layer can take a request
     ├── BackendError                           a backend that is not of this library failed
     └── ContainerError                         a container engine refuses, or fails
          ├── ContainerEngineError              it cannot be reached, or used
          ├── ImageNotFoundError (LookupError)  it does not have the image, nor find it
          └── ContainerConflictError            the port or the name belongs to another
"""

from __future__ import annotations

from typing import Literal

import msgspec

StreamEnding = Literal["complete", "truncated", "error", "stalled", "cancelled"]


class Attempt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One try of a request at one server."""

    endpoint: str
    """Address of the server, without credentials."""
    started_at: float
    """When it began, in seconds since the Unix epoch."""
    duration: float
    """How long it took, in seconds; for a stream, until its answer began."""
    error: str | None = None
    """Why it failed, as ``"ClassName: message"``; ``None`` for the one that succeeded."""
    status_code: int | None = None
    """HTTP status, where there was an answer."""
    backend: str | None = None
    """Name of the backend, where a hardware layer made the call."""


class PartialOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream had delivered when it failed."""

    ending: StreamEnding
    text: str
    """Text of choice 0."""
    texts: tuple[str, ...] = ()
    """Text of every choice, by index."""
    token_ids: tuple[int, ...] = ()
    """Token ids of choice 0, if they were asked for with ``return_token_ids``."""


class VllmError(Exception):
    """Base of all errors of this library.

    ``str(error)`` says what was wrong, where, and what to do about it. Foreign exceptions are
    never raised by the library, but stand in ``__cause__``.
    """

    status_code: int | None
    """HTTP status; for an error frame inside a stream, the code in the frame."""
    retry_after: float | None
    """Seconds that the server asked to wait, if it did."""
    is_transient_error: bool = False
    """Whether the same call may succeed later or on another server."""
    request_id: str | None
    """The id that was sent as ``X-Request-Id``; the server's log names it."""
    endpoint: str | None
    """Address of the server, without credentials."""
    model: str | None
    """The model that was asked for; ``None`` for the server's default."""
    attempts: tuple[Attempt, ...]
    """Every try, in order; the last one is this error's own."""
    partial: PartialOutput | None
    """For a stream: how it ended, and what it had delivered."""
    hint: str | None = None
    """What to do about it."""

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status_code: int | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        endpoint: str | None = None,
        model: str | None = None,
        attempts: tuple[Attempt, ...] = (),
        partial: PartialOutput | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if hint is not None:
            self.hint = hint
        self.status_code = status_code
        self.retry_after = retry_after
        self.request_id = request_id
        self.endpoint = endpoint
        self.model = model
        self.attempts = attempts
        self.partial = partial

    def __str__(self) -> str:
        where = []
        if self.endpoint:
            where.append(f"at {self.endpoint}")
        if self.status_code is not None:
            where.append(f"HTTP {self.status_code}")
        if len(self.attempts) > 1:
            where.append(f"after {len(self.attempts)} attempts")
        text = self.message.rstrip()
        if where:
            text = f"{text} ({', '.join(where)})"
        return f"{text}\n{self.hint}" if self.hint else text


class ConfigurationError(VllmError, ValueError):
    """A setting is unknown, contradictory, or of the wrong type. Nothing was sent."""


class BadRequestError(VllmError, ValueError):
    """The request is wrong: found here before sending, or by the server (400, 422)."""


class ContextLengthError(BadRequestError):
    """The prompt, or prompt and ``max_tokens`` together, exceed the model's context."""

    hint = "Shorten the prompt, lower max_tokens, or serve the model with a larger --max-model-len."


class AuthenticationError(VllmError):
    """401: the key is missing or wrong."""

    hint = "Pass api_key=..., or set VLLM_API_KEY, to the key that the server was started with."


class PermissionDeniedError(VllmError):
    """403: the server refuses this, whatever the key."""


class NotFoundError(VllmError, LookupError):
    """404 or 405: the server has no such address, model, adapter or response."""


class ModelNotFoundError(NotFoundError):
    """The server does not serve the model that was asked for."""

    hint = "list_models() (or `vllm-unified models`) shows the names that this server knows."


class RateLimitError(VllmError):
    """429: too many requests. vLLM itself never sends it; gateways before it do."""

    is_transient_error = True


class ServerError(VllmError):
    """5xx: the server failed."""

    is_transient_error = True


class OverloadedError(ServerError):
    """503: the server is too busy to accept the request (admission control)."""

    hint = "The server is alive but full: send less at once, wait, or add a server."


class EngineDeadError(ServerError):
    """The engine process behind the server died; the server stops or is restarted."""

    hint = "The server's own log has the cause; the server must be restarted."


class GenerationAbortedError(ServerError):
    """The server ended the generation itself (``finish_reason`` "abort", inside a 200)."""

    hint = "The engine was paused, put to sleep or is shutting down; try another server."


class NoSuchServerError(ServerError):
    """What was given means no server that runs on this machine, or more than one."""

    is_transient_error = False


class QuantizationError(ServerError):
    """A server's quantization was not changed; it serves as before, unless the message says not."""

    is_transient_error = False

    def __init__(
        self, message: str, *, step: str = "", log: str = "", hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.step = step
        """The part of the change that failed, such as ``check``, ``start`` or ``prove``."""
        self.log = log
        """The end of the new server's log, where it did not start."""


class UnsupportedError(ServerError):
    """501: the model that is served cannot do what was asked."""

    is_transient_error = False


class ConnectError(VllmError, ConnectionError):
    """No connection could be made, so the request was never sent."""

    is_transient_error = True
    hint = "Is the server running there? `vllm-unified serve` starts one on this machine."


class NameResolutionError(ConnectError):
    """The host's name cannot be resolved."""

    hint = "Check the host name in the URL, and this machine's DNS."


class TLSError(ConnectError):
    """The TLS handshake failed: certificate, host name or protocol."""

    is_transient_error = False
    hint = (
        "Check http:// against https://, and give the CA of a private certificate with "
        "tls=TLSConfig(ca_file=...)."
    )


class ConnectTimeoutError(ConnectError, TimeoutError):
    """The connection was not established in time."""

    hint = "The host does not answer: check address, port and firewall."


class ConnectionLostError(VllmError, ConnectionError):
    """The connection broke after the request was sent, before the answer was whole."""

    is_transient_error = True
    hint = "The server, or a proxy before it, closed the connection: look at its log."


class StreamTruncatedError(ConnectionLostError):
    """A stream closed without a finish reason: what came is in ``partial``, and is not all."""


class RequestTimeoutError(VllmError, TimeoutError):
    """The answer did not come in the time that the call had."""

    is_transient_error = True
    hint = "Give the call more time with timeout=SECONDS, or ask for fewer tokens."


class AttemptTimeoutError(RequestTimeoutError):
    """One attempt took longer than ``attempt_timeout``."""

    hint = "The engine hangs, or is slow: attempt_timeout=SECONDS allows more."


class QueueTimeoutError(RequestTimeoutError):
    """No slot came free within ``queue_timeout``, or before the call's time was up. Nothing was
    sent while it waited."""

    hint = "Send less at once, add a server, or allow more with queue_timeout or timeout."


class StreamStalledError(RequestTimeoutError):
    """A stream was silent for longer than its idle timeout; what came is in ``partial``."""

    hint = "The engine hangs, sleeps or is overloaded; idle_timeout=SECONDS allows more patience."


class ProtocolError(VllmError):
    """The answer is not what a vLLM server sends: not HTTP, not JSON, or of another shape."""

    hint = "Is this the address of a vLLM server, or of something else?"


class ResponseTooLargeError(ProtocolError):
    """The answer, or one event of a stream, exceeds ``max_response_bytes``."""

    hint = "Raise max_response_bytes if an answer of this size is what you want."


class AdapterError(VllmError):
    """A LoRA adapter does not fit a server, or is on fewer servers than was asked for.

    What was loaded before the failure stays loaded, and is in ``endpoints``."""

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status_code: int | None = None,
        endpoint: str | None = None,
        endpoints: tuple[str, ...] = (),
        failed: dict[str, VllmError] | None = None,
    ) -> None:
        super().__init__(message, hint=hint, status_code=status_code, endpoint=endpoint)
        self.endpoints = endpoints
        """Ids of the endpoints that have it as it was asked for."""
        self.failed = failed or {}
        """Why the others have not, by their id."""


class OutputValidationError(VllmError, ValueError):
    """The model's text does not have the structure of ``response_model``."""

    def __init__(self, message: str, *, text: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.text = text
        """The whole text, as the model wrote it."""


class QueueFullError(VllmError):
    """As many callers wait for this endpoint as its queue may hold. Nothing was sent."""

    is_transient_error = True
    hint = "Send less at once, or raise queue_size or max_concurrent_requests."


class CircuitOpenError(VllmError):
    """Every server that could answer failed too often, and is tried again only now and then.

    Nothing was sent; ``retry_after`` says when the next try is due, ``__cause__`` is the last
    failure."""

    is_transient_error = True
    hint = "Are the servers running? test_endpoint() and `vllm-unified endpoints` show how they do."


class ClientClosedError(VllmError, RuntimeError):
    """The client, or this stream of it, was closed; make a new one."""


class BatchFileError(VllmError):
    """A file of a batch, its output or its ledger, cannot be written: the disk is full, say.

    What is in the ledger stays there."""


class EngineError(VllmError):
    """A vLLM engine cannot be found, installed or removed on this machine."""


class ServerStartError(VllmError):
    """A server of ours did not become ready; the message has the engine's own words."""

    def __init__(self, message: str, *, log: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.log = log
        """The end of the server's log."""


class NoBackendError(VllmError, LookupError):
    """No backend of a hardware layer can take this request; the hint says why, of each."""


class BackendError(VllmError):
    """A backend that is not of this library raised something; that is ``__cause__``.

    Transient, unless its class says that the request or the program is wrong (``ValueError``,
    ``TypeError``, ``LookupError`` and their like)."""


class ContainerError(VllmError):
    """A container engine (Docker, Podman) refuses what was asked, or fails; in its own words."""


class ContainerEngineError(ContainerError):
    """The container engine cannot be reached: not there, not allowed, or not understood."""


class ImageNotFoundError(ContainerError, LookupError):
    """The container engine does not have the image; or its registry does not, or refuses it."""


class ContainerConflictError(ContainerError):
    """Another container or program has the port, or the name."""
