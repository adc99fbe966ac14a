"""What a request asks of the model, checked in the order and the words of ``SamplingParams``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_unified.simulator import vocabulary
from vllm_unified.simulator.errors import ApiError, invalid
from vllm_unified.simulator.fields import (
    INT64,
    Check,
    any_of,
    boolean,
    integer,
    list_of,
    literal,
    mapping,
    message,
    number,
    response_format,
    text,
)

MAX_STOP_STRINGS = 4
"""``VLLM_MAX_STOP_STRINGS``."""

_SHARED: dict[str, Check] = {
    "frequency_penalty": number,
    "logit_bias": mapping,
    "n": integer(),
    "presence_penalty": number,
    "seed": integer(-INT64, INT64 - 1),
    "stop": any_of(text, list_of(text, high=MAX_STOP_STRINGS)),
    "stream": boolean,
    "stream_options": mapping,
    "temperature": number,
    "top_p": number,
    "use_beam_search": boolean,
    "top_k": integer(),
    "min_p": number,
    "repetition_penalty": number,
    "stop_token_ids": list_of(integer()),
    "include_stop_str_in_output": boolean,
    "ignore_eos": boolean,
    "min_tokens": integer(),
    "skip_special_tokens": boolean,
    "truncate_prompt_tokens": integer(-1, INT64 - 1),
    "truncation_side": literal("left", "right"),
    "allowed_token_ids": list_of(integer()),
    "prompt_logprobs": integer(),
    "bad_words": list_of(text),
    "add_special_tokens": boolean,
    "response_format": response_format,
    "structured_outputs": mapping,
    "priority": integer(-INT64, INT64 - 1),
    "request_id": text,
    "session_id": text,
    "return_tokens_as_token_ids": boolean,
    "return_token_ids": boolean,
    "stream_interval": integer(1),
}
_PLACE = integer(0)
COMPLETION_FIELDS: dict[str, Check] = {
    "model": text,
    "prompt": any_of(list_of(_PLACE), list_of(list_of(_PLACE)), text, list_of(text)),
    "echo": boolean,
    **{name: _SHARED[name] for name in ("frequency_penalty", "logit_bias")},
    "logprobs": integer(),
    "max_tokens": integer(),
    **_SHARED,
    "suffix": text,
    "user": text,
}
"""Checks of the fields of /v1/completions, in declaration order."""
CHAT_FIELDS: dict[str, Check] = {
    "messages": list_of(message),
    "model": text,
    **{name: _SHARED[name] for name in ("frequency_penalty", "logit_bias")},
    "logprobs": boolean,
    "top_logprobs": integer(),
    "max_tokens": integer(),
    "max_completion_tokens": integer(),
    **_SHARED,
    "add_generation_prompt": boolean,
    "continue_final_message": boolean,
    "echo": boolean,
    "include_reasoning": boolean,
}
"""Checks of the fields of /v1/chat/completions, in declaration order."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters that change what one sequence generates."""

    max_tokens: int
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special: bool = True
    logprobs: int | None = None
    """Alternatives to report for every token; ``None``: no log probabilities at all."""
    allowed_token_ids: tuple[int, ...] = ()
    forced_text: str | None = None
    """Text that a grammar forces, from structured outputs or a tool choice."""
    constraint_error: str | None = None
    """Why the engine will refuse the grammar."""

    @property
    def greedy(self) -> bool:
        """Whether sampling is switched off."""
        return self.temperature < 1e-5


def sampling_of(body: Mapping[str, Any], max_tokens: int, logprobs: int | None) -> Sampling:
    """Sampling parameters of a checked request.

    Args:
        body: the request, its fields converted.
        max_tokens: tokens it may generate, in tokens, the context already taken into account.
        logprobs: alternatives for every token, from the dialect's own field.

    Raises:
        ApiError: for a value outside its range.
    """
    stop = body.get("stop") or ()
    sampling = Sampling(
        max_tokens=max_tokens,
        min_tokens=body.get("min_tokens", 0),
        n=body.get("n", 1),
        temperature=body.get("temperature", 1.0),
        seed=body.get("seed"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(body.get("stop_token_ids", ())),
        include_stop=body.get("include_stop_str_in_output", False),
        ignore_eos=body.get("ignore_eos", False),
        skip_special=body.get("skip_special_tokens", True),
        logprobs=logprobs,
        allowed_token_ids=tuple(body.get("allowed_token_ids") or ()),
    )
    _check_logit_bias(body)
    _check_ranges(body, sampling)
    return sampling


def _check_logit_bias(body: Mapping[str, Any]) -> None:
    keys = [key for key in body.get("logit_bias", {}) if not key.lstrip("-").isdigit()]
    if keys:
        message = "logit_bias contains key(s) that cannot be converted to integer token IDs: "
        raise invalid(f"{message}{keys!r}", "logit_bias", keys)


def _check_ranges(body: Mapping[str, Any], sampling: Sampling) -> None:
    """The checks of ``SamplingParams._verify_args``, in its order."""
    _check_n(sampling.n)
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2.0 <= (value := body.get(name, 0.0)) <= 2.0:
            raise invalid(f"{name} must be in [-2, 2], got {value}.")
    _check_repetition_penalty(body.get("repetition_penalty", 1.0))
    _check_temperature(sampling.temperature)
    if not 0.0 < (top_p := body.get("top_p", 1.0)) <= 1.0:
        raise invalid(f"top_p must be in (0, 1], got {top_p}.", "top_p", top_p)
    if (top_k := body.get("top_k", 0)) < -1:
        raise invalid(f"top_k must be 0 (disable), or at least 1, got {top_k}.")
    if not 0.0 <= (min_p := body.get("min_p", 0.0)) <= 1.0:
        raise invalid(f"min_p must be in [0, 1], got {min_p}.")
    _check_lengths(sampling)
    if "" in sampling.stop:
        raise invalid("stop cannot contain an empty string.")
    if "" in body.get("bad_words", ()):
        raise invalid(f"bad_words cannot contain an empty string. Got {body['bad_words']=}")
    if sampling.greedy and sampling.n > 1:
        raise invalid(f"n must be 1 when using greedy sampling, got {sampling.n}.")


def _check_n(n: int) -> None:
    if n < 1:
        raise invalid(f"n must be at least 1, got {n}.")
    if n > (limit := 16384):
        raise invalid(
            f"n must be at most {limit}, got {n}. "
            "To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable."
        )


def _check_repetition_penalty(value: float) -> None:
    if not math.isfinite(value):
        raise invalid(f"repetition_penalty must be a finite number, got {value}.")
    if value <= 0:
        raise invalid(f"repetition_penalty must be greater than zero, got {value}.")


def _check_temperature(value: float) -> None:
    problem = None
    if not math.isfinite(value):
        problem = "be a finite number"
    elif value < 0.0:
        problem = "be non-negative"
    elif value > 2.0:
        problem = "be in [0, 2]"
    if problem is not None:
        raise invalid(f"temperature must {problem}, got {value}.", "temperature", value)


def _check_lengths(sampling: Sampling) -> None:
    longest, shortest = sampling.max_tokens, sampling.min_tokens
    if longest < 1:
        raise invalid(f"max_tokens must be at least 1, got {longest}.", "max_tokens", longest)
    if shortest < 0:
        raise invalid(f"min_tokens must be greater than or equal to 0, got {shortest}.")
    if shortest > longest:
        raise invalid(
            f"min_tokens must be less than or equal to max_tokens={longest}, got {shortest}."
        )


def check_by_engine(
    sampling: Sampling, body: Mapping[str, Any], prompt: list[int], max_logprobs: int
) -> None:
    """What the engine checks after a stream's headers are out.

    Raises:
        ApiError: too many log probabilities, a token id outside the vocabulary, or a grammar
            that nothing satisfies.
    """
    for kind, wanted in (("sample", sampling.logprobs), ("prompt", body.get("prompt_logprobs"))):
        limit = vocabulary.SIZE if max_logprobs == -1 else max_logprobs
        asked = vocabulary.SIZE if wanted == -1 else wanted
        if asked is not None and asked > limit:
            raise invalid(
                f"Requested {kind} logprobs of {asked}, which is greater than max allowed: {limit}",
                "logprobs" if kind == "sample" else "prompt_logprobs",
                asked,
            )
    if prompt and max(prompt) >= vocabulary.SIZE:
        raise ApiError(f"Token id {max(prompt)} is out of vocabulary")
    if sampling.constraint_error is not None:
        raise ApiError(sampling.constraint_error)


def check_characters(text: str, max_model_len: int) -> None:
    """A text that no tokenizer could fit into the context is refused unread.

    Raises:
        ApiError: when it has more characters than the context could hold.
    """
    bound = max_model_len * vocabulary.LONGEST
    if len(text) > bound:
        raise invalid(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
            f"contains {len(text)} characters (more than {bound} characters, which is the upper "
            f"bound for {max_model_len} input tokens). Please reduce the length of the input "
            f"prompt.",
            "input_text",
            len(text),
        )


def check_length(prompt: int, max_model_len: int, *, from_text: bool) -> None:
    """A prompt must fit the context.

    Args:
        prompt: its length, in tokens.
        max_model_len: length of the context, in tokens.
        from_text: whether the server tokenised it, which stops one token after the limit.

    Raises:
        ApiError: when it is longer.
    """
    if prompt <= max_model_len:
        return
    count = max_model_len + 1 if from_text else prompt
    qualifier = "at least " if count == max_model_len + 1 else ""
    raise invalid(
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
        f"contains {qualifier}{count} input tokens, which exceeds this limit even without any "
        f"output tokens. Please reduce the length of the input prompt.",
        "input_tokens",
        count,
    )


def check_max_tokens(value: int | None, name: str, max_model_len: int) -> None:
    """The tokens asked for must fit an empty context.

    Raises:
        ApiError: when they don't.
    """
    if value is not None and value > max_model_len:
        raise invalid(
            f"{name}={value} cannot be greater than max_model_len={max_model_len}. "
            f"Please request fewer output tokens.",
            name,
            value,
        )
