"""Every Python block of the documents, and every example, runs on a real vLLM."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live.conftest import KEY
from vllm_unified.servers import LocalServer

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESS, PLACEHOLDER_KEY = "http://localhost:8000", "your-api-key"


def run(code: str, server: LocalServer) -> None:
    program = code.replace(ADDRESS, server.url).replace(PLACEHOLDER_KEY, KEY)
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_blocks_of_a_document_run_one_after_the_other(
    document: Path, live_server: LocalServer
) -> None:
    blocks = BLOCK.findall(document.read_text())
    if not blocks:
        pytest.skip("no Python in it")
    run("\n".join(blocks), live_server)


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(example: Path, live_server: LocalServer) -> None:
    run(example.read_text(), live_server)
