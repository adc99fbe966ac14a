"""The server that takes another one's place: the same in all but how its weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from vllm_unified.models.quantization import (
    METHODS,
    Quantization,
    QuantizationConfig,
    is_as_asked,
    stored_as,
)
from vllm_unified.models.weights import group_size, model_config, model_folder
from vllm_unified.servers.rollouts.checkpoints import Recipe, calibration_texts, checkpoint_manifest
from vllm_unified.servers.spec import ServerSpec

ORIGIN = "UNQUANTIZED_MODEL"
"""A variable of a server's environment: what it served before its first change. It is kept there
because it must live as long as the server, whoever holds it."""


_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_THREADS = "OMP_NUM_THREADS"


class Successor(msgspec.Struct, frozen=True, kw_only=True):
    """What to run in a server's place. One of ``checkpoint`` and ``recipe`` is there, or none where
    the plain model is served, perhaps quantized as it is loaded."""

    spec: ServerSpec
    """Complete, unless there is a recipe: its checkpoint is the model."""
    checkpoint: str | None = None
    recipe: Recipe | None = None
    stored: Quantization | None = None
    """How the checkpoint's weights are stored, where it can be read."""
    source: str | None = None
    """The plain model."""
    source_folder: Path | None = None
    group_size: int | None = None

    def with_checkpoint(self, folder: Path) -> ServerSpec:
        """What to run when the recipe's checkpoint is there."""
        return msgspec.structs.replace(self.spec, model=str(folder))


def beside(spec: ServerSpec, cores: int) -> ServerSpec:
    """``spec`` for a server on a CPU where another one runs.

    vLLM binds its threads to cores, and each server to the same ones, so that a new server gets
    what a busy old one leaves of them: on two cores it was seen to get nothing for minutes, until
    it was unbound. It has as many threads as vLLM would bind, one core being left for the rest.
    """
    if {_BINDING, _THREADS} & spec.env.keys() or (spec.tensor_parallel_size or 1) > 1:
        return spec
    env = {**spec.env, _BINDING: "nobind", _THREADS: str(max(1, cores - 1))}
    return msgspec.structs.replace(spec, env=env)


def runs_with(spec: ServerSpec, environment: Mapping[str, str]) -> Quantization:
    """How the weights of a server are stored, or are quantized when they are loaded."""
    folder = model_folder(spec.model, {**environment, **spec.env})
    stored = Quantization(enabled=False) if folder is None else stored_as(model_config(folder))
    if stored.enabled or spec.quantization is None:
        return stored
    method = METHODS.get(spec.quantization)
    bits = method.bits[0] if method else None
    return Quantization(enabled=True, method=spec.quantization, bits=bits)


def runs_as_asked(
    spec: ServerSpec, config: QuantizationConfig, environment: Mapping[str, str]
) -> bool:
    """Whether a server runs already as ``config`` asks."""
    if not is_as_asked(runs_with(spec, environment), config):
        return False
    asked = config.checkpoint and model_folder(config.checkpoint, environment)
    return not asked or asked == model_folder(spec.model, environment)


def plain_model(spec: ServerSpec, environment: Mapping[str, str]) -> str | None:
    """The model that a server's weights were made of; ``None`` where that is not known."""
    if origin := spec.env.get(ORIGIN):
        return origin
    folder = model_folder(spec.model, {**environment, **spec.env})
    if folder is not None and (manifest := checkpoint_manifest(folder)):
        return manifest.source
    if folder is not None and stored_as(model_config(folder)).enabled:
        return None
    return spec.model


def successor(
    spec: ServerSpec, config: QuantizationConfig, environment: Mapping[str, str]
) -> Successor:
    """What runs in place of ``spec`` as ``config`` asks. Looks into folders, and changes nothing.

    Raises:
        ConfigurationError: the texts for calibration cannot be read.
    """
    source = plain_model(spec, environment)
    env = {name: value for name, value in spec.env.items() if name != ORIGIN}
    base = msgspec.structs.replace(spec, quantization=None, env=env)
    folder = model_folder(source, {**environment, **env}) if source else None
    plain = Successor(
        spec=msgspec.structs.replace(base, model=source or spec.model),
        source=source,
        source_folder=folder,
    )
    if not config.enabled:
        return plain
    marked = msgspec.structs.replace(base, env={**env, ORIGIN: source} if source else env)
    if config.checkpoint:
        given = model_folder(config.checkpoint, {**environment, **env})
        model = str(given or config.checkpoint)
        return msgspec.structs.replace(
            plain,
            spec=msgspec.structs.replace(marked, model=model),
            checkpoint=config.checkpoint,
            stored=stored_as(model_config(given)) if given else None,
        )
    method = METHODS[config.method or ""]
    if method.origin == "online":
        online = msgspec.structs.replace(marked, model=source or spec.model)
        return msgspec.structs.replace(
            plain, spec=msgspec.structs.replace(online, quantization=method.flag)
        )
    return _made(plain, marked, config)


def _made(plain: Successor, marked: ServerSpec, config: QuantizationConfig) -> Successor:
    folder, method = plain.source_folder, config.method or ""
    size = config.group_size
    if folder is not None and size is None and method == "awq":
        size = group_size(model_config(folder), marked.tensor_parallel_size or 1)
    recipe = None
    if folder is not None:
        recipe = Recipe(
            source=str(folder),
            method=method,
            bits=config.bits or METHODS[method].bits[0],
            group_size=size if method == "awq" else None,
            texts=calibration_texts(config.calibration) if method == "awq" else (),
        )
    return msgspec.structs.replace(plain, spec=marked, recipe=recipe, group_size=size)
