"""Reading rows."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import msgspec

from vllm_unified.batch.files.compression import decompressed
from vllm_unified.batch.files.formats import DELIMITERS, Format, Place
from vllm_unified.batch.files.rows import Row, row_json
from vllm_unified.errors import ConfigurationError

_BUFFER = 1 << 20
_PARQUET_ROWS = 1024
_SAMPLE = 1 << 16
_BOM = b"\xef\xbb\xbf"
# The csv module's own limit of 128 KiB is less than a long prompt.
_CSV_FIELD = 2**31 - 1


class Source:
    """The rows of an input. A file can be read again and again, standard input once.

    Attributes:
        columns: Where the format says them beforehand; ``None`` for JSON lines.
        schema: Parquet's own types, as an Arrow schema.
        count: How many rows there are, where the format says it.
    """

    def __init__(self, place: Place, stdin: IO[bytes] | None = None) -> None:
        """Raises:
        ConfigurationError: the file cannot be opened, or has no usable header.
        """
        self.place = place
        self._stdin = stdin
        self._raw: IO[bytes] | None = None
        self._size = 0
        self.columns: tuple[str, ...] | None = None
        self.schema: Any = None
        self.count: int | None = None
        with self._explained():
            if place.path is not None:
                self._size = place.path.stat().st_size
            self._look()

    @property
    def rereadable(self) -> bool:
        """Whether its rows can be read a second time."""
        return self.place.path is not None and self.place.path.is_file()

    def identity(self) -> str:
        """What tells this input from another one: size, beginning and end. The rows themselves
        are compared when they are read."""
        path = self.place.path
        if path is None or not self.rereadable:
            return "-"
        digest = blake2b(digest_size=8)
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, self._size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
        return f"{self._size:,} bytes, {digest.hexdigest()}"

    @property
    def fraction(self) -> float | None:
        """How much of it has been read, of 1; ``None`` where nobody knows."""
        if self._raw is None or not self._size:
            return None
        try:
            return min(1.0, self._raw.tell() / self._size)
        except ValueError:  # closed: read to its end
            return 1.0

    def rows(self) -> Generator[Row, None, None]:
        """All rows, from the first. It holds the file open until its end, or until it is closed.

        Raises:
            ConfigurationError: the file cannot be read.
        """
        with self._explained():
            if self.place.format == "parquet":
                yield from rows_of(self._path(), "parquet", self.place.name)
                return
            with self._bytes() as data:
                yield from rows_of(data, self.place.format, self.place.name)

    def _look(self) -> None:
        if self.place.format == "parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(self._path()) as file:
                self.schema, self.count = file.schema_arrow, file.metadata.num_rows
                self.columns = tuple(self.schema.names)
        elif self.place.format in DELIMITERS and self.place.path is not None:
            delimiter = DELIMITERS[self.place.format]
            with self._bytes() as data, _csv_reader(data, delimiter) as reader:
                header: list[str] = next(reader, [])
            self.columns = _checked_header(header, self.place.name)

    def _path(self) -> Path:
        assert self.place.path is not None
        return self.place.path

    @contextmanager
    def _bytes(self) -> Iterator[IO[bytes]]:
        if self.place.path is None:
            yield self._stdin or sys.stdin.buffer
            return
        with self.place.path.open("rb", buffering=_BUFFER) as raw:
            self._raw = raw
            yield decompressed(raw, self.place.compression)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = os.strerror(error.errno) if error.errno else str(error)
            raise ConfigurationError(f"cannot read {self.place.name}: {what}") from error
        except Exception as error:
            # pyarrow has errors of its own, all ValueError or OSError of its names.
            if type(error).__module__.startswith("pyarrow"):
                raise ConfigurationError(f"cannot read {self.place.name}: {error}") from error
            raise


def rows_of(data: Any, format: Format, name: str) -> Iterator[Row]:
    """The rows in an open file's bytes; for Parquet, in a file that can be sought, or at a path.

    Raises:
        ConfigurationError: they are not in this format at all.
    """
    if format == "parquet":
        yield from _parquet_rows(data)
    elif format in DELIMITERS:
        with _csv_reader(data, DELIMITERS[format]) as reader:
            yield from _csv_rows(reader)
    else:
        yield from _json_rows(data, name)


_decode = msgspec.json.Decoder(dict[str, Any]).decode


def _json_rows(data: IO[bytes], name: str) -> Iterator[Row]:
    position = 0
    for number, line in enumerate(data, 1):
        raw = line.strip()
        if number == 1:
            raw = raw.removeprefix(_BOM)
            if raw.startswith(b"["):
                raise ConfigurationError(
                    f"{name} is one JSON array, not JSON lines",
                    hint="Write an object on each line: jq -c '.[]' FILE > FILE.jsonl",
                )
        if not raw:
            continue
        try:
            yield Row(position, number, raw, _decode(raw))
        except msgspec.ValidationError:
            yield Row(position, number, raw, None, f"line {number} is JSON, but no object")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            yield Row(position, number, raw, None, f"line {number} is not JSON: {error}")
        position += 1


@contextmanager
def _csv_reader(data: IO[bytes], delimiter: str) -> Iterator[Any]:
    csv.field_size_limit(_CSV_FIELD)
    text = io.TextIOWrapper(data, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield csv.reader(text, delimiter=delimiter)
    finally:
        text.detach()  # the bytes are closed by whoever opened them


def _checked_header(header: list[str], name: str) -> tuple[str, ...]:
    if not header:
        raise ConfigurationError(f"{name} is empty: its first line has to name the columns")
    double = {column for column in header if header.count(column) > 1}
    if double:
        raise ConfigurationError(f"{name} has the column {sorted(double)[0]!r} twice")
    return tuple(header)


def _csv_rows(reader: Any) -> Iterator[Row]:
    header = _checked_header(next(reader, []), "the input")
    position = 0
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"line {reader.line_num} is not CSV: {error}"
            yield Row(position, reader.line_num, b"", None, problem)
            position += 1
            continue
        if values:
            yield _csv_row(position, reader.line_num, header, values)
            position += 1


def _csv_row(position: int, line: int, header: tuple[str, ...], values: list[str]) -> Row:
    if len(values) != len(header):
        problem = f"line {line} has {len(values)} fields, and the header {len(header)}"
        return Row(position, line, msgspec.json.encode(list(map(_shown, values))), None, problem)
    fields = dict(zip(header, values, strict=True))
    try:
        return Row(position, line, msgspec.json.encode(fields), fields)
    except UnicodeEncodeError:
        raw = msgspec.json.encode(list(map(_shown, values)))
        return Row(position, line, raw, None, f"line {line} is not UTF-8")


def _shown(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _parquet_rows(source: Any) -> Iterator[Row]:
    import pyarrow.parquet as pq

    position = 0
    with pq.ParquetFile(source, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, use_threads=False):
            for fields in batch.to_pylist():
                yield Row(position, position + 1, row_json(fields), fields)
                position += 1
