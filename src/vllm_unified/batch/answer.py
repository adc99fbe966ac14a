"""What became of one prompt of a batch."""

from __future__ import annotations

import msgspec

from vllm_unified.errors import VllmError
from vllm_unified.results import GenerationResult


class BatchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one prompt, or the error in its place."""

    index: int
    """The prompt's position, counted from 0."""
    result: GenerationResult | None = None
    """The prompt's own: its choices, tokens, endpoint and latency. A :class:`ChatResult` where
    it was messages. ``None`` where it failed."""
    error: VllmError | None = None
    """Why there is no result."""
    tries: int = 1
    """How often it was sent, the retries within a call not counted: those stand in ``attempts``
    of the result's metadata, or of the error."""

    @property
    def text(self) -> str | None:
        """Text of the first choice; ``None`` where it failed."""
        return None if self.result is None else self.result.text
