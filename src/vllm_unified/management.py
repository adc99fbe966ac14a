"""What whoever runs the servers asks of a client: the part of its surface beside generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_unified.balancer import Balanced, Where
from vllm_unified.endpoints.health import Health, best_health
from vllm_unified.fleet.directory import Directory
from vllm_unified.fleet.fleet import Fleet
from vllm_unified.models.info import ModelInfo
from vllm_unified.models.lora.adapters import LoraAdapter, LoraResult, wanted_adapter
from vllm_unified.models.quantization import (
    QuantizationConfig,
    QuantizationResult,
    StepProgress,
    quantization_config,
)
from vllm_unified.models.statistics import ModelStatistics
from vllm_unified.results import ModelCard
from vllm_unified.wire import responses
from vllm_unified.wire.requests import get_request

# What most programs never need is imported when it is needed.
if TYPE_CHECKING:
    from vllm_unified.models.lora.operations import Lora
    from vllm_unified.models.lora.placement import Replicas
    from vllm_unified.models.reader import StatisticsReader
    from vllm_unified.servers.held import HeldServers


class Management:
    """The methods of a client that look at servers and change what they serve."""

    _directory: Directory

    async def list_models(
        self, endpoint_url: Where = None, *, timeout: float | None = None
    ) -> list[ModelCard]:
        """The names that a server answers to: models, their aliases and LoRA adapters."""
        fleet = self._route(endpoint_url)
        return await fleet.send(
            get_request("/v1/models"),
            fleet.settings.for_call({"timeout": timeout}),
            lambda body, _: responses.decode_models(body),
        )

    async def health(
        self, endpoint_url: Where = None, *, probe: bool = False, timeout: float = 5.0
    ) -> Health:
        """Whether a server is well, or the best one of several. Never raises for one that is not.

        ``/health`` answers 200 for an engine that hangs, sleeps or is paused.

        Args:
            probe: Prove it: generate one token as well.
            timeout: Seconds that the server has.
        """
        endpoints = self._route(endpoint_url).endpoints
        return await best_health(endpoints, probe=probe, timeout=timeout)

    async def get_model_info(
        self, endpoint_url: Where = None, model: str | None = None, *, timeout: float = 10.0
    ) -> ModelInfo:
        """What is known of a model: its context, dtype, quantization, devices; and from where.

        Nothing is generated for it, and nothing guessed: what no source tells is ``None``. Of
        several servers, the first that serves it is asked.

        Args:
            model: A name, an alias or a LoRA adapter; ``None`` for the default, or the first.
            timeout: Seconds that each source has. In development mode vLLM takes some to answer
                for the first time.

        Raises:
            ModelNotFoundError: it is not served there; says what is.
        """
        from vllm_unified.models.inspection import inspect_model

        endpoints = self._route(endpoint_url).endpoints
        return await inspect_model(endpoints, model, timeout=timeout)

    async def get_model_statistics(
        self,
        endpoint_url: Where = None,
        model: str | None = None,
        *,
        window: float | None = None,
        timeout: float = 10.0,
    ) -> ModelStatistics:
        """What servers did with a model, for everybody, by their own counters.

        :meth:`get_stats` has this client's view of its own requests.

        Args:
            endpoint_url: A server; a load balancer for the sums over its servers.
            model: A name, an alias or a LoRA adapter, of which the base model counts; ``None`` for
                the default, or the only one.
            window: Seconds to look at: all that is counted is of them, and it takes so long.
                ``None``: since the servers started, but the throughput since this client asked
                last.
            timeout: Seconds that a server has for each question.

        Raises:
            ModelNotFoundError: it is not served there; says what is.
            NotFoundError: the server runs with ``--disable-log-stats``.
            ProtocolError: its ``/metrics`` cannot be read.
        """
        endpoints = self._route(endpoint_url).endpoints
        return await self._statistics.read(endpoints, model, window=window, timeout=timeout)

    @cached_property
    def _statistics(self) -> StatisticsReader:
        from vllm_unified.models.reader import StatisticsReader

        return StatisticsReader()

    async def list_lora_adapters(
        self, endpoint_url: Where = None, *, timeout: float = 10.0
    ) -> list[LoraAdapter]:
        """The LoRA adapters of a server, or of all servers of a fleet that answer within
        ``timeout`` seconds.

        Raises:
            VllmError: no server answers.
        """
        return await self._adapters.listed(self._route(endpoint_url), timeout=timeout)

    async def load_lora_adapter(
        self,
        endpoint_url: Where = None,
        adapter: Mapping[str, Any] | None = None,
        *,
        adapter_name: str | None = None,
        adapter_path: str | None = None,
        base_model: str | None = None,
        replicas: Replicas | None = None,
        keep: bool = True,
        on_demand: bool = False,
        max_adapters: int | None = None,
        check: bool = True,
        timeout: float = 120.0,
    ) -> LoraResult:
        """Load a LoRA adapter, and prove it by a token; another version of it is replaced without
        an error for running requests.

        Requests choose it with ``model`` or ``lora_adapter``, and go where it is.

        Args:
            adapter: ``adapter_name``, ``adapter_path`` (a folder where the server runs, or a
                repository) and perhaps ``base_model``, in snake_case or camelCase; or as keywords.
            replicas: How many servers of a fleet get it, those with the fewest adapters first;
                ``"all"``, the default, also those that join later, if it is kept.
            keep: Load it again where it gets lost, for as long as this client lives: a server
                forgets its adapters when it is restarted.
            on_demand: Load it when a request asks for it, and not now.
            max_adapters: How many adapters on demand a server may have; by default as many as it
                has slots, or 8 where it does not say. The least recently used gives way.
            check: Compare its files with the server's model, where they can be read from here.
            timeout: Seconds for all of it.

        Raises:
            AdapterError: it does not fit, a server refuses it, or fewer servers have it than were
                wanted; what was loaded stays.
            ConfigurationError: an argument is wrong.
            VllmError: the server does not answer.
        """
        from vllm_unified.models.lora.registry import Registration

        keywords = {
            "adapter_name": adapter_name,
            "adapter_path": adapter_path,
            "base_model": base_model,
        }
        wanted = Registration(
            wanted_adapter(adapter, keywords),
            self._route(endpoint_url),
            "all" if replicas is None else replicas,
            keep=keep and not on_demand,
            on_demand=on_demand,
            max_adapters=max_adapters,
        )
        return await self._adapters.load(wanted, check=check, timeout=timeout)

    async def unload_lora_adapter(
        self, endpoint_url: Where = None, name: str = "", *, timeout: float = 30.0
    ) -> LoraResult:
        """Unload a LoRA adapter at a server, or at all servers of a fleet, and keep it no more.
        Requests that run with it go on. ``timeout`` is in seconds.

        Raises:
            NotFoundError: there is no such adapter.
            AdapterError: a server still has it, or does not answer.
            VllmError: the only server does not answer.
        """
        return await self._adapters.unload(self._route(endpoint_url), name, timeout=timeout)

    @cached_property
    def _adapters(self) -> Lora:
        from vllm_unified.models.lora.operations import Lora

        return Lora(self._directory)

    async def set_quantization(
        self,
        endpoint_url: Where = None,
        model: str | None = None,
        config: Mapping[str, Any] | QuantizationConfig | None = None,
        *,
        progress: Callable[[StepProgress], object] | None = None,
        **keywords: Any,
    ) -> QuantizationResult:
        """Have a server of this machine serve its model with other weights, without an error for
        running requests.

        vLLM fixes how weights are stored when it starts. So a new server is started, with a
        checkpoint that is made if there is none; it is compared with the old one, gets the
        requests of all who hold that one, and takes its place. Until then nothing changes: what
        fails, or is cancelled, leaves the old server as it was. This client's calls with the old
        address go to the new one.

        Args:
            endpoint_url: A server that ``local()``, :class:`LocalServer` or ``vllm-unified serve``
                started on this machine.
            model: Its model, to be sure; ``None``: whatever it serves.
            config: ``enabled``, and perhaps ``method`` (``awq``, ``w8a8``, ``fp8``, ...), ``bits``,
                ``checkpoint`` and the other fields of :class:`QuantizationConfig`, in snake_case or
                camelCase; times in seconds. ``enabled=False`` goes back to the plain model.
            progress: Told of each step as it goes on; ``print`` will do.
            keywords: The same as ``config``; they win.

        Raises:
            ConfigurationError: the configuration is wrong.
            QuantizationError: it cannot be done, or failed, and the server serves as before. For
                a server of somebody else's it says how that would have to be started.
        """
        from vllm_unified.servers.rollouts.quantizing import set_quantization

        wanted = quantization_config(config, keywords)
        return await set_quantization(self, endpoint_url, model, wanted, progress)

    @cached_property
    def _held(self) -> HeldServers:
        from vllm_unified.servers.held import HeldServers

        return HeldServers(self._directory)

    def _route(self, where: Where) -> Fleet:
        return self._directory.route(where.fleet if isinstance(where, Balanced) else where)
