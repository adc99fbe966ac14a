"""Whether an adapter fits a server, for all that is known before it is sent there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from vllm_unified.errors import AdapterError
from vllm_unified.models.lora.adapters import Adapter
from vllm_unified.models.lora.folder import CONFIG, AdapterFiles
from vllm_unified.results import ModelCard

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes. Source: vLLM 0.32, ``config/lora.py``."""
SWITCHED_ON = (
    "Start it with --enable-lora, with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment, and "
    "with one API server (--api-server-count 1); ServerSpec(enable_lora=True) does so."
)
SKIP = "check=False loads it all the same."

# A quantized model has its own name, and the adapters of the one that it was made of.
_VARIANT = re.compile(
    r"[-_.](awq|gptq|gguf|bnb|fp8|fp16|bf16|nf4|int[48]|[48]-?bits?|w\d+a\d+|quantized|dynamic|"
    r"marlin|autoround)$"
)
_FROM_HIDDEN = re.compile(
    r"\.layers\.(\d+)\.\w+\.(?:q|k|v|qkv|gate|up|gate_up)_proj\.lora_A\.weight$"
)
_TO_HIDDEN = re.compile(r"\.layers\.(\d+)\.\w+\.(?:o|down)_proj\.lora_B\.weight$")


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a server."""

    cards: Sequence[ModelCard]
    lora_enabled: bool | None = None
    max_lora_rank: int | None = None

    @property
    def bases(self) -> list[ModelCard]:
        """The names of its base model."""
        return [card for card in self.cards if card.parent is None]


def check_fit(
    adapter: Adapter,
    files: AdapterFiles | None,
    facts: ServerFacts,
    model_config: Mapping[str, Any] | None,
) -> None:
    """Raise for an adapter that this server cannot serve, or would serve as nonsense.

    Args:
        files: The adapter's folder; ``None`` where only the server can see it.
        model_config: The base model's ``config.json``, where it can be read from here.

    Raises:
        AdapterError: says what does not fit, and what to do.
    """
    _check_names(adapter, facts)
    if facts.lora_enabled is False:
        raise AdapterError("this server has no LoRA", hint=SWITCHED_ON)
    if files is None:
        return
    config = files.config
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{files.folder}/{CONFIG}: peft_type is {kind!r}, and not 'LORA'")
    _check_rank(files, facts)
    _check_base(files, facts, model_config)
    if files.shapes and model_config:
        _check_shapes(files.folder, files.shapes, model_config)


def _check_names(adapter: Adapter, facts: ServerFacts) -> None:
    names = [card.id for card in facts.bases]
    if adapter.name in names:
        raise AdapterError(
            f"an adapter cannot be called {adapter.name!r}: the base model has that name",
            hint="Requests choose by the name: give it one of its own.",
        )
    known = {*names, *(card.root for card in facts.bases)}
    if adapter.base_model is None or adapter.base_model in known:
        return
    if not _keys([adapter.base_model]) & _keys(known):
        raise AdapterError(
            f"base_model is {adapter.base_model!r}, and this server serves {', '.join(names)}",
            hint="Load it where its base model is served, or leave base_model out.",
        )


def _check_rank(files: AdapterFiles, facts: ServerFacts) -> None:
    pattern = files.config.get("rank_pattern") or {}
    ranks = [files.config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise AdapterError(f"{files.folder}/{CONFIG}: the rank r is {ranks[0]!r}")
    rank = max(ranks)
    if facts.max_lora_rank is not None and rank > facts.max_lora_rank:
        raise AdapterError(
            f"the adapter's rank is {rank}, and this server takes at most {facts.max_lora_rank}",
            hint=rank_hint(rank),
        )


def rank_hint(rank: int | None) -> str:
    """What to do about a rank that is too large."""
    allowed = [each for each in RANKS if rank is None or each >= rank]
    least = str(allowed[0]) if rank is not None and allowed else "N"
    return (
        f"Start the server with --max-lora-rank {least}; "
        f"it takes {', '.join(map(str, RANKS[:-1]))} or {RANKS[-1]}."
    )


def _check_base(
    files: AdapterFiles, facts: ServerFacts, model_config: Mapping[str, Any] | None
) -> None:
    made_for = files.config.get("base_model_name_or_path")
    if not isinstance(made_for, str) or not made_for:
        return
    served = [name for card in facts.bases for name in (card.id, card.root) if name]
    also = (model_config or {}).get("_name_or_path")
    known = [*served, also] if isinstance(also, str) and also else served
    if not known or _keys([made_for]) & _keys(known):
        return
    raise AdapterError(
        f"the adapter was made for {made_for!r}, and this server serves {', '.join(served)}",
        hint=f"Load it where its base model is served. If it is the same model, {SKIP}",
    )


def _keys(names: Iterable[str | None]) -> set[str]:
    """What models of these names or folders may be known as."""
    found = set()
    for name in names:
        if not name:
            continue
        paths = [name, os.path.realpath(name)] if os.path.isdir(name) else [name]
        for path in paths:
            found.add(path)
            found |= {_plain(part) for part in _parts(path)}
    return found - {""}


def _parts(path: str) -> list[str]:
    parts = path.rstrip("/").split("/")
    # In the Hugging Face cache: models--ORGANISATION--NAME/snapshots/REVISION.
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return cached or parts[-1:]


def _plain(name: str) -> str:
    name = name.lower()
    while (shorter := _VARIANT.sub("", name)) != name:
        name = shorter
    return name


def _check_shapes(
    folder: str, shapes: Mapping[str, tuple[int, ...]], model_config: Mapping[str, Any]
) -> None:
    text = model_config.get("text_config")
    config = text if isinstance(text, Mapping) else model_config
    hidden, layers = config.get("hidden_size"), config.get("num_hidden_layers")
    for name, shape in shapes.items():
        if len(shape) != 2 or "vision" in name:
            continue
        from_hidden, to_hidden = _FROM_HIDDEN.search(name), _TO_HIDDEN.search(name)
        found = from_hidden or to_hidden
        if found is None:
            continue
        size = shape[1] if from_hidden else shape[0]
        if isinstance(hidden, int) and size != hidden:
            raise AdapterError(
                f"{folder}: the tensor {name} is for a hidden size of {size}, "
                f"and the served model's is {hidden}",
                hint="The adapter was made for another model.",
            )
        if isinstance(layers, int) and int(found[1]) >= layers:
            raise AdapterError(
                f"{folder}: there is the tensor {name}, and the served model has {layers} layers",
                hint="The adapter was made for another model.",
            )
