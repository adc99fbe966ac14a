"""A job with files that is ended in every way, with figures: tests/resilience/test_jobs, longer.

    python -m benchmarks.batch_resume [kill] [interrupt] [unordered] [servers] [disk]

From the repository's root. By default all of them, with 20,000 rows and 50 endings: about fifteen
minutes. The small disk takes the right to mount one.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.resilience import jobs
from tests.resilience.servers import Servers

from vllm_unified.simulator import SimulatorConfig

SEED = 1


def main() -> None:
    """Run what is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *SCENARIOS], help="all by default")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=50)
    options = parser.parse_args()
    for name in options.names or SCENARIOS:
        with tempfile.TemporaryDirectory() as folder, Servers([SimulatorConfig()] * 2) as servers:
            print(f"{name}: ", end="", flush=True)
            print(SCENARIOS[name](Path(folder), servers, options.rows, options.times), flush=True)


def _ended(how: signal.Signals, *more: str) -> Callable[[Path, Servers, int, int], object]:
    def run(folder: Path, servers: Servers, rows: int, times: int) -> object:
        return jobs.ended(
            folder, servers.urls, rows=rows, times=times, how=how, seed=SEED, more=more
        )

    return run


def _servers(folder: Path, servers: Servers, rows: int, times: int) -> object:
    right, deaths = jobs.servers_dying(folder, servers, rows=rows, times=times, seed=SEED)
    return f"{rows} rows, {deaths} deaths of a server, output {'right' if right else 'WRONG'}"


def _disk(folder: Path, servers: Servers, rows: int, times: int) -> object:
    sizes = [rows * size for size in (20, 60, 140)]
    right, complaints = jobs.on_small_disk(folder, servers.urls, rows=rows, sizes=sizes)
    shown = "\n  ".join(complaint.partition("\n")[0] for complaint in complaints)
    return f"{rows} rows, output {'right' if right else 'WRONG'}\n  {shown}"


SCENARIOS: dict[str, Callable[[Path, Servers, int, int], object]] = {
    "kill": _ended(signal.SIGKILL),
    "interrupt": _ended(signal.SIGINT),
    "unordered": _ended(signal.SIGKILL, "--unordered"),
    "servers": _servers,
    "disk": _disk,
}


if __name__ == "__main__":
    main()
