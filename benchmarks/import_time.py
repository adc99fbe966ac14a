"""Time and memory of ``from vllm_unified import VllmUnified`` beside ``import openai`` and an empty
program; and the time of the command line's help, from the process's start to its end.

    python benchmarks/import_time.py [--runs 9]

Each runs in a process of its own, in turn with the others, with byte code already compiled; the
figures are medians. Without openai installed, its row is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time

PROGRAM = """
import resource, sys, time
started = time.perf_counter()
{statement}
seconds = time.perf_counter() - started
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
STATEMENTS = {
    "nothing": "pass",
    "vllm_unified": "from vllm_unified import VllmUnified",
    "openai": "import openai",
}
COMMANDS = ("--version", "--help", "generate --help", "batch --help", "serve --help")


def measure(statement: str) -> tuple[float, float]:
    """Seconds of the import, and the process's peak memory in MiB."""
    program = PROGRAM.format(statement=statement)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    seconds, memory = done.stdout.split()
    return float(seconds), float(memory)


def time_command(arguments: str) -> float:
    """Seconds of ``vllm-unified ARGUMENTS``, all of its process."""
    program = "from vllm_unified.cli import main; main()"
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", program, *arguments.split()], capture_output=True, check=True
    )
    return time.perf_counter() - started


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    names = [name for name in STATEMENTS if name == "nothing" or importlib.util.find_spec(name)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    commands: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for run in range(runs + 1):  # the first only compiles
        for name in names:
            figures = measure(STATEMENTS[name])
            found[name] += [figures] if run else []
        for command in COMMANDS:
            seconds = time_command(command)
            commands[command] += [seconds] if run else []
    print(f"{'import':30} {'time':>9} {'(min-max)':>17} {'peak memory':>12}   {runs} runs")
    for name, rows in found.items():
        memory = statistics.median(row[1] for row in rows)
        print(f"{name:30} {_milliseconds([row[0] for row in rows])} {memory:8.0f} MiB")
    print("\ncommand, all of its process")
    for command, times in commands.items():
        print(f"{'vllm-unified ' + command:30} {_milliseconds(times)}")


def _milliseconds(seconds: list[float]) -> str:
    least, most = 1000 * min(seconds), 1000 * max(seconds)
    return f"{1000 * statistics.median(seconds):6.0f} ms {f'({least:.0f}-{most:.0f})':>17}"


if __name__ == "__main__":
    main()
