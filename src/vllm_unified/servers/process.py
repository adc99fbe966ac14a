"""One vLLM process and all that it starts: spawned so that it can be ended without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from vllm_unified.servers import guard

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL = 0.05
_KILL_SECONDS = 5.0
# What is left when the HTTP server has ended has nobody to work for.
_ORPHAN_SECONDS = 0.5


def _prctl() -> Callable[[int, int], int]:
    # Loaded before a fork: the child must not import anything.
    function: Callable[[int, int], int] = ctypes.CDLL(None, use_errno=True).prctl
    return function


def become_subreaper() -> None:
    """Make this process the parent of every orphan among its descendants."""
    _prctl()(_PR_SET_CHILD_SUBREAPER, 1)


class VllmProcess:
    """A vLLM server process, in a session of its own, with a guard beside it.

    It cannot outlive this process: the kernel kills it with the thread that spawned it, and the
    guard kills the rest of its session.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        watcher: asyncio.subprocess.Process,
    ) -> None:
        self._process = process
        self._guard = watcher
        self._stopped = False

    @classmethod
    async def spawn(cls, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> Self:
        """Start ``command``, with its output appended to ``log``; from the main thread only.

        Raises:
            OSError: the command cannot be run.
        """
        prctl = _prctl()
        watcher = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", guard.__file__),
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            with log.open("ab") as sink:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=sink,
                    stderr=asyncio.subprocess.STDOUT,
                    env=env,
                    start_new_session=True,
                    preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
                )
        except BaseException:
            await _dismiss(watcher)
            raise
        spawned = cls(process, watcher)
        spawned._tell_guard(process.pid)
        return spawned

    @property
    def pid(self) -> int:
        """The process id of vLLM's HTTP server; also the id of its session."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether vLLM's HTTP server has not ended."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Wait until the HTTP server ends; its exit code, negative for a signal."""
        return await self._process.wait()

    async def stop(self, grace: float) -> int:
        """End the server and all that it started; its exit code. Again, it does nothing.

        Args:
            grace: Seconds between SIGTERM and SIGKILL.
        """
        if self._stopped:
            return await self._process.wait()
        guard.kill(guard.session_members(self.pid), signal.SIGTERM)
        clock = asyncio.get_running_loop().time
        kill_at = clock() + grace
        # After SIGKILL, what is still there hangs in the kernel, and dies when it comes out.
        give_up_at = kill_at + _KILL_SECONDS
        while (rest := self._rest()) and (now := clock()) < give_up_at:
            if not self.running:
                kill_at = min(kill_at, now + _ORPHAN_SECONDS)
            if now >= kill_at:
                guard.kill(rest, signal.SIGKILL)
            await asyncio.sleep(_POLL)
        code = await self._process.wait()
        self._stopped = True
        self._tell_guard(0)
        await _dismiss(self._guard)
        _reap_orphans()
        return code

    def _rest(self) -> list[int]:
        """Living members of the session, and descendants that left it."""
        processes = guard.living()
        ours = {os.getpid()}
        # Parents may come after their children: look until nothing more is found.
        while more := {p for p, (parent, _) in processes.items() if parent in ours} - ours:
            ours |= more
        session = {pid for pid, (_, of) in processes.items() if of == self.pid}
        return list((ours | session) - {os.getpid(), self._guard.pid})

    def _tell_guard(self, session: int) -> None:
        if self._guard.stdin is not None:
            self._guard.stdin.write(f"{session}\n".encode())


async def _dismiss(watcher: asyncio.subprocess.Process) -> None:
    if watcher.stdin is not None:
        watcher.stdin.close()
    await watcher.wait()


def _reap_orphans() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
