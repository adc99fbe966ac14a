"""The layers of docs/architecture.md, read from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vllm_unified

PACKAGE = Path(vllm_unified.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
}
PURE = (
    "errors results settings wire.requests wire.responses wire.sse wire.failures wire.chunks "
    "wire.structure wire.parameters wire.transport endpoints.retry endpoints.adaptive "
    "endpoints.breaker endpoints.budget endpoints.histogram endpoints.queue endpoints.quota "
    "endpoints.stats endpoints.verdict endpoints.config fleet.policies fleet.prefix "
    "fleet.candidates fleet.turns fleet.load fleet.affinity "
    "fleet.continuation fleet.stops endpoints.backoff "
    "models.info models.facts models.served models.metrics models.statistics models.lora.adapters "
    "models.lora.placement models.lora.fit models.fidelity models.quantization arguments templates "
    "batch.answer batch.errors batch.metrics batch.patience batch.requests batch.packing"
    " batch.jobs.template batch.jobs.question batch.jobs.columns batch.jobs.fingerprint "
    "batch.jobs.summary batch.jobs.leases batch.files.rows batch.files.shape batch.files.lines "
    "fleet.hashing"
).split()
IO = {
    "asyncio",
    "socket",
    "ssl",
    "http.client",
    "urllib.request",
    "httptools",
    "aiohappyeyeballs",
    "subprocess",
    "threading",
}
# Layers, lowest first; a module imports from its own and from lower ones.
LAYERS = [
    ("version", "errors", "results", "settings", "events", "deadlines"),
    ("wire",),
    ("endpoints",),
    ("fleet",),
    ("arguments", "templates", "batch", "feeding", "handler", "bridge", "configfile", "models"),
    ("client", "batching", "management", "balancer", "blocking"),
]


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it is imported, absolute."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            found.add(node.module)
    return found


def layer(module: str) -> int | None:
    for height, names in enumerate(LAYERS):
        if module.split(".")[0] in names:
            return height
    return None


CLIENT = [module for module in MODULES if layer(module) is not None]


@pytest.mark.parametrize("module", CLIENT)
def test_nothing_calls_upwards(module: str) -> None:
    height = layer(module)
    for name in imports(MODULES[module]):
        if name.startswith("vllm_unified."):
            below = layer(name.removeprefix("vllm_unified."))
            assert below is not None, f"{module} imports {name}, which is no part of the client"
            assert height is not None
            assert below <= height, f"{module} imports {name}, which lies above it"


@pytest.mark.parametrize("module", PURE)
def test_decisions_do_no_input_or_output(module: str) -> None:
    assert imports(MODULES[module]).isdisjoint(IO)


def test_one_module_knows_the_http_library() -> None:
    knowing = [module for module in CLIENT if "httptools" in imports(MODULES[module])]

    assert knowing == ["wire.connection"]


@pytest.mark.parametrize("module", CLIENT)
def test_a_module_is_one_noun(module: str) -> None:
    """At 500 lines, ask what the second one is. Surfaces are lists of methods."""
    limit = {"client": 750, "blocking": 1300}.get(module, 500)

    assert len(MODULES[module].read_text().splitlines()) <= limit
