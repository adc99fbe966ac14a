"""From tokens to the text that may be told: detokenising, stop strings, why an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from vllm_unified.simulator.model import TokenLogprob
from vllm_unified.simulator.sampling import Sampling
from vllm_unified.simulator.tokenizer import Detokenizer
from vllm_unified.simulator.vocabulary import EOS

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]


class DecodedLogprob(msgspec.Struct, frozen=True):
    """A token, its text and its logarithmic probability."""

    token: int
    text: str
    logprob: float


class Step(msgspec.Struct, kw_only=True):
    """What one token of one sequence adds."""

    token: int | None
    """``None`` when the sequence ended without one: it was aborted."""
    text: str
    """New text, which may be empty."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[DecodedLogprob, ...] | None = None
    """The token first, then the alternatives."""


class Output:
    """The answer of one sequence so far; the rules are those of vLLM's detokenizer."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self._sampling = sampling
        self._detokenizer = Detokenizer(prompt, skip_special=sampling.skip_special)
        self._decoder = Detokenizer(prompt, skip_special=False)
        self._told = 0
        held_back = sampling.stop and not sampling.include_stop
        self._buffer = max(map(len, sampling.stop)) - 1 if held_back else 0
        self.text = ""
        self.tokens: list[int] = []

    def push(self, token: int, alternatives: Sequence[TokenLogprob] | None) -> Step:
        """Take one token: the step to report, with the reason if it ends the answer."""
        self.tokens.append(token)
        step = Step(token=token, text="")
        step.finish_reason, step.stop_reason = self._ending(token)
        if alternatives is not None:
            step.logprobs = self._decode(token, alternatives)
        if step.finish_reason != "stop" or self._sampling.include_stop:
            self._append(self._detokenizer.push(token), step)
        step.text = self._tell(finished=step.finish_reason is not None)
        return step

    def abort(self) -> Step:
        """End the answer here."""
        return Step(token=None, text=self._tell(finished=True), finish_reason="abort")

    def _ending(self, token: int) -> tuple[FinishReason | None, int | None]:
        sampling, count = self._sampling, len(self.tokens)
        if count >= sampling.min_tokens:
            if token == EOS and not sampling.ignore_eos:
                return "stop", None
            if token in sampling.stop_token_ids:
                return "stop", token
        return ("length" if count >= sampling.max_tokens else None), None

    def _append(self, new: str, step: Step) -> None:
        start = len(self.text)
        self.text += new
        if len(self.tokens) <= self._sampling.min_tokens:
            return
        for stop in self._sampling.stop:
            found = self.text.find(stop, max(start - len(stop) + 1, 0))
            if found >= 0:
                end = found + len(stop) if self._sampling.include_stop else found
                self.text = self.text[:end]
                step.finish_reason, step.stop_reason = "stop", stop
                return

    def _tell(self, *, finished: bool) -> str:
        end = len(self.text) if finished else len(self.text) - self._buffer
        new = self.text[self._told : end] if end > self._told else ""
        self._told = max(self._told, end)
        return new

    def _decode(
        self, token: int, alternatives: Sequence[TokenLogprob]
    ) -> tuple[DecodedLogprob, ...]:
        own = self._decoder.push(token)
        return tuple(
            DecodedLogprob(
                other.token,
                own if other.token == token else Detokenizer(skip_special=False).push(other.token),
                other.logprob,
            )
            for other in alternatives
        )
