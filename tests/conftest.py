"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings
from xdist.workermanage import WorkerController

from tests.support.scripted import ScriptedServer

settings.register_profile("full", max_examples=50, deadline=None)
settings.register_profile("quick", max_examples=15, deadline=None)  # of make quick
settings.load_profile("full")

# Shells start background jobs with SIGINT ignored, and programs that tests start would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

OUTSIDE = (
    "VLLM_API_URL VLLM_MODEL VLLM_API_KEY VLLM_TIMEOUT VLLM_UNIFIED_CONFIG "
    "HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy"
).split()


# A supervisor with a fake engine; a program in a terminal of its own.
STARTS_PROGRAMS = {"fakes", "terminal"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts other programs, which takes seconds where other tests take milliseconds;
    and keep the live tests that share servers together."""
    for item in items:
        if not STARTS_PROGRAMS.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("processes")
        if item.get_closest_marker("live") and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("shared servers"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: WorkerController, ids: list[str]) -> None:
    """Versions of pytest and xdist that do not fit each other forget the groups without a word."""
    if node.config.option.dist == "loadgroup" and ids and not any("@" in id for id in ids):
        pytest.exit("--dist loadgroup: this pytest-xdist puts no test into its group", 4)


@pytest.fixture(scope="session", autouse=True)
def _a_core_for_each_worker() -> None:
    """By itself, vLLM binds the threads of every server to the same core."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        core = int(worker.removeprefix("gw")) % (os.cpu_count() or 1)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "live" in request.path.parts:
        return  # those install engines, perhaps through a proxy
    for variable in OUTSIDE:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A server without a script: it closes every connection after the request."""
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full jitter, of which every pause is nothing."""
    monkeypatch.setattr("vllm_unified.fleet.fleet.random", lambda: 0.0)
