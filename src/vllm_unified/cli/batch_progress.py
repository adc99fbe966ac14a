"""How a batch of a file shows how far it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from vllm_unified.batch.jobs.summary import BatchProgress, BatchSummary
from vllm_unified.cli.terminal import err

_LINE_SECONDS = 10.0


class Display:
    """A bar on a terminal, and a line now and then elsewhere; all on standard error."""

    def __init__(self) -> None:
        self.last: BatchProgress | None = None
        """What was shown last."""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._next_line = time.monotonic() + _LINE_SECONDS
        self._in_trouble = False
        if err.is_terminal and not err.is_dumb_terminal:
            self._bar = Progress(
                BarColumn(),
                TextColumn("{task.description}", markup=False),
                console=err,
                transient=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("", total=None)
            self._bar.start()

    def __call__(self, progress: BatchProgress) -> None:
        """Show it."""
        self.last = progress
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=progress.rows,
                total=progress.total,
                description=progress_line(progress),
            )
            return
        now = time.monotonic()
        begins = progress.trouble is not None and not self._in_trouble
        if begins or now >= self._next_line:
            self._in_trouble = progress.trouble is not None
            self._next_line = now + _LINE_SECONDS
            err.print(progress_line(progress), markup=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def display() -> Iterator[Display]:
    """A display for as long as the block runs."""
    shown = Display()
    try:
        yield shown
    finally:
        shown.close()


def progress_line(progress: BatchProgress) -> str:
    """One line: rows, rate, tokens per second, errors, time left, and what is wrong."""
    parts = [
        rows_of(progress),
        f"{_rate(progress.rows_per_second)} rows/s",
        f"{_rate(progress.tokens_per_second)} tokens/s",
    ]
    if progress.failed:
        parts.append(f"{progress.failed:,} without an answer")
    if progress.trouble is not None:
        parts.append(f"waiting: {progress.trouble.message}")
    elif progress.remaining is not None:
        parts.append(f"{timedelta(seconds=int(progress.remaining))} left")
    return ", ".join(parts)


def rows_of(progress: BatchProgress | None) -> str:
    """Rows that are done, of how many."""
    if progress is None:
        return "0 rows"
    if progress.total is None:
        return f"{progress.rows:,} rows"
    about = "" if progress.total_is_exact else "about "
    return f"{progress.rows:,} of {about}{progress.total:,} rows"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def summary_lines(summary: BatchSummary) -> list[str]:
    """What a job came to, and what could be done about it."""
    new = summary.rows - summary.resumed
    done = f"{summary.output}: {summary.rows:,} rows"
    if not new:
        lines = [f"{done}, all done before: nothing was to be done"]
    elif summary.resumed:
        lines = [f"{done}, {new:,} of them now, in {summary.seconds:,.1f} s"]
    else:
        lines = [f"{done} in {summary.seconds:,.1f} s"]
    lines[0] += f"; {summary.completion_tokens:,} tokens"
    if summary.failed:
        unasked = f", {summary.unasked:,} of them not sent" if summary.unasked else ""
        again = "; --retry-failed asks them again" if summary.ledger else ""
        lines.append(f"{summary.failed:,} rows have no answer{unasked}: the column error{again}")
    if summary.cut:
        lines.append(f"{summary.cut:,} answers were cut off by their token limit: --max-tokens")
    return lines
