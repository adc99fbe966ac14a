"""What a real vLLM is asked in a test; it is mixed into vLLM's own worker class.

On a CPU, vLLM packs its matrices for the processor when it has loaded them, and they are no
parameters any more. So their bytes are counted in that moment.
"""

from __future__ import annotations

import importlib
from typing import Any

_counted: list[int] = []


def _count_before_packing() -> None:
    loader: Any = importlib.import_module("vllm.model_executor.model_loader.base_loader")
    pack = loader.process_weights_after_loading

    def count(model: Any, *rest: Any, **more: Any) -> Any:
        weights = model.parameters()
        _counted.append(sum(weight.numel() * weight.element_size() for weight in weights))
        return pack(model, *rest, **more)

    loader.process_weights_after_loading = count


class WeightsReport:
    """Given to vLLM by ``--worker-extension-cls``, which makes it before the model is loaded."""

    _count_before_packing()

    def loaded_weight_bytes(self) -> int:
        """Bytes of all weights that were loaded."""
        return sum(_counted)
