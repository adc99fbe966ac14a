"""The guard, alone, and importing it all where there is no Unix."""

from __future__ import annotations

import subprocess
import sys

from tests.support.waiting import until
from vllm_unified.servers import guard

TREE = (
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
)


def start_guard() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__], stdin=subprocess.PIPE, text=True
    )


def test_a_session_is_killed_when_its_watcher_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", TREE], start_new_session=True) as tree:
        until(lambda: len(guard.session_members(tree.pid)) == 2)
        with start_guard() as watcher:
            watcher.communicate(f"{tree.pid}\n")
        assert guard.session_members(tree.pid) == []


def test_a_session_that_is_not_watched_any_more_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", TREE], start_new_session=True) as tree:
        until(lambda: len(guard.session_members(tree.pid)) == 2)
        with start_guard() as watcher:
            watcher.communicate(f"{tree.pid}\n0\n")
        assert len(guard.session_members(tree.pid)) == 2
        guard.kill_session(tree.pid)


def test_a_process_that_is_gone_has_no_fields() -> None:
    assert guard.stat_fields(2**22 + 1) == []


def test_importing_needs_no_unix() -> None:
    code = (
        "import os, sys; sys.modules['fcntl'] = None; del os.fork, os.getuid, os.register_at_fork;"
        "import vllm_unified.servers, vllm_unified.hardware.detect"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
