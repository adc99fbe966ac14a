"""Write a quantized copy of a model; runs as a script in the interpreter of llm-compressor.

``python checkpoint_make.py RECIPE``, where RECIPE is JSON: ``source``, ``target``, ``scheme``
(``"awq"`` or ``"w8a8"``), ``group_size``, ``texts`` (for calibration), ``max_length`` (tokens of
each). It needs ``llmcompressor``, ``datasets``, ``torch`` and ``transformers`` there, and nothing
of this library, which that environment does not have.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

# Left as they are: the last layer costs most accuracy, and is often tied to the embeddings.
_IGNORED = ["lm_head"]
# The server that is to be replaced answers meanwhile.
_NICENESS = 5
_PR_SET_PDEATHSIG = 1


def make(recipe: dict[str, Any]) -> None:
    """Quantize ``source`` and write it to ``target``, in the compressed-tensors format."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    llmcompressor: Any = importlib.import_module("llmcompressor")
    if not torch.accelerator.is_available():
        # It pins what it offloads, which fails where there is no accelerator to copy it to.
        torch.Tensor.pin_memory = lambda tensor, *args, **keywords: tensor
    say("reading the model")
    model = transformers.AutoModelForCausalLM.from_pretrained(recipe["source"], dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe["source"])
    say("quantizing")
    if recipe["scheme"] == "w8a8":
        llmcompressor.oneshot(model=model, recipe=w8a8())
    else:
        llmcompressor.oneshot(
            model=model,
            recipe=awq(recipe["group_size"]),
            dataset=tokenized(recipe, tokenizer),
            tokenizer=tokenizer,
            max_seq_length=recipe["max_length"],
            num_calibration_samples=len(recipe["texts"]),
        )
    say("writing")
    model.save_pretrained(recipe["target"], save_compressed=True)
    tokenizer.save_pretrained(recipe["target"])


def w8a8() -> Any:
    """Weights of 8 bits, a scale for each channel; activations of 8 bits, scaled as they come."""
    modifiers: Any = importlib.import_module("llmcompressor.modifiers.quantization")
    return modifiers.QuantizationModifier(targets="Linear", scheme="W8A8", ignore=_IGNORED)


def awq(group_size: int) -> Any:
    """Weights of 4 bits with zero points, and a scale for each group that the data has chosen."""
    transform: Any = importlib.import_module("llmcompressor.modifiers.transform.awq")
    modifiers: Any = importlib.import_module("llmcompressor.modifiers.quantization")
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rounding = modifiers.QuantizationModifier(config_groups=groups, ignore=_IGNORED)
    return [transform.AWQModifier(), rounding]


def tokenized(recipe: dict[str, Any], tokenizer: Any) -> Any:
    """The calibration texts as a dataset of token ids."""
    datasets: Any = importlib.import_module("datasets")
    cut = {"truncation": True, "max_length": recipe["max_length"]}
    return datasets.Dataset.from_list([dict(tokenizer(text, **cut)) for text in recipe["texts"]])


def say(message: str) -> None:
    """A line that whoever runs this shows to people."""
    sys.stdout.write(f"== {message}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # Nobody would take what it makes when the program that started it is gone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(_NICENESS)
    make(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
