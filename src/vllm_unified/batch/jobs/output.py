"""Where rows and their answers go: a file that appears whole, or a stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import IO

import msgspec

from vllm_unified.batch.files.compression import Compression, compressed
from vllm_unified.batch.files.lines import Joined, Lines
from vllm_unified.batch.files.rows import Row
from vllm_unified.batch.jobs.ledger import Entry, Outcome, file_error
from vllm_unified.errors import ConfigurationError

_BLOCK = 1 << 20
_decode = msgspec.json.Decoder(dict[str, object]).decode


def joined_again(rows: Iterable[Row], entries: Iterable[Entry]) -> Iterator[Joined]:
    """The rows of an input that is read again, with their answers.

    Raises:
        ConfigurationError: they are not the rows that were answered.
    """
    for row, entry in zip_longest(rows, entries):
        if row is None or entry is None or row_digest(row) != entry.digest:
            raise changed_input(row)
        yield Joined(None if entry.outcome is Outcome.COLLIDING else row, _answer(entry))


def joined_stored(entries: Iterable[Entry]) -> Iterator[Joined]:
    """The rows that the ledger holds itself, with their answers."""
    for entry in entries:
        row = None
        if entry.outcome is not Outcome.COLLIDING and entry.row is not None:
            row = Row(entry.position, 0, entry.row, _decode(entry.row))
        yield Joined(row, _answer(entry))


def _answer(entry: Entry) -> bytes:
    assert entry.answer is not None
    return entry.answer


def row_digest(row: Row) -> bytes:
    """What tells the row's content from others."""
    from hashlib import blake2b

    return blake2b(row.raw, digest_size=8).digest()


def changed_input(row: Row | None) -> ConfigurationError:
    """The error for an input that is not what it was."""
    where = f"line {row.line}" if row is not None else "its end"
    return ConfigurationError(
        f"the input has changed since rows of it were answered: {where} is not what it was",
        hint="Give back the old input, or begin anew with overwrite=True (--overwrite).",
    )


def blocks(
    joined: Iterable[Joined], lines: Lines, compression: Compression | None
) -> Iterator[bytes]:
    """The bytes of an output, some at a time; each block is a compressed whole."""
    gathered, size = [lines.head()], 0
    for each in joined:
        line = lines.line(each)
        gathered.append(line)
        size += len(line)
        if size >= _BLOCK:
            yield compressed(b"".join(gathered), compression)
            gathered, size = [], 0
    if gathered:
        yield compressed(b"".join(gathered), compression)


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that is there whole, or not at all.

    Raises:
        BatchFileError: the disk does not take it; nothing is left of it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise file_error(partial, error) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class GrowingFile:
    """A file to which lines are added, block by block, each on the disk when it is added.

    Attributes:
        size: Its length, in bytes.
    """

    def __init__(self, path: Path, lines: Lines, compression: Compression | None) -> None:
        self._path = path
        self._lines = lines
        self._compression = compression
        self._file: IO[bytes] | None = None
        self.size = 0

    def open(self, size: int | None) -> None:
        """Cut it to this length, or begin it.

        Raises:
            BatchFileError: it cannot be written.
            ConfigurationError: it is not there, or shorter than that.
        """
        try:
            self._file = self._path.open("wb" if size is None else "r+b", buffering=0)
            if size is None:
                if head := self._lines.head():
                    self._write(compressed(head, self._compression))
            elif self._file.seek(0, os.SEEK_END) < size:
                raise self._lost()
            else:
                self._file.truncate(size)
                self._file.seek(size)
                self.size = size
        except FileNotFoundError:
            raise self._lost() from None
        except OSError as error:
            raise file_error(self._path, error) from error

    def add(self, joined: Iterable[Joined]) -> None:
        """Add lines.

        Raises:
            BatchFileError: the disk does not take them; the file may have a part of them.
        """
        data = b"".join(map(self._lines.line, joined))
        if data:
            self._write(compressed(data, self._compression))

    def _lost(self) -> ConfigurationError:
        return ConfigurationError(
            f"{self._path} has not all the rows that its ledger says it has",
            hint="Give it back, or begin anew with overwrite=True (--overwrite).",
        )

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise file_error(self._path, error) from error
        self.size += len(data)

    def remove(self) -> None:
        """Close it, and delete it."""
        self.close()
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close it. May be called twice."""
        if self._file is not None:
            self._file.close()
