"""One answer in the making, and the line in which answers wait for the model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from vllm_unified.fleet.stops import StopMatcher
from vllm_unified.hardware.transformers.detokenizer import Detokenizer
from vllm_unified.hardware.transformers.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled"]


class Job:
    """A prompt, and what has been generated after it. The model's thread works on it.

    Args:
        prompt: Token ids.
        limit: Tokens that may be generated at most.
        ends: Token ids that end an answer.
        tell: Called with new text, and with ``None`` at the end, in the model's thread.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        limit: int,
        ends: frozenset[int],
        decode: Callable[[Sequence[int]], str],
        tell: Callable[[str | None], None],
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.limit = limit
        self.ends = ends
        self.tokens: list[int] = []
        self.parts: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | None = None
        self.error: Exception | None = None
        self._detokenizer = Detokenizer(decode, prompt)
        self._stops = (
            StopMatcher(sampling.stop, keeps_match=False, before="") if sampling.stop else None
        )
        self._tell = tell
        self._cancelled = threading.Event()

    @property
    def text(self) -> str:
        """What has been generated, and can be shown."""
        return "".join(self.parts)

    @property
    def holds_end(self) -> bool:
        """Whether it must not end yet."""
        return len(self.tokens) < self.sampling.min_tokens

    def cancel(self) -> None:
        """Generate no more. From any thread."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it."""
        return self._cancelled.is_set()

    def feed(self, token: int) -> bool:
        """Take a generated token; whether the answer is complete."""
        if self.finish_reason is not None:
            return True
        if self.is_cancelled:
            self._finish("cancelled")
            return True
        if token in self.ends and not self.sampling.ignore_eos:
            self.tokens.append(token)
            self._finish("stop")
            return True
        self.tokens.append(token)
        if self._show(self._detokenizer.feed(token)):
            return True
        if len(self.tokens) >= self.limit:
            self._finish("length")
        return self.finish_reason is not None

    def fail(self, error: Exception) -> None:
        """The model failed."""
        if self.finish_reason is None and self.error is None:
            self.error = error
            self._tell(None)

    def _show(self, text: str) -> bool:
        """Deliver new text; whether a stop string ended the answer."""
        if self._stops is not None and text:
            text, self.stop_reason = self._stops.feed(text)
        if text:
            self.parts.append(text)
            self._tell(text)
        if self.stop_reason is None:
            return False
        self.finish_reason = "stop"
        self._tell(None)
        return True

    def _finish(self, reason: FinishReason) -> None:
        if reason != "cancelled" and self._show(self._detokenizer.finish()):
            return
        rest = self._stops.finish() if self._stops is not None else ""
        if rest:
            self.parts.append(rest)
            self._tell(rest)
        self.finish_reason = reason
        self._tell(None)


class Line:
    """Jobs that wait. One thread takes them, several at a time where they go together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, job: Job) -> bool:
        """Have a job done; whether it will be: not once the line is closed."""
        with self._changed:
            if not self._closed:
                self._jobs.append(job)
                self._changed.notify()
            return not self._closed

    def take(self) -> list[Job]:
        """The job that waits longest, and those that can be generated with it. Waits for one;
        empty once the line is closed."""
        with self._changed:
            while True:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return []
                taken = self._together()
                if taken:
                    return taken

    def _together(self) -> list[Job]:
        waiting = [job for job in self._jobs if not job.is_cancelled]
        taken: list[Job] = []
        for job in waiting:
            first = taken[0].sampling if taken else job.sampling
            if job.sampling.group == first.group and len(taken) < self._most:
                taken.append(job)
                if first.is_alone:
                    break
        self._jobs = deque(job for job in waiting if job not in taken)
        return taken

    def close(self) -> list[Job]:
        """Take no more; the jobs that nobody will do."""
        with self._changed:
            self._closed = True
            left = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        return left
