"""A program on a terminal of its own, and the user before it."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

SECONDS = 10.0
CTRL_C, CTRL_D = "\x03", "\x04"

# The program takes the terminal for its own, so that Ctrl-C there reaches it.
_PROGRAM = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from vllm_unified.cli import main
main()
"""


class Terminal:
    """``vllm-unified`` with these arguments. Leaving the block kills what still runs.

    On a ``dumb`` terminal nothing that was shown is ever taken back.
    """

    def __init__(self, *args: str, term: str = "dumb") -> None:
        import pty

        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": term},
        )
        os.close(slave)
        self._unseen = ""
        self.shown = ""
        """All that the program wrote, and the terminal's echo of what was typed."""

    def enter(self, text: str) -> None:
        """Type; a line ends with a line feed."""
        os.write(self._master, text.encode())

    def press_until(self, key: str, text: str) -> None:
        """Press a key, and again, until this is shown.

        An interrupt in the moment in which readline digests a key waits there for the next one.
        """
        for _ in range(3):
            self.enter(key)
            deadline = time.monotonic() + SECONDS / 3
            while text not in self._unseen and self._read(deadline):
                pass
            if text in self._unseen:
                break
        self.expect(text)

    def expect(self, text: str) -> None:
        """Wait until this is shown, after what was expected before."""
        deadline = time.monotonic() + SECONDS
        while text not in self._unseen:
            assert self._read(deadline), f"no {text!r} in {self._unseen!r}"
        self._unseen = self._unseen.partition(text)[2]

    def wait(self) -> int:
        """Wait until the program ends; its exit code."""
        deadline = time.monotonic() + SECONDS
        while self._read(deadline):
            pass
        return self._process.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        """Whether the program wrote something before the deadline."""
        if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        text = ""
        with contextlib.suppress(OSError):  # EIO: the program has gone
            text = os.read(self._master, 65536).decode().replace("\r\n", "\n")
        self.shown += text
        self._unseen += text
        return bool(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)
