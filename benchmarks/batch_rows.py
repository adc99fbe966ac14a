"""Many rows: rows per second, and memory while they go by.

    python -m benchmarks.batch_rows [--rows 10000000] [--alone] [--format csv] [--unordered]

From the repository's root. The input is generated; the server answers with the same bytes always,
in a process of its own. With --alone nobody is asked: what is left are files and ledger. Memory is
that of the client's process, read while it runs. Takes about 600 bytes of disk a row.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import tempfile
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.resilience.servers import Servers

from vllm_unified import (
    AsyncVllmUnified,
    BatchAnswer,
    BatchProgress,
    BatchStream,
    Choice,
    GenerationResult,
    Usage,
)
from vllm_unified.batch.jobs.job import run_job
from vllm_unified.batch.jobs.plan import Job
from vllm_unified.batch.jobs.question import Asking
from vllm_unified.simulator import SimulatorConfig

MEGABYTE = 2**20
POINTS = 10
RESULT = GenerationResult(
    model="sim",
    choices=(Choice(index=0, text=" Hello", finish_reason="stop"),),
    usage=Usage(prompt_tokens=20, completion_tokens=1, total_tokens=21),
)


def resident() -> int:
    """Memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def generate(path: Path, rows: int) -> None:
    """Rows of about 100 bytes."""
    with path.open("w") as file:
        if path.suffix == ".csv":
            file.write("id,question\n")
            file.writelines(f"{n},{question(n)}\n" for n in range(rows))
        else:
            file.writelines(f'{{"id": {n}, "question": "{question(n)}"}}\n' for n in range(rows))


def question(n: int) -> str:
    """Some words."""
    return f"What is {n} plus {n * 7 % 1000}? Say the number and nothing else, please."


class Instant:
    """A stream of answers that asks nobody."""

    trouble = None

    def __init__(self, prompts: AsyncIterator[object], params: object, pack: object) -> None:
        self._prompts = prompts
        self._answers = self._answer()

    async def _answer(self) -> AsyncIterator[BatchAnswer]:
        index = 0
        async for _ in self._prompts:
            yield BatchAnswer(index=index, result=RESULT)
            index += 1

    def __aiter__(self) -> AsyncIterator[BatchAnswer]:
        return self._answers

    async def close(self) -> None:
        """Nothing is open."""


def _asked(vllm: AsyncVllmUnified, prompts: Any, params: Any, pack: int | None) -> BatchStream:
    return vllm.stream_batch(prompts, params, pack=pack)


async def measure(
    folder: Path, rows: int, format: str, url: str, *, unordered: bool, alone: bool
) -> None:
    """One job."""
    source, output = folder / f"in.{format}", folder / f"out.{format}"
    generate(source, rows)
    points: dict[int, tuple[float, int]] = {}
    began = time.monotonic()

    def watch(progress: BatchProgress) -> None:
        point = progress.rows * POINTS // rows
        if point not in points:
            points[point] = (time.monotonic() - began, resident())

    async with AsyncVllmUnified(api_url=url) as vllm:
        before = time.process_time()
        job = Job(
            input=str(source),
            output=str(output),
            asking=Asking(prompt="Q: {question}\nA:"),
            unordered=unordered,
        )
        ask: Any = Instant if alone else partial(_asked, vllm)
        summary = await run_job(job, ask, on_progress=watch)
        used = time.process_time() - before
    for point, (seconds, memory) in sorted(points.items()):
        print(f"  {point * 100 // POINTS:3d} %: {seconds:8.1f} s, {memory / MEGABYTE:6.1f} MiB")
    asked = points[max(points)][0]
    print(
        f"{summary.rows:,} rows, {summary.failed} failed: {summary.rows / asked:,.0f} rows/s, "
        f"{summary.rows / summary.seconds:,.0f} rows/s with the output written "
        f"({summary.seconds - asked:.1f} s); {used / rows * 1e6:.0f} us of CPU a row; "
        f"output {output.stat().st_size / MEGABYTE:,.0f} MiB"
    )
    with output.open("rb") as file:
        lines = sum(1 for _ in file)
    assert lines == rows + (format == "csv"), f"{lines} lines"


def run(options: argparse.Namespace) -> None:
    """With a server."""
    try:
        import uvloop

        make_loop = uvloop.new_event_loop
    except ImportError:
        make_loop = asyncio.new_event_loop
    config = SimulatorConfig(fixed_answer=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Servers([config]) as servers,
        asyncio.Runner(loop_factory=make_loop) as runner,
    ):
        runner.run(
            measure(
                Path(folder),
                options.rows,
                options.format,
                servers.urls[0],
                unordered=options.unordered,
                alone=options.alone,
            )
        )


def main() -> None:
    """Measure, and perhaps profile."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--format", choices=["jsonl", "csv"], default="jsonl")
    parser.add_argument("--unordered", action="store_true")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.profile:
        with cProfile.Profile() as profile:
            run(options)
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    else:
        run(options)


if __name__ == "__main__":
    main()
