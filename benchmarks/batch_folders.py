"""A folder of files through the Ray Data pipeline: rows per second, and the caller's memory.

    python -m benchmarks.batch_folders [--rows 100000] [--files 8] [--workers 2]

From the repository's root, with the extra ``ray``. The cluster is made for it, of this machine; the
server answers with the same bytes always, in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.batch_rows import MEGABYTE, generate, resident
from tests.resilience.servers import Servers

from vllm_unified import BatchProgress, VllmUnified
from vllm_unified.simulator import SimulatorConfig


def measure(folder: Path, options: argparse.Namespace, url: str) -> None:
    """One job."""
    source = folder / "in"
    source.mkdir()
    for number in range(options.files):
        generate(source / f"{number:04}.jsonl", options.rows // options.files)
    points: list[tuple[float, int, int]] = []
    began = time.monotonic()

    def watch(progress: BatchProgress) -> None:
        points.append((time.monotonic() - began, progress.rows, resident()))

    with VllmUnified(api_url=url) as vllm:
        summary = vllm.run_batch(
            source,
            folder / "out",
            prompt="Q: {question}\nA:",
            model="sim",
            ray="local",
            ray_workers=options.workers,
            on_progress=watch,
        )
    asking = [point for point in points if 0 < point[1] < summary.rows]
    (start, first, _), (end, last, _) = asking[0], asking[-1]
    print(
        f"{summary.rows:,} rows, {summary.failed} failed, in {summary.seconds:.1f} s with the "
        f"start of the actors; {(last - first) / (end - start):,.0f} rows/s between the first "
        f"and the last report; memory of the caller {points[0][2] / MEGABYTE:.1f} MiB at the "
        f"first report, {points[-1][2] / MEGABYTE:.1f} MiB at the last"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    config = SimulatorConfig(fixed_answer=True)
    with tempfile.TemporaryDirectory() as folder, Servers([config]) as servers:
        measure(Path(folder), options, servers.urls[0])


if __name__ == "__main__":
    main()
