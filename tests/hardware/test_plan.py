"""The arithmetic of plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.hardware import configs
from vllm_unified.errors import ConfigurationError
from vllm_unified.hardware import Gpu, Hardware, NumaNode, Plan, plan
from vllm_unified.hardware.shape import model_shape

GIB = 2**30
DOCUMENT = Path(__file__).parents[2] / "docs" / "hardware.md"

H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    memory_total=85520809984,
    memory_free=84889894912,
    driver="580.65.06",
    compute_capability=(9, 0),
)


def machine(gpus: int = 0, gpu: Gpu = H100, **known: Any) -> Hardware:
    fields: dict[str, Any] = {
        "cpus": 16,
        "cpu_model": "some",
        "cpu_flags": frozenset({"avx512f"}),
        "memory_total": 64 * GIB,
        "memory_available": 60 * GIB,
        "gpus": (gpu,) * gpus,
    }
    return Hardware(**{**fields, **known})


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (configs.LLAMA_8B, 8_030_261_248),
        (configs.LLAMA_70B, 70_553_706_496),
        (configs.MIXTRAL, 46_702_792_704),
        (configs.QWEN3_30B, 30_532_122_624),
        (configs.QWEN2_7B, 7_615_616_512),
        (configs.PYTHIA_70M, 70_426_624),
        (configs.OPT_125M, 125_239_296),
        (configs.BLOOM_560M, 559_214_592),
        (configs.FALCON_7B, 6_921_720_704),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_parameters_are_those_of_the_checkpoint(config: dict[str, Any], parameters: int) -> None:
    assert model_shape(config).parameters == parameters


def test_a_compressed_cache() -> None:
    shape = model_shape(configs.DEEPSEEK_V3)
    assert shape.parameters == pytest.approx(671e9, rel=0.001)
    assert shape.kv_values() == 61 * 576 == shape.kv_values(8)
    assert (shape.quantization, shape.bits) == ("fp8", 8)


def test_heads_are_not_split() -> None:
    shape = model_shape(configs.LLAMA_8B)
    assert shape.kv_values() == 2 * 32 * 8 * 128
    assert shape.kv_values(8) == shape.kv_values(16) == 2 * 32 * 128


CASES = [
    (configs.LLAMA_8B, 1, (True, 1, None)),
    (configs.LLAMA_8B, 2, (True, 1, None)),
    (configs.LLAMA_8B, 8, (True, 1, None)),
    (configs.LLAMA_70B, 1, (False, 1, "fp8")),
    (configs.LLAMA_70B, 2, (True, 2, "fp8")),
    (configs.LLAMA_70B, 8, (True, 4, None)),
    (configs.MIXTRAL, 1, (True, 1, "fp8")),
    (configs.MIXTRAL, 2, (True, 2, None)),
    (configs.MIXTRAL, 8, (True, 2, None)),
]


@pytest.mark.parametrize(("config", "gpus", "expected"), CASES)
def test_large_models_on_gpus_of_80_gb(
    config: dict[str, Any], gpus: int, expected: tuple[bool, int, str | None]
) -> None:
    found = plan(config, machine(gpus))
    assert (found.fits, found.tensor_parallel_size, found.quantization) == expected, str(found)
    if found.fits:
        used = found.weights_bytes_per_device + found.kv_cache_bytes
        assert used < 0.92 * H100.memory_total
        assert found.kv_cache_tokens >= found.max_model_len > 0
        assert found.kv_cache_bytes // found.kv_bytes_per_token - found.kv_cache_tokens < 16


def row(found: Plan, gpus: int) -> str:
    """A line of the document's table."""
    if not found.fits:
        reason = found.reason.removeprefix("it does not fit: ")
        return f"| {found.model} | {gpus} | no: {reason} | | | |"
    how = f"`--tensor-parallel-size {found.tensor_parallel_size}`"
    how += f" `--quantization {found.quantization}`" if found.quantization else ""
    weights = f"{found.weights_bytes_per_device / GIB:.1f} GiB"
    cache = f"{found.kv_cache_tokens:,} tokens, {found.concurrency:.1f} x {found.max_model_len:,}"
    return f"| {found.model} | {gpus} | {how} | {weights} | {cache} | {found.replicas} |"


def test_the_document_has_these_figures() -> None:
    text = DOCUMENT.read_text()
    for config, gpus, _ in CASES:
        found = plan(config, machine(gpus))
        assert row(found, gpus) in text
    for config, gpus in ((configs.LLAMA_8B, 1), (configs.LLAMA_70B, 8), (configs.MIXTRAL, 2)):
        assert str(plan(config, machine(gpus))) in text


class TestChoices:
    def test_a_shorter_context_where_the_models_own_does_not_fit(self) -> None:
        small = msgspec.structs.replace(
            H100, memory_total=24 * GIB, memory_free=24 * GIB, compute_capability=(8, 0)
        )
        found = plan(configs.LLAMA_8B, machine(1, small))
        assert found.fits
        assert 2048 < found.max_model_len == found.kv_cache_tokens < 131072
        assert f"--max-model-len {found.max_model_len}" in found.command
        asked = plan(configs.LLAMA_8B, machine(1, small), max_model_len=131072)
        assert not asked.fits

    def test_fp8_only_where_the_gpus_have_it(self) -> None:
        old = msgspec.structs.replace(H100, compute_capability=(8, 0))
        assert not plan(configs.LLAMA_70B, machine(2, old)).fits or (
            plan(configs.LLAMA_70B, machine(2, old)).quantization is None
        )

    def test_a_gpu_in_use(self) -> None:
        busy = msgspec.structs.replace(H100, memory_free=40 * GIB)
        found = plan(configs.LLAMA_8B, machine(1, busy))
        assert found.gpu_memory_utilization == 0.5
        assert "--gpu-memory-utilization 0.5" in found.command
        assert found.spec().gpu_memory_utilization == 0.5

    def test_heads_that_cannot_be_shared(self) -> None:
        found = plan(configs.FALCON_7B, machine(8))
        assert found.tensor_parallel_size == 1

    def test_a_quantized_checkpoint_is_served_as_it_is(self) -> None:
        config = {**configs.LLAMA_70B, "quantization_config": {"quant_method": "awq", "bits": 4}}
        found = plan(config, machine(1))
        assert (found.fits, found.quantization) == (True, None)
        assert 35 * GIB < found.weights_bytes < 42 * GIB

    def test_a_quantization_that_is_asked_for(self) -> None:
        found = plan(configs.LLAMA_70B, machine(1), quantization="awq")
        assert found.quantization == "awq"
        assert any("it needs a checkpoint in awq" in note for note in found.notes)


class TestOnTheCpu:
    def test_the_bundled_model(self) -> None:
        found = plan("bundled", machine())
        assert found.parameters == 134_515_008
        assert found.kv_bytes_per_token == 23_040
        assert (found.max_model_len, found.kv_cache_gib) == (2048, 1.0)
        assert found.kv_cache_tokens == 46_592
        spec = found.spec(served_model_name="small")
        assert (spec.model, spec.dtype, spec.kv_cache_gib) == ("bundled", "bfloat16", 1.0)
        assert spec.served_model_name == "small"

    def test_too_little_memory(self) -> None:
        found = plan(configs.LLAMA_8B, machine(memory_available=8 * GIB))
        assert not found.fits
        assert "8.00 GiB are free" in found.reason

    def test_a_cache_of_a_size(self) -> None:
        found = plan("bundled", machine(), kv_cache_gib=2.5)
        assert found.kv_cache_bytes == int(2.5 * GIB)

    def test_another_system(self) -> None:
        apple = msgspec.structs.replace(H100, vendor="apple")
        found = plan("bundled", machine(1, apple, system="Darwin"))
        assert not found.fits
        assert "does not run on Darwin" in found.reason

    def test_a_server_has_the_memory_of_one_numa_node(self) -> None:
        nodes = tuple(NumaNode(id=n, cpus=(n,), memory_total=30 * GIB) for n in range(2))
        found = plan(configs.LLAMA_8B, machine(numa_nodes=nodes))
        assert found.tensor_parallel_size == 1
        assert found.weights_bytes + found.kv_cache_bytes < 30 * GIB
        assert any("--tensor-parallel-size 2" in note for note in found.notes)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(configs.QWEN2_7B))
    assert plan(str(tmp_path), machine(1)).parameters == 7_615_616_512


@pytest.mark.parametrize("model", ["nobody/nothing", "/no/such/folder"])
def test_a_model_that_is_not_here(model: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        plan(model, machine())


def test_what_is_no_language_model() -> None:
    with pytest.raises(ConfigurationError, match="hidden_size"):
        plan({"model_type": "vit"}, machine())
