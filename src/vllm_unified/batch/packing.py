"""Several prompts in one request: when it pays, and what of the answer is whose. Pure.

A request costs both sides a millisecond or less of CPU beside the generation, whatever it holds.
Where a server answers hundreds of prompts in a second, that is much of the time; where it answers
ten, it is nothing, and a pack only waits for its longest answer. So it is measured, in each batch.
"""

from __future__ import annotations

from vllm_unified.results import Choice, GenerationResult, Usage

SIZES = (1, 4, 16, 32)
"""Prompts in a request that are compared."""
EARNED = 1.1
"""Ratio of throughputs that a larger pack must show."""
WORTH_A_TRY = 50.0
"""Prompts per second of a server, below which requests cost next to nothing."""
WINDOW = 1.0
"""Seconds of a measurement, at least."""
ROUNDS = 3
"""And as many answers as this times what is under way."""
REST = 60.0
"""Seconds until it is looked at again."""


class PackSize:
    """How many prompts to put into a request.

    A size is measured, then a larger one, then the first again: the larger one has to be better
    than both, so that a server that only gets faster does not count for it. Times are monotonic
    seconds.
    """

    __slots__ = (
        "_answered",
        "_base",
        "_before",
        "_is_settled",
        "_larger",
        "_most",
        "_resting_until",
        "_since",
        "size",
    )

    def __init__(self, most: int, *, fixed: int | None = None) -> None:
        """``most`` prompts may be in one request; ``fixed``: always so many, if they may be."""
        self._most = min(most, SIZES[-1]) if fixed is None else 1
        self.size = 1 if fixed is None else min(fixed, most)
        """Prompts in a request, now."""
        self._base = self.size
        self._before: float | None = None
        """Throughput of the base, measured before the larger size."""
        self._larger: float | None = None
        """Throughput of the larger size."""
        self._resting_until = 0.0
        self._begin()

    def _begin(self) -> None:
        self._answered = 0
        self._since: float | None = None
        self._is_settled = False

    @property
    def is_off(self) -> bool:
        """Whether nothing is measured: it is fixed, or not possible."""
        return self._most == 1

    def give_up(self) -> None:
        """Packs do not work here."""
        self.allow(1)

    def allow(self, prompts: int) -> None:
        """No more than so many may be in one request."""
        self._most = min(self._most, prompts)
        self.size, self._base = min(self.size, prompts), min(self._base, prompts)

    def answered(self, prompts: int, *, under_way: int, servers: int, now: float) -> None:
        """So many prompts were answered.

        Args:
            under_way: Prompts that are being answered.
            servers: Among which they are spread.
        """
        if self._most == 1 or now < self._resting_until:
            return
        self._answered += prompts
        if not self._is_settled:
            if self._answered >= under_way:
                self._begin()
                self._is_settled, self._since = True, now
            return
        assert self._since is not None
        seconds = now - self._since
        if seconds >= WINDOW and self._answered >= ROUNDS * under_way:
            self._measured(self._answered / seconds, servers, now)

    def _measured(self, rate: float, servers: int, now: float) -> None:
        if self.size != self._base:
            self._larger = rate
            self._go_to(self._base)
        elif self._before is None or self._larger is None:
            if rate < WORTH_A_TRY * servers or self._next is None:
                self._rest(now)
                return
            self._before = rate
            self._go_to(self._next)
        elif self._larger >= EARNED * max(self._before, rate):
            assert self._next is not None
            self._base = self._next
            self._before = self._larger = None
            self._go_to(self._base)
        else:
            self._rest(now)

    @property
    def _next(self) -> int | None:
        """The next larger size."""
        return next((size for size in SIZES if self._base < size <= self._most), None)

    def _go_to(self, size: int) -> None:
        self.size = size
        self._begin()

    def _rest(self, now: float) -> None:
        """Stay here for a while, and then look again whether more is better."""
        self._resting_until = now + REST
        self.size = self._base
        self._before = self._larger = None
        self._begin()

    def __repr__(self) -> str:
        return f"<PackSize {self.size}>"


def most_in_a_pack(*, tokens: int, samples: int, logprobs: int, limit: int) -> int:
    """How many prompts may share a request so that its answer is surely not too large.

    Args:
        tokens: That an answer may have.
        samples: Answers to each prompt.
        logprobs: Alternatives that are shown for each token.
        limit: Bytes that an answer may have.
    """
    # A token is 4 characters, perhaps escaped, and an id; an alternative has a name and a number.
    size = max(tokens, 1) * samples * (40 + 60 * logprobs) + 2000
    return max(1, min(limit // 4 // size, SIZES[-1]))


def own_results(packed: GenerationResult, prompts: int) -> list[GenerationResult] | None:
    """The result of each prompt of a pack; ``None`` if the server did not say which tokens are
    whose, as usage would not be exact.

    Each has its own choices and its own usage, counted in token ids, and shares what belongs to the
    request: id, time and attempts. What came from the prefix cache is known for all together only.
    """
    samples = len(packed.choices) // prompts
    results = []
    for start in range(0, samples * prompts, samples):
        choices = packed.choices[start : start + samples]
        prompt_ids = choices[0].prompt_token_ids
        if prompt_ids is None or any(choice.token_ids is None for choice in choices):
            return None
        generated = sum(len(choice.token_ids or ()) for choice in choices)
        results.append(
            GenerationResult(
                id=packed.id,
                model=packed.model,
                created=packed.created,
                system_fingerprint=packed.system_fingerprint,
                choices=tuple(_own(choice, number) for number, choice in enumerate(choices)),
                usage=Usage(
                    prompt_tokens=len(prompt_ids),
                    completion_tokens=generated,
                    total_tokens=len(prompt_ids) + generated,
                ),
                metadata=packed.metadata,
            )
        )
    return results


def _own(choice: Choice, index: int) -> Choice:
    """The choice as it would be alone; nobody asked for its token ids."""
    return Choice(
        index=index,
        text=choice.text,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        reasoning=choice.reasoning,
        tool_calls=choice.tool_calls,
        logprobs=choice.logprobs,
    )
