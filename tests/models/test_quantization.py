"""What can be asked of a quantization, and what a checkpoint says that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_unified.errors import ConfigurationError
from vllm_unified.models.quantization import (
    METHODS,
    Quantization,
    StepProgress,
    is_as_asked,
    method_named,
    quantization_config,
    stored_as,
)


def compressed(bits: int, *, activations: int | None = None, kind: str = "int") -> dict[str, Any]:
    """The part of a ``config.json`` that llm-compressor writes."""
    weights = {"num_bits": bits, "type": kind, "group_size": None if activations else 64}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": {"num_bits": activations} if activations else None,
    }
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def test_takes_the_dict_of_the_guide() -> None:
    config = quantization_config({"enabled": True, "method": "awq", "bits": 4}, {})
    assert (config.enabled, config.method, config.bits) == (True, "awq", 4)


def test_keywords_win_and_camel_case_is_read() -> None:
    config = quantization_config(
        {"enabled": True, "method": "awq", "groupSize": 32, "inPlace": True}, {"group_size": 64}
    )
    assert (config.group_size, config.in_place) == (64, True)


def test_a_path_will_do() -> None:
    config = quantization_config({"enabled": True}, {"checkpoint": Path("/m"), "method": "gptq"})
    assert config.checkpoint == "/m"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "enabled is missing"),
        ({"enabled": True}, "method is missing"),
        ({"enabled": "yes", "method": "awq"}, "Expected `bool`"),
        ({"enabled": True, "methd": "awq"}, "unknown key 'methd'"),
        ({"enabled": True, "method": "awq", "bits": 8}, "awq has 4 bits, not 8"),
        ({"enabled": True, "method": "w8a8", "bits": 4}, "w8a8 has 8 bits, not 4"),
        ({"enabled": True, "method": "gptq"}, "takes a checkpoint"),
        ({"enabled": True, "method": "gguf"}, "vllm-gguf-plugin"),
        ({"enabled": True, "method": "squeezellm"}, "removed"),
        ({"enabled": True, "method": "magic"}, "no method 'magic'"),
        ({"enabled": True, "method": "awq", "max_perplexity_ratio": 0}, "greater than 0"),
        ({"enabled": True, "method": "awq", "start_timeout": float("nan")}, "greater than 0"),
        ({"enabled": False, "checkpoint": "/m"}, "makes no sense"),
    ],
)
def test_refuses_what_cannot_be_meant(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        quantization_config(given, {})
    assert words in str(caught.value)


def test_only_a_mapping_is_a_configuration() -> None:
    with pytest.raises(ConfigurationError, match="must be a dict, not str"):
        quantization_config("awq", {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("AWQ", "awq"),
        ("awq_marlin", "awq"),
        ("int8", "w8a8"),
        ("auto-gptq", "gptq"),
        ("compressed_tensors", "compressed-tensors"),
        ("auto-round", "inc"),
        ("fp8", "fp8"),
    ],
)
def test_other_names_of_a_method(given: str, name: str) -> None:
    assert method_named(given) is METHODS[name]


def test_bits_alone_choose_a_method() -> None:
    assert quantization_config({"enabled": True, "bits": 8}, {}).method == "w8a8"
    assert quantization_config({"enabled": True, "bits": 4}, {}).method == "awq"


def test_a_checkpoint_may_say_what_it_is() -> None:
    config = quantization_config({"enabled": True, "checkpoint": "/m"}, {})
    assert config.method is None
    assert is_as_asked(stored_as({"quantization_config": compressed(4)}), config)


def test_what_is_asked_with_enabled_false_is_forgotten() -> None:
    config = quantization_config({"enabled": False, "method": "awq", "bits": 4}, {})
    assert (config.method, config.bits) == (None, None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Quantization(enabled=False)),
        (
            {
                "quantization_config": {
                    "quant_method": "awq",
                    "bits": 4,
                    "group_size": 128,
                    "zero_point": True,
                }
            },
            Quantization(enabled=True, method="awq", bits=4, group_size=128),
        ),
        (
            {"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 8}}},
            Quantization(enabled=True, method="gptq", bits=8),
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            Quantization(enabled=True, method="fp8", bits=8, is_float=True),
        ),
        (
            {"compression_config": compressed(8, activations=8)},
            Quantization(enabled=True, method="compressed-tensors", bits=8, activation_bits=8),
        ),
    ],
)
def test_reads_how_weights_are_stored(config: dict[str, Any], expected: Quantization) -> None:
    assert stored_as(config) == expected


@pytest.mark.parametrize(
    ("stored", "asked", "same"),
    [
        (compressed(4), {"method": "awq"}, True),
        (compressed(4), {"method": "awq", "group_size": 64}, True),
        (compressed(4), {"method": "awq", "group_size": 32}, False),
        (compressed(4), {"method": "w8a8"}, False),
        (compressed(8, activations=8), {"method": "w8a8"}, True),
        (compressed(8, activations=8), {"method": "awq"}, False),
        (compressed(8, activations=8, kind="float"), {"method": "fp8"}, True),
        (compressed(8, activations=8, kind="float"), {"method": "w8a8"}, False),
    ],
)
def test_one_format_holds_what_several_methods_make(
    stored: dict[str, Any], asked: dict[str, Any], same: bool
) -> None:
    config = quantization_config({"enabled": True, **asked}, {})
    assert is_as_asked(stored_as({"quantization_config": stored}), config) is same


def test_nothing_is_as_asked_where_it_should_be_off() -> None:
    off = quantization_config({"enabled": False}, {})
    assert is_as_asked(Quantization(enabled=False), off)
    assert not is_as_asked(Quantization(enabled=True, method="awq", bits=4), off)


def test_progress_is_a_line_for_people() -> None:
    told = StepProgress(step="start", message="loading the model", seconds=3.14)
    assert str(told) == "start: loading the model (3.1 s)"
