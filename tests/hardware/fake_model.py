"""A model for the transformers backend, without torch: it spells words out of a list."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from vllm_unified.hardware.transformers.job import Job

END = 0
WORDS = ["<end>", "one", " two", " thr", "ee", " four", "\ufffd", "€", "!"]


class FakeModel:
    """Continues every prompt with the same tokens, one step at a time for all of its batch."""

    made = 0

    def __init__(self, source: str, **how: Any) -> None:
        if "no-such" in source:
            raise OSError(f"{source} is not a local folder")
        type(self).made += 1
        self.device = "cpu"
        self.ends = frozenset({END})
        self.defaults: dict[str, Any] = {}
        self.context: int | None = 64
        self.answer = [1, 2, 3, 4, END]
        self.batches: list[int] = []
        self.step = threading.Event()
        self.step.set()
        self.error: Exception | None = None

    def encode(self, text: str) -> list[int]:
        return [8] * len(text)

    def encode_chat(self, messages: Sequence[Any]) -> list[int]:
        return [8] * len(messages)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(WORDS[token] for token in tokens if token != END)

    def generate(self, jobs: Sequence[Job]) -> None:
        self.batches.append(len(jobs))
        position = 0
        while True:
            assert self.step.wait(10)
            if self.error is not None:
                raise self.error
            token = self.answer[position % len(self.answer)]
            done = [job.feed(token) for job in jobs]
            if all(done):
                return
            position += 1
