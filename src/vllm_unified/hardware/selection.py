"""Which backend a request goes to, and why. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from vllm_unified.endpoints.breaker import State
from vllm_unified.hardware.backend import Capabilities
from vllm_unified.hardware.request import InferenceRequest

_DEVICES = ("cuda", "rocm", "xpu", "mps", None, "cpu")
"""The faster first; what is not known lies between."""


class BackendFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a backend when one is chosen."""

    name: str
    priority: int
    order: int
    """Which one it is, in the order of registration."""
    capabilities: Capabilities
    state: State = "closed"
    """Of its breaker."""
    trouble: str | None = None
    """What it failed with last, while it is shut out."""
    is_busy: bool = False
    """Whether it turned requests away just now, because it was full."""
    streams: bool = True
    failed: bool = False
    """Whether this request failed there already."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A backend, as one request sees it."""

    name: str
    eligible: bool
    reasons: tuple[str, ...]
    """Why it stands where it stands; of one that is not eligible, why not."""


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """The backends for a request, the best first; those that cannot take it come last."""

    task: str
    model: str | None
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> str | None:
        """Name of the backend that gets it; ``None`` if there is none."""
        first = next(iter(self.candidates), None)
        return first.name if first is not None and first.eligible else None

    def __str__(self) -> str:
        lines = [f"{self.task}{f' with {self.model}' if self.model else ''}:"]
        for candidate in self.candidates:
            mark = "->" if candidate.name == self.chosen else "  "
            kept = "" if candidate.eligible else "not possible: "
            lines.append(f"{mark} {candidate.name}: {kept}{'; '.join(candidate.reasons)}")
        return "\n".join(lines)


def choose(
    request: InferenceRequest,
    backends: Iterable[BackendFacts],
    *,
    streaming: bool = False,
    longer_than: int | None = None,
) -> Selection:
    """Order the backends: those that can, before those that cannot; then those that do well, by
    room for the prompt, priority, device, and the order of registration.

    One that is shut out is the last resort, not impossible: with every backend shut out, the least
    bad one is still tried.

    Args:
        streaming: Whether only those that stream will do.
        longer_than: Tokens of context that were found to be too few.
    """
    ranked: list[tuple[tuple[int, ...], Candidate]] = []
    for facts in backends:
        obstacles = _obstacles(request, facts, streaming, longer_than)
        if obstacles:
            candidate = Candidate(name=facts.name, eligible=False, reasons=tuple(obstacles))
            ranked.append(((1, facts.order), candidate))
            continue
        tight = _is_tight(request, facts)
        device = facts.capabilities.device
        place = _DEVICES.index(device if device in _DEVICES else None)
        rank = (0, facts.state != "closed", facts.is_busy, tight, -facts.priority, place)
        candidate = Candidate(
            name=facts.name, eligible=True, reasons=tuple(_merits(request, facts, tight))
        )
        ranked.append(((*rank, facts.order), candidate))
    ranked.sort(key=lambda pair: pair[0])
    return Selection(
        task=request.task,
        model=request.model,
        candidates=tuple(candidate for _, candidate in ranked),
    )


def _obstacles(
    request: InferenceRequest, facts: BackendFacts, streaming: bool, longer_than: int | None
) -> list[str]:
    found = []
    capabilities = facts.capabilities
    if facts.failed:
        found.append("this request failed there")
    if capabilities.unavailable:
        found.append(capabilities.unavailable)
    if streaming and not facts.streams:
        found.append("it does not stream")
    models = capabilities.models
    if request.model is not None and models is not None and request.model not in models:
        found.append(f"it serves {', '.join(sorted(models)) or 'nothing'}, not {request.model}")
    context = capabilities.context(request.model)
    tokens, exact = request.tokens()
    if context is not None and exact and tokens > context:
        found.append(f"{tokens} tokens are more than its {context}")
    elif context is not None and longer_than is not None and context <= longer_than:
        found.append(f"its {context} tokens are too few")
    return found


def _is_tight(request: InferenceRequest, facts: BackendFacts) -> bool:
    context = facts.capabilities.context(request.model)
    return context is not None and request.tokens()[0] > context


def _merits(request: InferenceRequest, facts: BackendFacts, tight: bool) -> Iterable[str]:
    capabilities = facts.capabilities
    if facts.state != "closed":
        yield f"shut out, the last resort: {facts.trouble or 'it failed'}"
    if facts.is_busy:
        yield "it was full just now"
    context = capabilities.context(request.model)
    if tight:
        yield f"about {request.tokens()[0]} tokens may not fit in its {context}"
    if capabilities.models is None:
        yield "its models are not known"
    elif request.model is not None:
        yield f"serves {request.model}"
    else:
        yield f"serves {', '.join(sorted(capabilities.models)) or 'nothing'}"
    if context is not None and not tight:
        yield f"context of {context} tokens"
    yield f"priority {facts.priority}"
    yield f"on {capabilities.device}" if capabilities.device else "device not known"
    if facts.state == "closed":
        yield "no failures"
