"""What is done of a job with folders: a folder beside the output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from vllm_unified.batch.folders.place import Folder, InputFile
from vllm_unified.batch.folders.survey import Survey
from vllm_unified.batch.jobs.ledger import Counts

INDEX = "index"
"""The column by which rows are known: their positions in the whole input, from 0."""
DONE = "done"
"""Ray's checkpoints: the indices of the rows of each part."""
COUNTS = "counts"
"""What the rows of each part add up to; it counts when the part's checkpoint is there."""
UNANSWERED = "unanswered"
"""The name of the part with the rows that have no answer; written last."""
_FAILED = "failed"
"""Rows without an answer."""
_JOB = "job.json"
_ADDED = ("rows", "failed", "unasked", "cut", "prompt_tokens", "completion_tokens")


def add(total: Counts, more: Counts) -> None:
    """Add rows to others."""
    for name in _ADDED:
        setattr(total, name, getattr(total, name) + getattr(more, name))


class FailedRow(msgspec.Struct, frozen=True, array_like=True):
    """A row without an answer."""

    index: int
    unasked: bool
    row: bytes
    """Pickled."""
    answer: bytes


class Noted(msgspec.Struct, kw_only=True):
    """What a job is, and how far it came."""

    fingerprint: dict[str, Any]
    files: list[InputFile]
    surveys: list[Survey]
    finished: bool = False


class FolderLedger:
    """The ledger of one output.

    Attributes:
        folder: Where it is.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def job(self) -> Noted | None:
        """The job; ``None`` where none was begun."""
        data = self.folder.read(_JOB)
        return None if data is None else msgspec.json.decode(data, type=Noted)

    def note(self, job: Noted) -> None:
        """Note the job."""
        self.folder.write(msgspec.json.encode(job), _JOB)

    def counts(self) -> Counts:
        """What the rows of all parts add up to."""
        total = Counts()
        done = {name.removesuffix(".parquet") for name in self.folder.names(DONE)}
        for name in self.folder.names(COUNTS):
            data = self.folder.read(COUNTS, name)
            if data is not None and name.removesuffix(".json") in done:
                add(total, msgspec.json.decode(data, type=Counts))
        return total

    def note_failed(self, rows: list[FailedRow], name: str) -> None:
        """Note rows without an answer."""
        self.folder.write(msgspec.msgpack.encode(rows), _FAILED, f"{name}.msgpack")

    def failed(self) -> dict[int, FailedRow]:
        """The rows without an answer, by their index; also some that have got one since, because
        the actor that noted them was lost."""
        found: dict[int, FailedRow] = {}
        for name in self.folder.names(_FAILED):
            data = self.folder.read(_FAILED, name)
            if data is not None and name.endswith(".msgpack"):
                rows = msgspec.msgpack.decode(data, type=list[FailedRow])
                found.update((row.index, row) for row in rows)
        return found

    def answered(self, indices: Iterable[int]) -> set[int]:
        """Which of these rows are in a part."""
        import pyarrow as pa
        import pyarrow.dataset

        wanted = pa.array(sorted(indices), pa.int64())
        if not len(wanted) or not self.folder.names(DONE):
            return set()
        done = pyarrow.dataset.dataset(
            self.folder.at(DONE), filesystem=self.folder.files, format="parquet"
        )
        found = done.to_table(columns=[INDEX], filter=pyarrow.dataset.field(INDEX).isin(wanted))
        return set(found[INDEX].to_pylist())

    def forget_failed(self) -> None:
        """Drop the rows without an answer, so that they are asked again."""
        self.folder.delete(_FAILED)

    def reset(self) -> None:
        """Drop all of it."""
        self.folder.delete()
