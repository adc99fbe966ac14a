"""A LoRA adapter made from nothing: random weights of the right shapes, in the format of PEFT."""

from __future__ import annotations

import array
import json
import random
from pathlib import Path

_TARGETS = ("q_proj", "v_proj")


def write_adapter(folder: Path, model: Path, *, rank: int = 8, seed: int = 0) -> Path:
    """An adapter for the model whose ``config.json`` is in ``model``; returns ``folder``.

    The tensors are float32 ones of standard deviation 0.02, in a safetensors file: eight bytes
    with the length of a JSON header, the header, the data.
    """
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    head = hidden // config["num_attention_heads"]
    out = {"q_proj": hidden, "v_proj": head * config["num_key_value_heads"]}
    shapes = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{part}.weight": shape
        for layer in range(config["num_hidden_layers"])
        for name in _TARGETS
        for part, shape in (("A", (rank, hidden)), ("B", (out[name], rank)))
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_safetensors(folder / "adapter_model.safetensors", shapes, random.Random(seed))
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(_TARGETS),
        "base_model_name_or_path": str(model),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


def _write_safetensors(
    path: Path, shapes: dict[str, tuple[int, int]], source: random.Random
) -> None:
    header, offset = {}, 0
    for name, (rows, columns) in shapes.items():
        end = offset + 4 * rows * columns
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    values = array.array("f", (source.gauss(0.0, 0.02) for _ in range(offset // 4)))
    path.write_bytes(len(text).to_bytes(8, "little") + text + values.tobytes())
