"""How answers get into the output: as a whole at the end, or as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import IO, Protocol

import msgspec

from vllm_unified.batch.files.formats import DELIMITERS
from vllm_unified.batch.files.lines import Joined, Lines, lines_for
from vllm_unified.batch.files.parquet import parquet_schema, write_parquet
from vllm_unified.batch.files.rows import Row
from vllm_unified.batch.files.shape import Shape
from vllm_unified.batch.jobs.ledger import Counts, Entry, Ledger, Outcome
from vllm_unified.batch.jobs.output import (
    GrowingFile,
    blocks,
    joined_again,
    joined_stored,
    write_whole,
)
from vllm_unified.batch.jobs.plan import Plan, Settled

Done = Sequence[tuple[Row, Entry]]
"""Rows, and what became of each."""


class Delivery(Protocol):
    """Takes rows that are done. All of it runs in one thread."""

    def open(self) -> None:
        """Be ready for rows; those of earlier runs are in the ledger."""

    def record(self, done: Done, counts: Counts) -> None:
        """Take rows in, for good, with what all rows add up to.

        Raises:
            BatchFileError: ledger or output cannot be written.
        """

    def finish(self, shape: Shape) -> None:
        """All rows are done: complete the output. ``shape`` is that of the input."""

    def discard(self) -> None:
        """Leave nothing of an output that has no rows."""

    def close(self) -> None:
        """Let go of the output."""


def delivery_for(
    plan: Plan, settled: Settled, ledger: Ledger, stdout: IO[bytes] | None
) -> Delivery:
    """What fits this output. ``stdout`` is taken in place of the standard stream."""
    job, place = plan.job, settled.place
    out = stdout or sys.stdout.buffer
    if job.unordered:
        columns = [*(job.keep or plan.source.columns or ()), *_answer_columns(settled)]
        lines = lines_for(place.format, columns, job.keep)
        target: GrowingFile | StreamOfLines
        if place.path is None:
            target = StreamOfLines(out, lines)
        else:
            target = GrowingFile(place.path, lines, place.compression)
        return AsTheyCome(ledger, target)
    if place.path is None and place.format not in DELIMITERS:
        return InTurn(ledger, StreamOfLines(out, lines_for(place.format, (), job.keep)))
    return AtTheEnd(plan, settled, ledger, out)


class StreamOfLines:
    """Lines on standard output, which cannot be taken back."""

    size = 0

    def __init__(self, stream: IO[bytes], lines: Lines) -> None:
        self._stream = stream
        self._lines = lines

    def open(self, size: int | None) -> None:
        """Begin it."""
        self._stream.write(self._lines.head())
        self._stream.flush()

    def add(self, joined: Iterable[Joined]) -> None:
        """Add lines."""
        self._stream.write(b"".join(map(self._lines.line, joined)))
        self._stream.flush()

    def remove(self) -> None:
        """Nothing: it is not a file."""

    def close(self) -> None:
        """Nothing: it is not ours."""


class AtTheEnd:
    """The output is written from the ledger when all rows are done, in the order of the input."""

    def __init__(self, plan: Plan, settled: Settled, ledger: Ledger, stdout: IO[bytes]) -> None:
        self._plan = plan
        self._settled = settled
        self._place = settled.place
        self._ledger = ledger
        self._stdout = stdout

    def open(self) -> None:
        """Nothing is to be done before the end."""

    def record(self, done: Done, counts: Counts) -> None:
        """Into the ledger."""
        keep = self._plan.stores_rows
        self._ledger.record([_stored(*each, keep=keep) for each in done], counts)

    def finish(self, shape: Shape) -> None:
        """Write the output: all of it, or nothing."""
        entries = self._ledger.entries()
        if self._plan.stores_rows:
            self._deliver(joined_stored(entries), shape)
        else:
            with closing(self._plan.source.rows()) as rows:
                self._deliver(joined_again(rows, entries), shape)

    def _deliver(self, joined: Iterator[Joined], shape: Shape) -> None:
        if self._place.path is None:
            self._write(self._stdout, joined, shape)
            self._stdout.flush()
        else:
            write_whole(self._place.path, lambda file: self._write(file, joined, shape))

    def _write(self, file: IO[bytes], joined: Iterator[Joined], shape: Shape) -> None:
        job, source = self._plan.job, self._plan.source
        kept = [*(shape.types if job.keep is None else job.keep)]
        types = self._settled.columns.types if self._settled.columns else {}
        if self._place.format == "parquet":
            schema = parquet_schema(source.schema, shape.types, kept, types)
            as_text = {name for name, kind in types.items() if kind == "json"}
            if source.schema is None:
                as_text |= {name for name in kept if shape.types[name] == "json"}
            write_parquet(file, joined, schema, frozenset(as_text))
            return
        lines = lines_for(self._place.format, [*kept, *types], job.keep)
        for block in blocks(joined, lines, self._place.compression):
            file.write(block)

    def discard(self) -> None:
        """There is nothing."""

    def close(self) -> None:
        """There is nothing to let go of."""


class InTurn:
    """Each row goes out when all before it have gone, through the ledger."""

    def __init__(self, ledger: Ledger, stream: StreamOfLines) -> None:
        self._ledger = ledger
        self._stream = stream
        self._next = 0

    def open(self) -> None:
        """What is done already goes out first."""
        self._stream.open(None)
        self._emit()

    def record(self, done: Done, counts: Counts) -> None:
        """Into the ledger, and out as far as there is no gap."""
        self._ledger.record([_stored(*each, keep=True) for each in done], counts)
        self._emit()

    def _emit(self) -> None:
        gathered: list[Entry] = []
        for entry in self._ledger.entries(self._next):
            if entry.position != self._next:
                break
            self._next += 1
            gathered.append(entry)
            if len(gathered) == _EMITTED:
                self._stream.add(joined_stored(gathered))
                gathered = []
        self._stream.add(joined_stored(gathered))

    def finish(self, shape: Shape) -> None:
        """All has gone out."""
        assert self._next == self._ledger.counts.rows

    def discard(self) -> None:
        """There is nothing."""

    def close(self) -> None:
        """There is nothing to let go of."""


_EMITTED = 1000


class AsTheyCome:
    """Answers go out in order of completion; rows without one at the end, so that they can be asked
    again. The ledger has the rows' keys, and how much of the output is certain."""

    def __init__(self, ledger: Ledger, target: GrowingFile | StreamOfLines) -> None:
        self._ledger = ledger
        self._target = target

    def open(self) -> None:
        """What is behind the last certain row is cut off."""
        self._target.open(self._ledger.read("written", int))
        self._ledger.note(written=self._target.size)

    def record(self, done: Done, counts: Counts) -> None:
        """Out, and then into the ledger."""
        entries = []
        out = []
        for row, entry in done:
            if entry.outcome is Outcome.ANSWERED:
                out.append(Joined(row, entry.answer or b"{}"))
                entries.append(msgspec.structs.replace(entry, answer=None))
            else:
                entries.append(_stored(row, entry, keep=True))
        self._target.add(out)
        self._ledger.record(entries, counts, written=self._target.size)

    def finish(self, shape: Shape) -> None:
        """The rows without an answer."""
        self._target.add(joined_stored(self._ledger.entries(failed_only=True)))

    def discard(self) -> None:
        """Leave no empty file."""
        self._target.remove()

    def close(self) -> None:
        """Let go of the output."""
        self._target.close()


def _stored(row: Row, entry: Entry, *, keep: bool) -> Entry:
    if not keep or row.fields is None:
        return entry
    return msgspec.structs.replace(entry, row=row.raw)


def _answer_columns(settled: Settled) -> Sequence[str]:
    return [*settled.columns.types] if settled.columns else []
