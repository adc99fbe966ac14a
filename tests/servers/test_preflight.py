"""What is refused before anything is done, and where a new server starts."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_unified.errors import QuantizationError
from vllm_unified.models.quantization import Quantization, quantization_config
from vllm_unified.servers.rollouts.preflight import Facts, check

GIB = 2**30
AWQ = Quantization(enabled=True, method="compressed-tensors", bits=4, group_size=64)
W8A8 = Quantization(enabled=True, method="compressed-tensors", bits=8, activation_bits=8)
PLAIN = Quantization(enabled=False)


def facts(**changes: Any) -> Facts:
    usual: dict[str, Any] = {
        "platform": "cpu",
        "source": "/plain",
        "source_bytes": 2 * GIB,
        "new_bytes": GIB,
        "group_size": 64,
        "server_bytes": 4 * GIB,
        "weights_bytes": 2 * GIB,
        "memory_available": 8 * GIB,
        "disk_free": 100 * GIB,
    }
    return Facts(**{**usual, **changes})


def asked(**given: Any) -> Any:
    return quantization_config({"enabled": True, **given}, {})


def refusal(config: Any, **changes: Any) -> str:
    with pytest.raises(QuantizationError) as caught:
        check(config, facts(**changes))
    assert caught.value.step == "check"
    assert "nothing was changed" in caught.value.message
    return str(caught.value)


def test_w8a8_and_adapters_cannot_be_served_together_on_a_cpu() -> None:
    assert "LoRA" in refusal(asked(method="w8a8"), lora=True)
    given = asked(checkpoint="/q")
    assert "LoRA" in refusal(given, lora=True, checkpoint="/q", stored=W8A8)
    check(asked(method="awq"), facts(lora=True))
    check(asked(method="w8a8"), facts(lora=True, platform="cuda", gpu_free=GIB))


@pytest.mark.parametrize("method", ["mxfp8", "nvfp4_per_token", "fp8_per_block"])
def test_methods_that_can_only_fail_on_a_cpu(method: str) -> None:
    assert "work on a CPU" in refusal(asked(method=method))


def test_what_may_work_is_tried() -> None:
    check(asked(method="fp8"), facts())
    check(asked(method="fp8_per_block"), facts(amx=True))


def test_gptq_of_8_bits_has_no_kernel_on_a_cpu() -> None:
    stored = Quantization(enabled=True, method="gptq", bits=8)
    given = asked(method="gptq", checkpoint="/q")
    assert "gptq of 8 bits" in refusal(given, checkpoint="/q", stored=stored)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_there": False}, "there is no checkpoint /q"),
        ({"stored": PLAIN}, "is not quantized"),
        ({"stored": W8A8}, "has compressed-tensors of 8 bits, and awq of 4 bits was asked for"),
    ],
)
def test_a_checkpoint_must_be_there_and_what_was_asked_for(
    changes: dict[str, Any], words: str
) -> None:
    given = asked(method="awq", checkpoint="/q")
    assert words in refusal(given, checkpoint="/q", **changes)


def test_a_checkpoint_that_vllm_will_fetch_is_believed() -> None:
    check(asked(method="awq", checkpoint="org/q"), facts(checkpoint="org/q", stored=None))


def test_nothing_is_made_of_a_model_that_is_not_known() -> None:
    assert "is not known" in refusal(asked(method="awq"), must_make=True, source=None)
    assert "is not known" in refusal(asked(method="fp8"), source=None)
    off = quantization_config({"enabled": False}, {})
    assert "is not known" in refusal(off, source=None)
    check(asked(method="awq", checkpoint="/q"), facts(checkpoint="/q", stored=AWQ, source=None))


def test_a_model_whose_layers_have_no_groups() -> None:
    assert "no usual group" in refusal(asked(method="awq"), must_make=True, group_size=None)
    check(asked(method="w8a8"), facts(must_make=True, group_size=None))


def test_disk_space_for_what_is_made() -> None:
    assert "4.0 GiB" in refusal(asked(method="awq"), must_make=True, disk_free=3 * GIB)
    check(asked(method="awq"), facts(must_make=False, disk_free=3 * GIB))


def test_an_argument_that_would_win_is_told() -> None:
    words = refusal(asked(method="awq"), extra_args=("--quantization=fp8",))
    assert "--quantization among its extra arguments" in words


def test_beside_where_there_is_room_for_both() -> None:
    # 4 GiB of which 2 were the old weights, and 1 of new ones, and a tenth.
    assert check(asked(method="awq"), facts(memory_available=int(3.4 * GIB)))[0] == "beside"
    assert check(asked(method="awq"), facts(memory_available=int(3.2 * GIB)))[0] == "in_place"


def test_beside_where_nothing_is_known_of_the_memory() -> None:
    assert check(asked(method="awq"), facts(memory_available=0))[0] == "beside"


def test_a_gpu_is_filled_by_each_server() -> None:
    config = asked(method="awq")
    full = facts(platform="cuda", gpu_free=10 * GIB, gpu_needed=70 * GIB)
    roomy = facts(platform="cuda", gpu_free=30 * GIB, gpu_needed=20 * GIB)
    unknown = facts(platform="cuda")
    assert check(config, full)[0] == "in_place"
    assert check(config, roomy)[0] == "beside"
    assert check(config, unknown)[0] == "in_place"


def test_who_asks_for_a_place_gets_it() -> None:
    tight = facts(memory_available=GIB)
    assert check(asked(method="awq", in_place=False), tight) == ("beside", "as asked")
    assert check(asked(method="awq", in_place=True), facts())[0] == "in_place"


def test_a_chosen_port_stays() -> None:
    placement, reason = check(asked(method="awq"), facts(port=8000))
    assert placement == "in_place"
    assert "8000" in reason
    assert "port 8000" in refusal(asked(method="awq", in_place=False), port=8000)
