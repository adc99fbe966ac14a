"""The table and the picture of a run.

    python -m benchmarks.peers.report FOLDER

The folder has performance.json; it gets performance.png, and the table goes to standard output.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.clients import KINDS

COLUMNS = (
    ("chat-1", "cpu", "1", 1e6, "us"),
    ("chat-32", "cpu", "32", 1e6, "us"),
    ("chat-256", "cpu", "256", 1e6, "us"),
    ("chat-2048", "cpu", "2,048", 1e6, "us"),
    ("chat-256", "rate", "req/s at 256", 1, ""),
    ("stream-1", "cpu", "1 stream", 1e6, "us"),
    ("stream-64", "cpu", "64", 1e6, "us"),
    ("stream-1024", "cpu", "1,024", 1e6, "us"),
    ("stream-64", "rate", "chunks/s at 64", 1, ""),
    ("memory", "memory", "kB a stream", 1e-3, ""),
    ("long-prompt", "cpu", "long prompt", 1e6, "us"),
    ("long-answer", "cpu", "long answer", 1e6, "us"),
    ("chat-1", "p50", "p50", 1e6, "us"),
    ("chat-1", "p99", "p99", 1e6, "us"),
    ("batch", "rate", "prompts/s", 1, ""),
    ("batch", "cpu", "CPU of a prompt", 1e6, "us"),
    ("batch-packed", "rate", "prompts/s, packed", 1, ""),
    ("batch-packed", "cpu", "CPU of one in a pack", 1e6, "us"),
)
TABLES = {
    "CPU time of a chat, in microseconds, by requests in flight": (0, 1, 2, 3, 4),
    "CPU time of a chunk of a stream, in microseconds, by streams at once": (5, 6, 7, 8, 9),
    "Long texts (CPU time of a request) and latency at 1 in flight, in microseconds": (
        10,
        11,
        12,
        13,
    ),
    "A batch of 100,000 short prompts; CPU time in microseconds": (14, 15, 16, 17),
}


def values(figures: Any, name: str, scenario: str, figure: str) -> list[float]:
    """All rounds' values; none where the client has no such figure."""
    found: list[float] = figures.get(name, {}).get(scenario, {}).get(figure, [])
    return found


def cell(found: list[float], scale: float) -> str:
    """Median, lowest and highest."""
    if not found:
        return ""
    low, middle, high = min(found) * scale, statistics.median(found) * scale, max(found) * scale
    digits = 1 if middle < 100 else 0
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def aliases(name: str, scenario: str) -> str:
    """The blocking client's scenario for a column, which has threads for tasks."""
    threads = KINDS[name].threads
    return scenario if threads != 32 else scenario.replace("stream-64", "stream-32")


def tables(figures: Any) -> str:
    """All tables, in Markdown."""
    lines = []
    for title, columns in TABLES.items():
        heads = [COLUMNS[number] for number in columns]
        lines += [f"**{title}**", "", "| client | " + " | ".join(head[2] for head in heads) + " |"]
        lines.append("|---|" + "---:|" * len(heads))
        for name, kind in KINDS.items():
            cells = [
                cell(values(figures, name, aliases(name, scenario), figure), scale)
                for scenario, figure, _, scale, _ in heads
            ]
            if any(cells):
                lines.append(f"| {kind.title} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(result: Any, path: Path) -> None:
    """Bars of the CPU time, with the spread."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = (
        ("chat-256", "CPU time of a chat, 256 in flight"),
        ("stream-64", "CPU time of a chunk, 64 streams"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 4.5), sharey=True)
    for axis, (scenario, title) in zip(axes, panels, strict=True):
        shown = [
            (KINDS[name].title, found)
            for name in reversed(KINDS)
            if (found := values(result["figures"], name, scenario, "cpu"))
        ]
        middles = [statistics.median(found) * 1e6 for _, found in shown]
        spread = [
            [m - min(f) * 1e6 for m, (_, f) in zip(middles, shown, strict=True)],
            [max(f) * 1e6 - m for m, (_, f) in zip(middles, shown, strict=True)],
        ]
        colors = ["#2a6fbb" if "unified" in title else "#b0b0b0" for title, _ in shown]
        axis.barh([title for title, _ in shown], middles, xerr=spread, color=colors, capsize=2)
        for title_, middle in zip([title for title, _ in shown], middles, strict=True):
            axis.text(middle * 1.15, title_, f"{middle:,.1f}", va="center", fontsize=8)
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("microseconds (logarithmic)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the tables, draw the picture."""
    folder = Path(sys.argv[1])
    result = json.loads((folder / "performance.json").read_text())
    print(tables(result["figures"]))
    draw(result, folder / "performance.png")


if __name__ == "__main__":
    main()
