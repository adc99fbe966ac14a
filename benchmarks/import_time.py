"""Time and memory of ``import vllm_unified`` beside ``import openai`` and an empty program.

    python benchmarks/import_time.py [--runs 9]

Each import runs in a process of its own, in turn with the others, with byte code already
compiled; the figures are medians. Without openai installed, its row is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys

PROGRAM = """
import resource, sys, time
started = time.perf_counter()
{statement}
seconds = time.perf_counter() - started
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
STATEMENTS = {
    "nothing": "pass",
    "vllm_unified": "import vllm_unified",
    "openai": "import openai",
}


def measure(statement: str) -> tuple[float, float]:
    """Seconds of the import, and the process's peak memory in MiB."""
    program = PROGRAM.format(statement=statement)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    seconds, memory = done.stdout.split()
    return float(seconds), float(memory)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    names = [name for name in STATEMENTS if name == "nothing" or importlib.util.find_spec(name)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for name in names:
        measure(STATEMENTS[name])
    for _ in range(runs):
        for name in names:
            found[name].append(measure(STATEMENTS[name]))
    print(f"{'import':14} {'time':>9} {'(min-max)':>17} {'peak memory':>12}   {runs} runs")
    for name, figures in found.items():
        seconds = [1000 * figure[0] for figure in figures]
        memory = statistics.median(figure[1] for figure in figures)
        spread = f"({min(seconds):.0f}-{max(seconds):.0f})"
        print(f"{name:14} {statistics.median(seconds):6.0f} ms {spread:>17} {memory:8.0f} MiB")


if __name__ == "__main__":
    main()
