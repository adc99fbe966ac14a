"""Backends for tests, which do as they are told."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from vllm_unified.hardware import Capabilities, HardwareAbstractionLayer, InferenceRequest
from vllm_unified.results import StreamChunk


class Scripted:
    """Answers with its own name, or fails with what ``failing`` has."""

    def __init__(
        self, name: str, *, models: dict[str, int | None] | None = None, device: str | None = None
    ) -> None:
        self.name = name
        self.models = models
        self.device = device
        self.unavailable: str | None = None
        self.failing: list[Exception] = []
        self.well = True
        self.requests: list[InferenceRequest] = []
        self.looks = 0
        self.hold: asyncio.Event | None = None
        self.cancelled = 0

    async def infer(self, request: InferenceRequest) -> Any:
        self.requests.append(request)
        if self.hold is not None:
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.failing:
            raise self.failing.pop(0)
        return self.name

    async def health(self) -> bool:
        self.looks += 1
        return self.well

    async def capabilities(self) -> Capabilities:
        return Capabilities(models=self.models, device=self.device, unavailable=self.unavailable)


class Streamed(Scripted):
    """Streams its name, character by character; fails after ``breaks_after`` of them."""

    breaks_after: int | None = None
    closed = 0

    async def stream(self, request: InferenceRequest) -> AsyncIterator[StreamChunk | str]:
        self.requests.append(request)
        if self.failing:
            raise self.failing.pop(0)
        try:
            for number, character in enumerate(self.name):
                if number == self.breaks_after:
                    raise ConnectionError("it broke")
                yield character if number % 2 else StreamChunk(text=character)
        finally:
            self.closed += 1


class Batched(Scripted):
    """Takes many at once."""

    batches: int = 0

    async def batch(self, requests: Sequence[InferenceRequest]) -> list[Any]:
        self.batches += 1
        if self.failing:
            raise self.failing.pop(0)
        return [f"{self.name}:{request.input}" for request in requests]


async def taken_over(hal: HardwareAbstractionLayer, name: str) -> None:
    """Ask until this backend answers."""
    async with asyncio.timeout(20):
        for _ in itertools.count():
            if (await hal.run_inference("llm", "Hello")).backend == name:
                return
            await asyncio.sleep(0.002)
