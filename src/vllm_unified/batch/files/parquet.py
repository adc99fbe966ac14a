"""Rows and their answers as a Parquet file. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import IO, Any

import msgspec

from vllm_unified.batch.files.lines import Joined, joined_fields
from vllm_unified.batch.files.rows import encode_foreign

_ROWS_IN_GROUP = 10_000


def parquet_schema(
    schema: Any, types: Mapping[str, str], keep: Sequence[str], answers: Mapping[str, str]
) -> Any:
    """The output's columns with their types.

    Args:
        schema: The input's own, if that is Parquet: its types stay as they are.
        types: Of the input's columns otherwise, as :class:`Shape` has them.
        keep: Columns of the input that the output has.
        answers: Types of the columns of answers.
    """
    import pyarrow as pa

    kinds = {
        "text": pa.string(),
        "": pa.string(),
        "json": pa.string(),
        "switch": pa.bool_(),
        "integer": pa.int64(),
        "number": pa.float64(),
        "vector": pa.list_(pa.float32()),
        "tokens": pa.struct({name: pa.int64() for name in ("prompt_tokens", "completion_tokens")}),
    }
    fields = [
        schema.field(name) if schema is not None else pa.field(name, kinds[types[name]])
        for name in keep
    ]
    return pa.schema(fields + [pa.field(name, kinds[kind]) for name, kind in answers.items()])


def write_parquet(
    file: IO[bytes], rows: Iterable[Joined], schema: Any, as_text: frozenset[str]
) -> int:
    """Write rows, group by group; how many.

    Args:
        as_text: Columns that hold JSON as text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    written = 0
    remaining = iter(rows)
    names = frozenset(schema.names)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while group := list(islice(remaining, _ROWS_IN_GROUP)):
            table = [_record(joined, names, as_text) for joined in group]
            writer.write_table(pa.Table.from_pylist(table, schema=schema))
            written += len(group)
    return written


def _record(joined: Joined, names: frozenset[str], as_text: frozenset[str]) -> dict[str, Any]:
    fields = joined_fields(joined)
    return {
        name: _json(value) if name in as_text and value is not None else value
        for name, value in fields.items()
        if name in names
    }


def _json(value: Any) -> str:
    return msgspec.json.encode(value, enc_hook=encode_foreign).decode()
