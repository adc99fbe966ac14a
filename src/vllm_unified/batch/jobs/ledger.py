"""The ledger of a job: which rows are done, and their answers, whatever dies."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec

from vllm_unified.errors import BatchFileError, ConfigurationError

_VERSION = 1
_APPLICATION = 0x764C4C4D
"""SQLite's ``application_id``: "vLLM"."""
_PAGE = 2000
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (
    position INTEGER PRIMARY KEY,
    digest BLOB NOT NULL,
    outcome INTEGER NOT NULL,
    answer BLOB,
    row BLOB
);
CREATE INDEX IF NOT EXISTS failed ON rows (position) WHERE outcome > 0;
"""


class Outcome(IntEnum):
    """What became of a row."""

    ANSWERED = 0
    FAILED = 1
    """It was asked, and has no answer, or none that holds."""
    UNASKED = 2
    """It cannot be read, or has not what the question takes."""
    COLLIDING = 3
    """It was not asked, because it has a column with the name of one of the answers'."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A row that is done."""

    position: int
    digest: bytes
    """Of the row's bytes: with the position, its key."""
    outcome: Outcome
    answer: bytes | None
    """The columns of the answer as a JSON object, or the whole line of OpenAI's format."""
    row: bytes | None = None
    """The row as a JSON object, where the input cannot be read again."""


class Counts(msgspec.Struct, kw_only=True):
    """What the rows that are done add up to."""

    rows: int = 0
    failed: int = 0
    """Among them, without an answer."""
    unasked: int = 0
    """Among those, not sent."""
    cut: int = 0
    """Answers that ended at their token limit."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str | None = None
    """That answered, where the job names none."""


class Ledger:
    """An SQLite file beside the output, held by one job at a time.

    Every transaction is on the disk when it ends, so neither ``kill -9`` nor a loss of power takes
    a row out of it. Not for several threads at once.
    """

    def __init__(self, path: Path) -> None:
        """Open it, or make it, and take hold of it.

        Raises:
            ConfigurationError: another job holds it, or the file is something else.
            BatchFileError: the disk does not take it.
        """
        self.path = path
        self.counts = Counts()
        with self._explained():
            self._file = sqlite3.connect(
                path, timeout=0, isolation_level=None, check_same_thread=False
            )
            try:
                self._take_hold()
            except BaseException:
                self._file.close()
                raise
        self.counts = self.read("counts", Counts) or Counts()

    def _take_hold(self) -> None:
        run = self._file.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        (application,) = run("PRAGMA application_id").fetchone()
        (version,) = run("PRAGMA user_version").fetchone()
        is_new = not run("SELECT 1 FROM sqlite_master").fetchone()
        if not is_new and (application != _APPLICATION or version != _VERSION):
            raise ConfigurationError(
                f"{self.path} is not a ledger of this version",
                hint="It is in the place of the job's ledger: move it away.",
            )
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("BEGIN EXCLUSIVE")  # from here on the lock is held until the end of the process
        run(f"PRAGMA application_id = {_APPLICATION}")
        run(f"PRAGMA user_version = {_VERSION}")
        run("COMMIT")
        self._file.executescript(_TABLES)

    def read(self, key: str, type: Any = Any) -> Any:
        """What was noted under this key; ``None`` if nothing was."""
        with self._explained():
            found = self._file.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if found is None else msgspec.json.decode(found[0], type=type)

    def note(self, **values: Any) -> None:
        """Remember these by their keys."""
        with self._transaction():
            self._note(values)

    def _note(self, values: dict[str, Any]) -> None:
        self._file.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)",
            [(key, msgspec.json.encode(value)) for key, value in values.items()],
        )

    def record(self, entries: Sequence[Entry], counts: Counts, **values: Any) -> None:
        """Take rows in, with what all of them add up to: all, or in a failure none."""
        with self._transaction():
            self._file.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?, ?)",
                [
                    (each.position, each.digest, each.outcome, each.answer, each.row)
                    for each in entries
                ],
            )
            self._note({"counts": counts, **values})
        self.counts = counts

    def done(self, start: int, end: int) -> dict[int, bytes]:
        """The digests of the rows that are done, from ``start`` to before ``end``."""
        with self._explained():
            found = self._file.execute(
                "SELECT position, digest FROM rows WHERE position >= ? AND position < ?",
                (start, end),
            )
            return dict(found.fetchall())

    def last(self) -> int:
        """The highest position that is done; -1 if none is."""
        with self._explained():
            (found,) = self._file.execute("SELECT MAX(position) FROM rows").fetchone()
        return -1 if found is None else int(found)

    def entries(self, start: int = 0, *, failed_only: bool = False) -> Iterator[Entry]:
        """What is done, in order, from this position on."""
        condition = "AND outcome > 0" if failed_only else ""
        query = (
            f"SELECT * FROM rows WHERE position >= ? {condition} ORDER BY position LIMIT {_PAGE}"
        )
        while True:
            with self._explained():
                page = self._file.execute(query, (start,)).fetchall()
            for position, digest, outcome, answer, row in page:
                yield Entry(position, digest, Outcome(outcome), answer, row)
            if len(page) < _PAGE:
                return
            start = page[-1][0] + 1

    def forget_failed(self) -> None:
        """Have the rows without an answer asked again."""
        counts = msgspec.structs.replace(
            self.counts, rows=self.counts.rows - self.counts.failed, failed=0, unasked=0
        )
        with self._transaction():
            self._file.execute("DELETE FROM rows WHERE outcome > 0")
            self._file.execute("DELETE FROM meta WHERE key = 'finished'")
            self._note({"counts": counts})
        self.counts = counts

    def reset(self) -> None:
        """Forget everything."""
        self.shrink()
        with self._explained():
            self._file.execute("DELETE FROM meta")
        self.counts = Counts()

    def shrink(self) -> None:
        """Keep what was noted, and not the rows: they are in the output."""
        with self._explained():
            self._file.execute("DROP TABLE rows")
            self._file.execute("VACUUM")
            self._file.executescript(_TABLES)

    def close(self) -> None:
        """Let go of it. May be called twice."""
        self._file.close()

    def remove(self) -> None:
        """Close it, and delete the file."""
        self.close()
        for suffix in ("", "-wal", "-shm", "-journal"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained():
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._file.execute("COMMIT")
            except BaseException:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> ConfigurationError | BatchFileError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return ConfigurationError(
                f"another job is at work on this output: it holds {self.path}",
                hint="Let it end, or give this job an output of its own.",
            )
        if code == sqlite3.SQLITE_NOTADB:
            return ConfigurationError(
                f"{self.path} is no ledger",
                hint="It is in the place of the job's ledger: move it away.",
            )
        return file_error(self.path, error, is_full=code == sqlite3.SQLITE_FULL)


def file_error(path: Path, error: Exception, *, is_full: bool = False) -> BatchFileError:
    """The error that says which file cannot be written, and why."""
    number = getattr(error, "errno", None)
    if is_full or number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason = "the disk is full" if number != errno.EFBIG else "the file may not grow"
        return BatchFileError(
            f"{reason}: {path} cannot be written",
            hint=f"Make room on the disk of {path.absolute().parent}.",
        )
    reason = os.strerror(number) if number else str(error)
    return BatchFileError(
        f"{path} cannot be written: {reason}",
        hint=f"Is the disk of {path.absolute().parent} full or read-only, or is the size of files "
        "limited?",
    )
