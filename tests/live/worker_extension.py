"""What a real vLLM worker is asked in a test; it is mixed into vLLM's own class."""

from __future__ import annotations

from typing import Any


class WeightsReport:
    """Given to vLLM by ``--worker-extension-cls``."""

    model_runner: Any

    def parameter_bytes(self) -> int:
        """Bytes of all weights as they are in memory."""
        weights = self.model_runner.model.parameters()
        return sum(weight.numel() * weight.element_size() for weight in weights)
