"""Prompts on their way."""

from __future__ import annotations

from vllm_unified.batch.patience import was_refused
from vllm_unified.batch.requests import PromptRequest
from vllm_unified.errors import VllmError


class Work:
    """A prompt that was read, and has no answer yet."""

    __slots__ = ("error", "index", "prompt", "refused", "strikes", "tries")

    def __init__(self, index: int, prompt: PromptRequest) -> None:
        self.index = index
        self.prompt = prompt
        self.tries = 0
        self.strikes = 0.0
        self.error: VllmError | None = None
        """Of the last try that a server took, or of the last one where none did."""
        self.refused = True
        """Whether no server took any try."""

    def failed(self, error: VllmError) -> None:
        """A try failed."""
        refused = was_refused(error)
        if self.refused or not refused:
            self.error = error
        self.refused = self.refused and refused


class Pack:
    """Prompts that share a request; mostly one."""

    __slots__ = ("began", "works")

    def __init__(self, works: list[Work]) -> None:
        self.works = works
        self.began = 0.0
        """Of the last try, in monotonic seconds."""

    @property
    def last_error(self) -> VllmError | None:
        """Why it failed."""
        return self.works[0].error

    def halves(self) -> list[Pack]:
        """Two packs, to find out whose fault it was."""
        middle = (len(self.works) + 1) // 2
        return [Pack(self.works[:middle]), Pack(self.works[middle:])]
