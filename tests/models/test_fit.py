"""What of an adapter does not fit a server, and what does."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_unified import AdapterError, ConfigurationError, ModelCard
from vllm_unified.models.lora.adapters import Adapter, temporary_name, union, wanted_adapter
from vllm_unified.models.lora.fit import ServerFacts, check_fit
from vllm_unified.models.lora.folder import AdapterFiles

HIDDEN = 64
LAYER = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    LAYER.format(0, "q", "A"): (8, HIDDEN),
    LAYER.format(0, "o", "B"): (HIDDEN, 8),
}
CONFIG = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "meta/Llama-7B"}


def facts(*names: str, root: str | None = None, rank: int | None = None) -> ServerFacts:
    cards = [ModelCard(id=name, root=root or name) for name in names or ("llama-7b",)]
    tuned = ModelCard(id="tuned", root="/tuned", parent="llama-7b")
    return ServerFacts(cards=[*cards, tuned], max_lora_rank=rank)


def check(
    server: ServerFacts | None = None,
    *,
    name: str = "x",
    base_model: str | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
    model: dict[str, Any] | None = None,
    **config: Any,
) -> None:
    files = AdapterFiles(folder="/x", config={**CONFIG, **config}, shapes=shapes or SHAPES)
    adapter = Adapter(name=name, path="/x", base_model=base_model)
    check_fit(adapter, files, server or facts(), model)


def test_what_only_the_server_can_see_fits() -> None:
    check_fit(Adapter(name="x", path="/there"), None, facts(), None)


@pytest.mark.parametrize(
    "made_for",
    ["llama-7b", "meta/Llama-7B", "/models/Llama-7b", "/models/Llama-7b/", "", None],
)
def test_the_same_base_by_the_end_of_its_name(made_for: str | None) -> None:
    check(base_model_name_or_path=made_for)


@pytest.mark.parametrize(
    "root",
    [
        "org/Llama-7B-AWQ",
        "/models/llama-7b-w8a8",
        "/models/Llama-7B-bnb-4bit",
        "/cache/models--meta--Llama-7B/snapshots/0a1b2c",
    ],
)
def test_an_alias_of_the_base_or_a_quantized_one(root: str) -> None:
    check(facts("production", root=root))


def test_the_base_by_what_its_own_config_says() -> None:
    check(facts("production", root="/models/a"), model={"_name_or_path": "meta/llama-7b"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"base_model_name_or_path": "meta/Llama-13B"}, "made for 'meta/Llama-13B'.*llama-7b"),
        ({"base_model": "mistral"}, "base_model is 'mistral', and this server serves llama-7b"),
        ({"name": "llama-7b"}, "the base model has that name"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "the rank r is 0"),
        ({"r": None}, "the rank r is None"),
        (
            {"model": {"hidden_size": 128}},
            "q_proj.lora_A.weight is for a hidden size of 64, and the served model's is 128",
        ),
        (
            {"model": {"text_config": {"hidden_size": 128}}},
            "the served model's is 128",
        ),
        (
            {"model": {"num_hidden_layers": 2}, "shapes": {LAYER.format(2, "k", "A"): (8, 64)}},
            "layers.2.*the served model has 2 layers",
        ),
    ],
)
def test_what_does_not_fit(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words) as told:
        check(**arguments)
    assert told.value.status_code is None


def test_a_rank_that_is_too_large_names_the_flag_and_its_values() -> None:
    with pytest.raises(AdapterError, match=r"rank is 100.*at most 16") as told:
        check(facts(rank=16), r=8, rank_pattern={"q_proj": 100})
    assert told.value.hint == (
        "Start the server with --max-lora-rank 128; "
        "it takes 1, 8, 16, 32, 64, 128, 256, 320 or 512."
    )


def test_a_server_without_lora() -> None:
    adapter = Adapter(name="x", path="/there")
    with pytest.raises(AdapterError, match=r"no LoRA(.|\n)*--enable-lora"):
        check_fit(adapter, None, ServerFacts(cards=[], lora_enabled=False), None)


def test_shapes_that_fit() -> None:
    check(model={"hidden_size": HIDDEN, "num_hidden_layers": 1})


def test_tensors_of_another_kind_are_not_judged() -> None:
    shapes = {"base_model.model.vision.layers.9.attn.q_proj.lora_A.weight": (8, 7), "other": (1,)}
    check(shapes=shapes, model={"hidden_size": HIDDEN, "num_hidden_layers": 1})


# What callers give


@pytest.mark.parametrize(
    ("given", "keywords"),
    [
        ({"adapter_name": "x", "adapter_path": "/x", "base_model": "b"}, {}),
        ({"adapterName": "x", "adapterPath": "/x", "baseModel": "b"}, {}),
        (None, {"adapter_name": "x", "adapter_path": "/x", "base_model": "b"}),
        ({"adapter_name": "y", "adapter_path": "/x"}, {"adapter_name": "x", "base_model": "b"}),
    ],
)
def test_an_adapter_in_every_spelling(given: Any, keywords: dict[str, Any]) -> None:
    assert wanted_adapter(given, keywords) == Adapter(name="x", path="/x", base_model="b")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"adapter_name": "x"}, "no adapter_path"),
        ({"adapter_path": "/x"}, "no adapter_name"),
        ({"adapter_name": "x", "adapter_path": "/x", "rank": 8}, "unknown key 'rank'"),
        ({"adapter_name": "x", "adapterName": "y"}, "adapter_name twice"),
        ({"adapter_name": 7, "adapter_path": "/x"}, "adapter_name must be a string"),
        ({"adapter_name": "x\n", "adapter_path": "/x"}, "in one line"),
        ("x", "must be a dict, not str"),
    ],
)
def test_an_adapter_that_is_none(given: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        wanted_adapter(given, {})


def test_each_version_once_and_where_it_is() -> None:
    def card(path: str) -> ModelCard:
        return ModelCard(id="x", root=path, parent="base")

    base = ModelCard(id="base", root="/base")
    found = union({"a": [base, card("/1")], "b": [base, card("/2")], "c": [card("/1")]})
    assert [(each.path, each.endpoints) for each in found] == [("/1", ("a", "c")), ("/2", ("b",))]


def test_a_temporary_name_is_of_the_path() -> None:
    one, other = (temporary_name(Adapter(name="x", path=path)) for path in ("/1", "/2"))
    assert one != other
    assert one.startswith("x@")
    assert len(one) == 10
