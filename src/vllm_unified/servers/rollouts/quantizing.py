"""A client's ``set_quantization``: whose server it is, and what can be done with it."""

from __future__ import annotations

import os
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_unified.balancer import Where
from vllm_unified.errors import (
    ConfigurationError,
    EngineError,
    ModelNotFoundError,
    NoSuchServerError,
    QuantizationError,
)
from vllm_unified.models.info import ModelInfo
from vllm_unified.models.quantization import (
    METHODS,
    Quantization,
    QuantizationConfig,
    QuantizationResult,
    ServerFigures,
    StepProgress,
    is_as_asked,
)
from vllm_unified.servers.bundled import ensure_bundled_model
from vllm_unified.servers.engines import Progress, find_engine
from vllm_unified.servers.finding import find_server
from vllm_unified.servers.local import LocalServer
from vllm_unified.servers.rollouts.checkpoints import ensure_checkpoint
from vllm_unified.servers.rollouts.facts import gather_facts
from vllm_unified.servers.rollouts.preflight import check
from vllm_unified.servers.rollouts.rollout import Rollout
from vllm_unified.servers.rollouts.successor import successor
from vllm_unified.servers.spec import BUNDLED, ServerSpec, resolved

if TYPE_CHECKING:
    from vllm_unified.management import Management


async def set_quantization(
    client: Management,
    where: Where,
    model: str | None,
    config: QuantizationConfig,
    progress: Callable[[StepProgress], object] | None = None,
) -> QuantizationResult:
    """See :meth:`Management.set_quantization`."""
    url = one_server([endpoint.url for endpoint in client._route(where).endpoints])
    if not _runs_here(url):
        return await _of_others(client, where, url, model, config)
    held = client._held.at(url)
    server = held or await LocalServer.attach(url)
    try:
        if model not in (None, server.model, *server.spec.aliases):
            raise ModelNotFoundError(
                f"the server at {url} serves {server.model}, not {model}", endpoint=url, model=model
            )
        return await Rollout(server, config, client._held, progress).run()
    finally:
        if held is None:
            await server.stop()


def make_checkpoint(
    model: str,
    config: QuantizationConfig,
    progress: Progress | None = None,
    *,
    cancel: threading.Event | None = None,
) -> Path:
    """Make a quantized copy of a model of this machine, if there is none; its folder. Blocks.

    Args:
        model: A folder, a repository in Hugging Face's cache, or ``"bundled"``.
        config: The method must be one that needs a checkpoint: ``awq`` or ``w8a8``.
        progress: Called with short messages, in this thread.
        cancel: When it is set, the work stops with ``concurrent.futures.CancelledError``.

    Raises:
        ConfigurationError: this method is not made here.
        EngineError: there is no engine, or the checkpoint cannot be made.
    """
    engine = find_engine()
    if engine is None:
        raise EngineError("there is no vLLM on this machine", hint="install_engine() makes one.")
    bundled = ensure_bundled_model(engine, progress, cancel=cancel) if model == BUNDLED else None
    spec = resolved(ServerSpec(model=model), bundled)
    new = successor(spec, config, os.environ)
    if new.recipe is None:
        raise ConfigurationError(
            f"no checkpoint can be made of {model} with {config.method or 'no method'}",
            hint="The model must be a plain one on this machine, and the method awq or w8a8.",
        )
    check(config, gather_facts(spec, engine, new, config, 0))
    return ensure_checkpoint(new.recipe, engine, progress, cancel=cancel)


async def _of_others(
    client: Management, where: Where, url: str, model: str | None, config: QuantizationConfig
) -> QuantizationResult:
    """A server that somebody else runs can only be looked at."""
    info = await client.get_model_info(where, model)
    runs = Quantization(
        enabled=info.quantization is not None, method=info.quantization, bits=info.quantization_bits
    )
    if (info.quantization or "quantization" in info.sources) and is_as_asked(runs, config):
        now = {"enabled": runs.enabled, "method": runs.method, "bits": runs.bits}
        figures = ServerFigures(url=url, quantization={**now, "checkpoint": info.root})
        return QuantizationResult(
            quantization=figures.quantization, changed=False, url=url, before=figures, after=figures
        )
    known = str(runs) if "quantization" in info.sources else "a quantization that it does not tell"
    raise QuantizationError(
        f"the server at {url} is not run by this library on this machine, so its quantization "
        f"cannot be changed from here; it serves {info.root or info.id} with {known}",
        step="check",
        hint=_what_to_run(info, config),
    )


def _what_to_run(info: ModelInfo, config: QuantizationConfig) -> str:
    """The command that serves the model as asked, for whoever runs it."""
    method = METHODS.get(config.method or "")
    model = config.checkpoint or info.root or info.id
    lines = ["vLLM fixes it when it starts. Whoever runs the server can start it with:"]
    if config.enabled and config.checkpoint is None and method and method.origin == "made":
        make = f"vllm-unified quantize --make {shlex.quote(model)} --method {method.name}"
        lines.append(f"  {make}    # where the model is; prints the checkpoint's folder")
        model = "CHECKPOINT"
    command = ["vllm", "serve", model]
    if config.enabled and config.checkpoint is None and method and method.flag:
        command += ["--quantization", method.flag]
    names = info.served_names or (info.id,)
    command += ["--served-model-name", *names]
    lines.append("  " + shlex.join(command))
    return "\n".join(lines)


def _runs_here(url: str) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        find_server(url)
    except NoSuchServerError:
        return False
    return True


def one_server(urls: list[str]) -> str:
    """The only address among these.

    Raises:
        ConfigurationError: there are several.
    """
    if len(set(urls)) != 1:
        raise ConfigurationError(
            f"the quantization of one server at a time can be changed, and {len(set(urls))} are "
            "meant",
            hint="Call it for each of them, one after the other, so that the others carry on.",
        )
    return urls[0]
