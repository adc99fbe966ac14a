"""What takes a server's place: the same in all but its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models.test_quantization import compressed
from vllm_unified.models.quantization import Quantization, quantization_config
from vllm_unified.servers import ServerSpec
from vllm_unified.servers.rollouts.successor import ORIGIN, beside, runs_with, successor


@pytest.fixture
def plain(tmp_path: Path) -> str:
    return write(tmp_path / "plain", {"hidden_size": 576, "intermediate_size": 1536})


def write(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def asked(**given: Any) -> Any:
    return quantization_config({"enabled": True, **given}, {})


def test_a_checkpoint_is_served_under_the_same_name_with_the_same_options(
    plain: str, tmp_path: Path
) -> None:
    spec = ServerSpec(model=plain, served_model_name="m", max_model_len=99, env={"A": "1"})
    given = write(tmp_path / "q", {"quantization_config": compressed(4)})
    new = successor(spec, asked(checkpoint=given), {})
    assert (new.spec.model, new.spec.name, new.spec.max_model_len) == (given, "m", 99)
    assert new.spec.env == {"A": "1", ORIGIN: plain}
    assert new.stored is not None
    assert new.stored.bits == 4
    back = successor(new.spec, quantization_config({"enabled": False}, {}), {})
    assert back.spec == spec


def test_what_is_made_has_a_recipe(plain: str) -> None:
    new = successor(ServerSpec(model=plain), asked(method="awq", calibration=["text"]), {})
    assert new.recipe is not None
    assert (new.recipe.source, new.recipe.group_size) == (plain, 64)
    assert new.recipe.texts == ("text",)
    w8a8 = successor(ServerSpec(model=plain), asked(method="w8a8"), {}).recipe
    assert w8a8 is not None
    assert (w8a8.bits, w8a8.group_size, w8a8.texts) == (8, None, ())


def test_what_vllm_quantizes_itself_is_an_option(plain: str) -> None:
    new = successor(ServerSpec(model=plain), asked(method="fp8"), {})
    assert (new.spec.model, new.spec.quantization, new.recipe) == (plain, "fp8", None)
    assert runs_with(new.spec, {}) == Quantization(enabled=True, method="fp8", bits=8)
    off = successor(new.spec, quantization_config({"enabled": False}, {}), {})
    assert off.spec.quantization is None


def test_a_checkpoint_of_unknown_origin_has_no_plain_model(tmp_path: Path) -> None:
    given = write(tmp_path / "q", {"quantization_config": compressed(4)})
    new = successor(ServerSpec(model=given), quantization_config({"enabled": False}, {}), {})
    assert new.source is None


def test_beside_another_server_threads_are_not_bound(plain: str) -> None:
    spec = beside(ServerSpec(model=plain), 8)
    assert spec.env == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "7"}
    assert beside(ServerSpec(model=plain), 1).env["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    "given", [{"env": {"VLLM_CPU_OMP_THREADS_BIND": "0-3"}}, {"tensor_parallel_size": 2}]
)
def test_but_for_whom_they_were_chosen(plain: str, given: dict[str, Any]) -> None:
    spec = ServerSpec(model=plain, **given)
    assert beside(spec, 8) is spec
