"""Names of parameters: those of vLLM pass, slips raise, and what resembles nothing passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.errors import BadRequestError
from vllm_unified.wire.parameters import KNOWN_PARAMETERS, check_names

# vLLM 0.32: openai/completion/protocol.py, openai/chat_completion/protocol.py, sampling_params.py.
OF_VLLM = """
temperature top_p n seed stop presence_penalty frequency_penalty logit_bias
top_k min_p repetition_penalty length_penalty min_tokens ignore_eos stop_token_ids
include_stop_str_in_output allowed_token_ids bad_words logprob_token_ids repetition_detection
thinking_token_budget watermarking vllm_xargs use_beam_search
skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
add_special_tokens return_token_ids return_tokens_as_token_ids prompt_logprobs
routed_experts_prompt_start response_format structured_outputs user priority request_id session_id
cache_salt kv_transfer_params ec_transfer_params stream stream_options stream_interval
prompt prompt_embeds max_tokens echo logprobs suffix
messages max_completion_tokens top_logprobs tools tool_choice parallel_tool_calls reasoning_effort
add_generation_prompt continue_final_message chat_template_kwargs chat_template documents
media_io_kwargs mm_processor_kwargs include_reasoning return_prompt_text model
""".split()


@pytest.mark.parametrize("name", OF_VLLM)
def test_every_parameter_of_vllm_passes(name: str) -> None:
    check_names([name])


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("max_token", "max_tokens"),
        ("max_tokenss", "max_tokens"),
        ("maxtokens", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("max-tokens", "max_tokens"),
        ("MAX_TOKENS", "max_tokens"),
        ("mx_tokens", "max_tokens"),
        ("max_tokesn", "max_tokens"),
        ("temprature", "temperature"),
        ("temperatur", "temperature"),
        ("tempreature", "temperature"),
        ("topP", "top_p"),
        ("sead", "seed"),
        ("stops", "stop"),
        ("respone_format", "response_format"),
        ("structured_output", "structured_outputs"),
    ],
)
def test_a_slip_raises_and_names_what_was_meant(slip: str, meant: str) -> None:
    with pytest.raises(BadRequestError, match=f"'{slip}': did you mean '{meant}'") as caught:
        check_names(["temperature", slip])

    assert f"extra_body={{'{slip}'" in str(caught.value)


@given(st.sampled_from([name for name in OF_VLLM if len(name) > 3]), st.data())
def test_one_slip_in_any_name_raises(name: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from("abcxyz_"))
    slip = data.draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
            ]
        )
    )
    if slip in KNOWN_PARAMETERS:
        check_names([slip])
    else:
        with pytest.raises(BadRequestError, match="did you mean"):
            check_names([slip])


@pytest.mark.parametrize(
    "name", ["min_new_tokens", "my_plugin_option", "xyz", "m", "", "functions", "logits_processors"]
)
def test_what_resembles_nothing_passes(name: str) -> None:
    check_names([name])


def test_a_call_may_know_more_names() -> None:
    with pytest.raises(BadRequestError, match="dimensions"):
        check_names(["dimension"], also=frozenset({"dimensions"}))
    check_names(["dimension"])
