"""What a fleet shows under faults, with figures: the scenarios of tests/resilience, longer.

    python -m benchmarks.resilience [chaos] [outage] [overload]

From the repository's root. The servers run in a process of their own. Without names all three, in
about four minutes.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence

from tests.resilience import chaos, outage, overload
from tests.resilience.ledger import STEP

SEED = 2
CHAOS, OUTAGE, OVERLOAD = 120.0, 30.0, 30.0
"""Seconds."""
MEGABYTE = 2**20
WIDTH = 60
"""Characters of the longest bar."""


def bars(counts: Sequence[int], *, start: float, step: float) -> str:
    """A line for each count, from so many seconds on."""
    most = max([WIDTH, *counts])
    return "\n".join(
        f"  {start + number * step:6.1f} s {count:5d} {'#' * round(count * WIDTH / most)}"
        for number, count in enumerate(counts)
    )


def joined(counts: Sequence[int], step: float) -> list[int]:
    """Counts of ``STEP`` seconds as counts of ``step``."""
    size = round(step / STEP)
    return [sum(counts[at : at + size]) for at in range(0, len(counts), size)]


def tell_chaos(found: chaos.Chaos) -> None:
    """Print what became of it."""
    ledger, memory = found.ledger, [size / MEGABYTE for size in found.memory]
    calls, attempts = ledger.calls, ledger.attempts
    half = memory[len(memory) // 2]
    lost = len(ledger.open_calls)
    print(
        f"chaos: {found.seconds:g} s at {chaos.COMPRESSION}:1, {chaos.SERVERS} servers, "
        f"{chaos.CALLERS} callers, at most {found.most_down} servers down at a time\n"
        f"  faults: {_counted(found.faults)}\n"
        f"  {calls} calls, {found.answered} answered: {found.success:.4%}; "
        f"errors: {_counted(found.errors) or 'none'}\n"
        f"  {lost} lost, {ledger.ended_twice} ended twice, {len(found.wrong)} wrong texts; "
        f"{found.continued} streams went on elsewhere\n"
        f"  {attempts} attempts: {found.amplification:.3f} for each call\n"
        f"  at the end: {found.in_flight} in flight, {found.waiting} waiting, "
        f"{found.connections} connections\n"
        f"  memory: {half:.1f} MB at half-time, {memory[-1]:.1f} MB at the end\n"
        "attempts per 5 s:"
    )
    print(bars(joined(ledger.between(0, found.seconds), 5.0), start=0, step=5.0), flush=True)


def tell_outage(found: outage.Outage) -> None:
    """Print what became of it."""
    ledger, down, back = found.ledger, found.down_at, found.back_at
    errors = Counter(error for *_, error in found.calls if error)
    during = sum(down <= began < back for began, _, _ in found.calls)
    attempts = sum(ledger.between(down, back))
    print(
        f"outage: all {outage.SERVERS} servers down for {back - down:.0f} s, "
        f"{outage.RATE} calls a second\n"
        f"  {len(found.calls)} calls; errors: {_counted(errors)}\n"
        f"  while all are down: {during} calls, {attempts} attempts, "
        f"{ledger.retries_between(down, back)} of them retries; "
        f"at most {found.most_trials()} a second at one server\n"
        f"  first answer {found.first_success:.2f} s after the first server is back; "
        f"no call fails that begins {max(found.normal_after, 0):.2f} s after it\n"
        "attempts per second:"
    )
    print(bars(joined(ledger.between(0, found.end), 1.0), start=-down, step=1.0))
    print("attempts per 0.1 s, from 1 s before the return of the first server:")
    print(bars(ledger.between(back - 1, back + 2.5), start=-1.0, step=STEP), flush=True)


def tell_overload(found: overload.Overload) -> None:
    """Print what became of it."""
    print(
        f"overload: {overload.OVERLOAD:g} times the capacity for {found.seconds:g} s, "
        f"{overload.SERVERS} servers\n"
        f"  capacity {found.capacity:.1f} answers/s, goodput {found.goodput:.1f}/s: "
        f"{found.goodput / found.capacity:.1%}; {found.circuits_opened} circuits opened"
    )
    for priority, outcomes in found.outcomes.items():
        print(f"  {priority}: p99 {found.p99(priority):.2f} s; {_counted(outcomes)}")
    print("attempts per second:")
    seconds = overload.WARM_UP + found.seconds
    print(bars(joined(found.ledger.between(0, seconds), 1.0), start=0, step=1.0), flush=True)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def main() -> None:
    """Run the scenarios that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    names = ("chaos", "outage", "overload")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(names))
    chosen = parser.parse_args().scenarios or names
    if "chaos" in chosen:
        tell_chaos(asyncio.run(chaos.run(CHAOS, seed=SEED)))
    if "outage" in chosen:
        tell_outage(asyncio.run(outage.run(OUTAGE)))
    if "overload" in chosen:
        tell_overload(asyncio.run(overload.run(OVERLOAD, seed=SEED)))


if __name__ == "__main__":
    main()
