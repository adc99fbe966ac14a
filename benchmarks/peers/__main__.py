"""All clients under all loads, in one run: a table, JSON and a picture.

    python -m benchmarks.peers [--short] [--rounds 5] [--only NAME ...] [--output FOLDER]

From the repository's root, with any Python from 3.11 on: each client is installed into an
environment of its own under benchmarks/.envs. The server has one core, the client another; the
clients take turns, and every figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.clients import ENVIRONMENTS, KINDS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / ".envs"
PORTS = 17
SERVER_CORE, CLIENT_CORE = 0, 1
PACKAGES = "vllm-unified openai httpx2 litellm aiohttp wreq uvloop httptools msgspec".split()

Figures = dict[str, dict[str, dict[str, list[float]]]]
"""By client, scenario and figure: one value for each round."""


def python(environment: str) -> Path:
    """An environment's interpreter; the environment is made where it is missing or old."""
    folder = FOLDER / environment
    interpreter = folder / "bin" / "python"
    wanted = " ".join(ENVIRONMENTS[environment])
    made = folder / "made-with"
    if not made.exists() or made.read_text() != wanted:
        print(f"installing {wanted} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [interpreter, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, *ENVIRONMENTS[environment]], cwd=ROOT, check=True)
        made.write_text(wanted)
    return interpreter


def versions() -> dict[str, str]:
    """Of the packages that matter, by name; from all environments."""
    found: dict[str, str] = {}
    for environment in ENVIRONMENTS:
        code = (
            "import importlib.metadata as m\n"
            f"for name in {PACKAGES!r}:\n"
            "    try: print(name, m.version(name))\n"
            "    except m.PackageNotFoundError: pass"
        )
        done = subprocess.run(
            [python(environment), "-c", code], capture_output=True, text=True, check=True
        )
        for line in done.stdout.splitlines():
            name, version = line.split()
            found.setdefault(name, version)
    return found


def machine() -> dict[str, str]:
    """What it ran on."""
    model = "unknown"
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
    return {
        "cpu": f"{model}, {os.cpu_count()} cores",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Hold the lock of those who measure on this machine, if there is one."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure(name: str, ports: list[int], window: float, patience: float, figures: Figures) -> None:
    """One round of one client."""
    command = [python(KINDS[name].environment), "-m", "benchmarks.peers.load", name]
    arguments = [CLIENT_CORE, window, patience, *ports]
    with (FOLDER / f"{name}.log").open("w") as log:
        done = subprocess.run(
            [*command, *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    for line in done.stdout.splitlines():
        if not line.startswith("{"):
            continue
        found = json.loads(line)
        for figure, value in found.items():
            if figure != "scenario":
                figures[name][found["scenario"]][figure].append(value)


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--short", action="store_true", help="one round with short windows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--lock", type=Path, help="to be held while a round is measured")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    chosen = parser.parse_args()
    rounds, window, patience = (1, 0.2, 0.5) if chosen.short else (chosen.rounds, 0.4, 1.0)
    for environment in ENVIRONMENTS:
        python(environment)
    figures: Figures = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    started = time.time()
    serving = subprocess.Popen(
        [python("unified"), "-m", "benchmarks.peers.server", str(PORTS)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
    )
    try:
        assert serving.stdout is not None
        ports = json.loads(serving.stdout.readline())
        for number in range(rounds):
            with alone(chosen.lock):
                for name in chosen.only:
                    began = time.monotonic()
                    measure(name, ports, window, patience, figures)
                    spent = time.monotonic() - began
                    print(f"round {number + 1}: {name}, {spent:.0f} s", file=sys.stderr)
            result = {
                "machine": machine(),
                "versions": versions(),
                "rounds": number + 1,
                "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
                "figures": figures,
            }
            chosen.output.mkdir(exist_ok=True)
            (chosen.output / "performance.json").write_text(json.dumps(result, indent=1) + "\n")
    finally:
        serving.kill()
        serving.wait()
    report = [python("unified"), "-m", "benchmarks.peers.report", chosen.output]
    subprocess.run(report, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
