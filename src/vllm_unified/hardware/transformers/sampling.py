"""What can be asked of a model in this process. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_unified.errors import BadRequestError, UnsupportedError
from vllm_unified.settings import CALL_SETTINGS
from vllm_unified.wire.parameters import check_names

_COMPLETION_TOKENS = 16
"""vLLM's default for ``max_tokens`` of a completion."""
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_KNOWN = frozenset(
    (
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "stop",
        "seed",
        "top_k",
        "n",
        "ignore_eos",
        *_NUMBERS,
    )
)
# Settings of the call that are about servers; here they have nothing to say.
_IGNORED = (CALL_SETTINGS - {"timeout"}) | {"priority", "caller", "session_id", "request_id"}


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one answer are chosen."""

    max_tokens: int | None
    """``None``: as many as fit."""
    min_tokens: int = 0
    temperature: float = 1.0
    """0: always the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: of all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    @property
    def group(self) -> tuple[object, ...]:
        """Answers can be generated together if this is equal, and not ``None``-like: a seed makes
        a request one of its own."""
        if self.temperature == 0:
            return (0, self.repetition_penalty)
        return (
            self.temperature,
            self.top_p,
            self.top_k,
            self.min_p,
            self.repetition_penalty,
            self.seed,
        )

    @property
    def is_alone(self) -> bool:
        """Whether what runs beside it would change it."""
        return self.seed is not None and self.temperature != 0


def sampling(
    parameters: Mapping[str, Any], *, is_chat: bool, defaults: Mapping[str, Any]
) -> Sampling:
    """The sampling that these parameters ask for.

    Args:
        defaults: The model's own, from its ``generation_config.json``.

    Raises:
        UnsupportedError: a parameter is one of a server's.
        BadRequestError: a value is wrong, or a name is a slip.
    """
    asked = {
        name: value
        for name, value in parameters.items()
        if value is not None and name not in _IGNORED and name != "timeout"
    }
    check_names(asked)
    unknown = sorted(asked.keys() - _KNOWN)
    if unknown or asked.get("n", 1) != 1:
        raise UnsupportedError(
            f"the transformers backend has no {', '.join(unknown) or 'n above 1'}",
            hint="A vLLM server has it.",
        )
    merged = {name: value for name, value in defaults.items() if name in (*_NUMBERS, "top_k")}
    if defaults.get("do_sample") is False and "temperature" not in merged:
        merged["temperature"] = 1.0  # vLLM heeds the numbers, and not this switch
    merged |= asked
    limit = merged.get("max_completion_tokens", merged.get("max_tokens"))
    if limit is None and not is_chat:
        limit = _COMPLETION_TOKENS
    stop = merged.get("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(each, str) and each for each in stops):
        raise BadRequestError(f"stop must be a text or texts, not {stop!r}")
    return Sampling(
        max_tokens=None if limit is None else _whole("max_tokens", limit, 1),
        min_tokens=_whole("min_tokens", merged.get("min_tokens", 0), 0),
        temperature=_number("temperature", merged.get("temperature", 1.0), 0.0, 100.0),
        top_p=_number("top_p", merged.get("top_p", 1.0), 0.0, 1.0),
        top_k=max(0, _whole("top_k", merged.get("top_k", 0), -1)),
        min_p=_number("min_p", merged.get("min_p", 0.0), 0.0, 1.0),
        repetition_penalty=_number(
            "repetition_penalty", merged.get("repetition_penalty", 1.0), 0.01, 100.0
        ),
        seed=None if merged.get("seed") is None else _whole("seed", merged["seed"], 0),
        stop=stops,
        ignore_eos=bool(merged.get("ignore_eos", False)),
    )


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadRequestError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise BadRequestError(f"{name} must be a number from {least:g} to {most:g}, not {value!r}")
    return float(value)
