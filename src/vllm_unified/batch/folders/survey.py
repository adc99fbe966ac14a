"""What is in the files of a folder: how many rows, and which columns."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import Any

import msgspec

from vllm_unified.batch.files.formats import Format
from vllm_unified.batch.files.rows import Row
from vllm_unified.batch.files.shape import Shape, common_kind
from vllm_unified.batch.files.source import rows_of
from vllm_unified.batch.folders.place import Folder, InputFile
from vllm_unified.errors import ConfigurationError


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a file, or in several."""

    rows: int
    types: dict[str, str]
    """Of the columns, as :class:`Shape` has them."""
    first: bytes | None
    """The first row that can be read, as a JSON object."""
    problem: str | None
    """Why the first row that cannot be read cannot be."""


def survey_file(folder: Folder, file: InputFile, format: Format) -> Survey:
    """Read a file to its end.

    Raises:
        ConfigurationError: it cannot be read.
    """
    rows, shape = 0, Shape()
    first: bytes | None = None
    problem: str | None = None
    try:
        with closing(_rows(folder, file, format)) as found:
            for row in found:
                rows += 1
                if row.fields is None:
                    problem = problem or row.problem
                    continue
                first = first or row.raw
                shape.see(row.fields)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {file.name}: {error}") from error
    return Survey(rows=rows, types=shape.types, first=first, problem=problem)


def together(surveys: Iterable[Survey]) -> Survey:
    """What is in all of them."""
    rows = 0
    types: dict[str, str] = {}
    first: bytes | None = None
    problem: str | None = None
    for each in surveys:
        rows += each.rows
        first, problem = first or each.first, problem or each.problem
        for name, kind in each.types.items():
            types[name] = common_kind(types.get(name, ""), kind)
    return Survey(rows=rows, types=types, first=first, problem=problem)


def schema_of(folder: Folder, file: InputFile) -> Any:
    """The Arrow schema of a Parquet file."""
    import pyarrow.parquet as pq

    with folder.files.open_input_file(folder.at(file.name)) as data:
        return pq.read_schema(data)


def _rows(folder: Folder, file: InputFile, format: Format) -> Generator[Row, None, None]:
    at = folder.at(file.name)
    if format == "parquet":
        with folder.files.open_input_file(at) as data:
            yield from rows_of(data, format, file.name)
    else:
        with folder.files.open_input_stream(at) as data:
            yield from rows_of(io.BufferedReader(data), format, file.name)
