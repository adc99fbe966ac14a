"""Tiny models of the families in the guide, each served by a real vLLM, driven through the surface.

``make test-families``. It is no part of the other tests: each family takes most of a minute. What
passed stands in build/families.md, as the table in docs/families.md.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.families import make_model
from tests.support.vllm import running
from vllm_unified import BadRequestError, ServerStartError, VllmUnified
from vllm_unified.servers import ServerSpec, ensure_bundled_model, find_engine

pytestmark = [pytest.mark.timeout(600)]

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "falcon": "Falcon",
    "mpt": "MPT",
    "opt": "OPT",
    "bloom": "BLOOM",
    "stablelm": "StableLM",
    "gpt_neox": "Pythia, GPT-NeoX",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
NO_LONGER_SERVED = {"mpt": r"MptForCausalLM was supported in vLLM until v\S+, and is not supported"}
CONTEXT = 256
ROWS = Path("build/families")


@pytest.fixture(scope="session")
def tokenizer() -> Path:
    engine = find_engine("cpu")
    assert engine is not None, "`vllm-unified engine install` first"
    return ensure_bundled_model(engine)


@pytest.fixture
def model(family: str, tokenizer: Path, tmp_path: Path) -> Path:
    engine = find_engine("cpu")
    assert engine is not None
    script = [engine.python, "-I", make_model.__file__, family, str(tmp_path / family)]
    subprocess.run([*script, str(tokenizer)], check=True, capture_output=True, timeout=300)
    return tmp_path / family


@pytest.fixture
def row(family: str) -> Iterator[list[str]]:
    """The line of the table, written when the test passed."""
    cells: list[str] = []
    yield cells
    if cells:
        ROWS.mkdir(parents=True, exist_ok=True)
        (ROWS / f"{family}.md").write_text(f"| {FAMILIES[family]} | {' | '.join(cells)} |\n")
        lines = [path.read_text() for name in FAMILIES if (path := ROWS / f"{name}.md").exists()]
        (ROWS.parent / "families.md").write_text("".join(lines))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, model: Path, row: list[str]) -> None:
    spec = ServerSpec(
        model=str(model),
        served_model_name=family,
        max_model_len=CONTEXT,
        kv_cache_gib=0.25,
        max_restarts=0,
        dev_mode=True,
    )
    if family in NO_LONGER_SERVED:
        with pytest.raises(ServerStartError) as caught, running(spec):
            pass
        said = re.search(rf"Model architecture {NO_LONGER_SERVED[family]}[^\n]*", str(caught.value))
        assert said is not None, str(caught.value)
        row += ["no", "", "", "", f'"{said.group().strip()}"']
        return
    with running(spec) as server, VllmUnified(api_url=server.url, timeout=300) as vllm:
        drive(vllm, family)
        info = vllm.get_model_info(timeout=60)
        assert (info.id, info.max_model_len, info.dtype) == (family, CONTEXT, "bfloat16")
        assert info.quantization is None
        chats = chat(vllm, family)
        row += ["yes", "yes", chats, "yes", f"vLLM {info.version}"]


def drive(vllm: VllmUnified, family: str) -> None:
    """Completion, stream, batch and tokens."""
    exact: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    result = vllm.generate("Once upon a time", **exact)
    assert (result.model, result.usage.completion_tokens) == (family, 8)
    assert result.finish_reason == "length"
    with vllm.stream("Once upon a time", **exact) as stream:
        texts = list(stream.texts())
    assert stream.ending == "complete"
    assert stream.result.usage.completion_tokens == 8
    assert "".join(texts) == stream.text
    assert len(vllm.batch(["a", "b", "c"], **exact)) == 3
    tokens = vllm.tokenize("Hello, world!")
    assert tokens.count == len(tokens.tokens) > 0
    assert vllm.detokenize(tokens.tokens) == "Hello, world!"


def chat(vllm: VllmUnified, family: str) -> str:
    """A chat where there is a template; a clear error where there is none."""
    if family in make_model.HAS_TEMPLATE:
        answer = vllm.chat("Hello", max_tokens=5, ignore_eos=True)
        assert answer.usage.completion_tokens == 5
        return "yes"
    with pytest.raises(BadRequestError, match="chat template"):
        vllm.chat("Hello", max_tokens=5)
    return "no template: an error that says so"
