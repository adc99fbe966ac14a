"""Where the time of a chat goes: CPU time by function, from samples.

    python -m benchmarks.peers.sample [CLIENT] [AT_ONCE] [--seconds 10] [--top 40]

In the environment of the client, and pinned like the benchmark. A timer that runs with the CPU time
of the process interrupts it a thousand times a second, and the function that runs is counted. The
interpreter notices between two steps of Python code: what a C function takes, a system call among
them, counts for the Python code that follows it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from benchmarks.peers.__main__ import CLIENT_CORE, PORTS, ROOT, SERVER_CORE
from benchmarks.peers.clients import KINDS
from benchmarks.peers.load import PROMPT, Window, chats

SECONDS_BEFORE = 1.0
INTERVAL = 0.001
TASKS = [name for name, kind in KINDS.items() if not kind.threads]


class Sampler:
    """Counts the functions that run."""

    def __init__(self) -> None:
        self.functions: Counter[str] = Counter()

    def start(self) -> None:
        """Count from now on."""
        signal.signal(signal.SIGPROF, self._count)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)

    def stop(self) -> None:
        """Count no more."""
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _count(self, number: int, frame: FrameType | None) -> None:
        if frame is not None:
            code = frame.f_code
            self.functions[f"{Path(code.co_filename).name} {code.co_qualname}"] += 1


async def sample(
    name: str, ports: list[int], at_once: int, seconds: float
) -> tuple[Sampler, float]:
    """The samples, and seconds of CPU time for a chat."""
    sampler = Sampler()
    client = KINDS[name].make(ports)
    asyncio.get_running_loop().call_later(SECONDS_BEFORE, sampler.start)
    try:
        found = await chats(client, at_once, PROMPT, Window(seconds, SECONDS_BEFORE))
    finally:
        sampler.stop()
        await client.close()
    return sampler, found["cpu"]


def main() -> None:
    """Print the functions that take most."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("client", nargs="?", default="unified", choices=TASKS)
    parser.add_argument("at_once", nargs="?", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--top", type=int, default=40)
    chosen = parser.parse_args()
    import uvloop

    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peers.server", str(PORTS)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
    ) as serving:
        assert serving.stdout is not None
        assert serving.stdin is not None
        ports = json.loads(serving.stdout.readline())
        os.sched_setaffinity(0, {CLIENT_CORE})
        usual = ports[1 : 1 + KINDS[chosen.client].ports]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            sampler, cpu = runner.run(sample(chosen.client, usual, chosen.at_once, chosen.seconds))
        serving.stdin.close()
    total = sampler.functions.total()
    print(f"{cpu * 1e6:.1f} us of CPU a chat; {total} samples")
    for function, count in sampler.functions.most_common(chosen.top):
        print(f"{count / total * cpu * 1e6:6.2f} us  {function}")


if __name__ == "__main__":
    main()
