"""Both clients, and servers for them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support import answers
from tests.support.clients import KINDS, make_client
from tests.support.scripted import Reply, Request, ScriptedServer
from vllm_unified import AsyncVllmUnified


def echo(request: Request) -> Reply:
    """A server whose model repeats what it is told."""
    if request.method == "GET":
        return [answers.response()]
    body = request.json
    if "messages" in body:
        return [answers.chat(body["messages"][-1]["content"])]
    prompt = body["prompt"]
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return [answers.completion(*map(str, prompt if several else [prompt]))]


@pytest.fixture(params=KINDS)
async def vllm(
    request: pytest.FixtureRequest, server: ScriptedServer
) -> AsyncIterator[AsyncVllmUnified]:
    """A client of a server that repeats what it is told."""
    server.respond(echo)
    async with make_client(
        request.param, api_url=server.url, model="base", timeout=20, max_retries=0
    ) as vllm:
        yield vllm


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jitter that is small: what is to be tried again is tried at once."""
    monkeypatch.setattr("vllm_unified.batch.runner.random", lambda: 0.02)
