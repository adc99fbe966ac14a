"""What a server says to the probe: proof that it generates, and what it can be compared by."""

from __future__ import annotations

import asyncio
import time

import msgspec

from vllm_unified.client import AsyncVllmUnified
from vllm_unified.models.fidelity import PROBES, Reading, perplexity, probe_body, reading_of
from vllm_unified.servers.local import LocalServer

STREAMS = 4
TOKENS = 32
"""Of each of the short generations that the speed is taken from."""

_PROMPT = "Write a short story about a dragon who learns to read."
_SECONDS = 600.0


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """A server's answers to the probe."""

    readings: tuple[Reading, ...]
    perplexity: float
    tokens_per_second: float


async def prove(server: LocalServer) -> Proof:
    """Have the server read the probe's texts, and then write :data:`STREAMS` texts at once.

    Raises:
        VllmError: it does not generate.
    """
    async with AsyncVllmUnified(
        api_url=server.url,
        model=server.model,
        api_key=server.api_key or "",
        timeout=_SECONDS,
        proxy="",
    ) as client:
        readings = []
        for text in PROBES:
            answer = await client.make_request(None, probe_body(text))
            readings.append(reading_of(answer.raw))
        started = time.monotonic()
        answers = await asyncio.gather(
            *(
                client.generate(_PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True)
                for _ in range(STREAMS)
            )
        )
        seconds = time.monotonic() - started
    counts = [answer.usage.completion_tokens for answer in answers if answer.usage]
    return Proof(
        readings=tuple(readings),
        perplexity=perplexity(readings),
        tokens_per_second=sum(counts) / seconds,
    )
