"""The real servers that live tests share; each starts when a test first asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.vllm import running
from vllm_unified.servers import LocalServer, ServerSpec

KEY = "sk-live-tests"
MAX_IN_FLIGHT = 40


@pytest.fixture(scope="package")
def live_server() -> Iterator[LocalServer]:
    """The bundled model, with a key, a tool parser, and admission control."""
    spec = ServerSpec(
        api_key=KEY,
        dev_mode=True,
        extra_args=(
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            *("--max-num-queued-reqs", str(MAX_IN_FLIGHT)),
        ),
    )
    with running(spec) as server:
        yield server


@pytest.fixture(scope="package")
def embedding_server() -> Iterator[LocalServer]:
    """The bundled model, as one that makes embeddings."""
    spec = ServerSpec(
        served_model_name="embedder",
        max_model_len=512,
        extra_args=("--runner", "pooling", "--convert", "embed"),
    )
    with running(spec) as server:
        yield server


@pytest.fixture
def url(live_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address; its key is in the environment, as the guide has it."""
    for name in ("VLLM_API_URL", "VLLM_MODEL", "VLLM_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return live_server.url


@pytest.fixture
def model(live_server: LocalServer) -> str:
    """The name that it serves."""
    return live_server.model
