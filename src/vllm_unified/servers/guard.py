"""Kill a session of processes when the one who watched over them is gone.

``python guard.py`` reads lines from its standard input: a session's id to watch, or ``0`` for
none. When the input ends, because its writer died even by ``kill -9``, all processes of the
session are killed. It is run by its path, with ``python -I -S``, and uses only the standard
library, so that it is small and always starts.

vLLM needs this: when its HTTP server is killed, its engine processes can live on as orphans and
keep the memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

_ROUNDS = 100
_PAUSE = 0.05


def stat_fields(pid: int) -> list[str]:
    """Fields 3 and on of ``/proc/PID/stat``: state, parent, group, session, ...; or none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in parentheses, may itself hold spaces and parentheses.
            return file.read().rpartition(b")")[2].decode("ascii").split()
    except OSError:
        return []


def living() -> dict[int, tuple[int, int]]:
    """Parent and session of every process that is not a zombie."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = stat_fields(int(entry))
            if fields and fields[0] not in "ZX":
                found[int(entry)] = (int(fields[1]), int(fields[3]))
    return found


def session_members(session: int) -> list[int]:
    """The living processes of a session, whoever their parents are now."""
    return [pid for pid, (_, of) in living().items() if of == session]


def kill(pids: list[int], number: int) -> None:
    """Send a signal to each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def kill_session(session: int) -> None:
    """Kill all of a session, and what it forks meanwhile; takes 5 seconds at most."""
    for _ in range(_ROUNDS):
        members = session_members(session)
        if not members:
            return
        kill(members, signal.SIGKILL)
        time.sleep(_PAUSE)


def main() -> None:
    """Watch until the input ends, then kill what is watched."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    session = 0
    for line in sys.stdin:
        session = int(line)
    if session:
        kill_session(session)


if __name__ == "__main__":
    main()
