"""The names that vLLM's generate endpoints know, and how a mistyped one is noticed.

vLLM accepts unknown fields with a 200 and ignores them, so a typing slip would silently change
nothing. Source of the names: vLLM 0.32, ``completion/protocol.py``, ``chat_completion/protocol.py``
and ``sampling_params.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from vllm_unified.errors import BadRequestError

KNOWN_PARAMETERS = frozenset(
    """
    model prompt messages prompt_embeds input stream stream_options user metadata store
    temperature top_p top_k min_p n seed stop presence_penalty frequency_penalty
    repetition_penalty length_penalty logit_bias min_tokens ignore_eos stop_token_ids
    include_stop_str_in_output allowed_token_ids bad_words logprob_token_ids repetition_detection
    thinking_token_budget watermarking vllm_xargs use_beam_search best_of
    max_tokens max_completion_tokens echo suffix logprobs top_logprobs prompt_logprobs
    skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
    add_special_tokens return_token_ids return_tokens_as_token_ids return_prompt_text
    routed_experts_prompt_start response_format structured_outputs
    guided_json guided_regex guided_choice guided_grammar guided_decoding_backend
    guided_whitespace_pattern
    priority request_id session_id cache_salt kv_transfer_params ec_transfer_params stream_interval
    tools tool_choice parallel_tool_calls reasoning_effort include_reasoning
    add_generation_prompt continue_final_message chat_template chat_template_kwargs documents
    media_io_kwargs mm_processor_kwargs service_tier
    """.split()
)


def check_names(names: Iterable[object], also: frozenset[str] = frozenset()) -> None:
    """Raise for a name that is one typing slip, or another spelling, from a known one.

    Names that resemble nothing pass: vLLM knows more than any list.

    Raises:
        BadRequestError: names the parameter and the one that was probably meant.
    """
    names = list(names)
    if KNOWN_PARAMETERS.issuperset(names):
        return
    for name in names:
        if not isinstance(name, str):
            raise BadRequestError(f"the name of a parameter must be a string, not {name!r}")
        if name not in KNOWN_PARAMETERS and name not in also:
            meant = _near_miss(name, also)
            if meant is not None:
                raise BadRequestError(
                    f"unknown parameter {name!r}: did you mean {meant!r}?",
                    hint="vLLM would ignore it without a word. If it is really meant, "
                    f"send it with extra_body={{{name!r}: ...}}.",
                )


@lru_cache(maxsize=256)
def _near_miss(name: str, also: frozenset[str]) -> str | None:
    folded = _fold(name)
    for known in sorted(KNOWN_PARAMETERS | also):
        if _fold(known) == folded or (len(known) > 3 and _is_one_slip(name, known)):
            return known
    return None


def _fold(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _is_one_slip(a: str, b: str) -> bool:
    """Whether one insertion, deletion, substitution or swap of neighbours leads from a to b."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    rest_a, rest_b = a[start:], b[start:]
    return (
        rest_a[1:] == rest_b[1:]
        or rest_a[1:] == rest_b
        or rest_a == rest_b[1:]
        or (rest_a[:2] == rest_b[:2][::-1] and rest_a[2:] == rest_b[2:])
    )
