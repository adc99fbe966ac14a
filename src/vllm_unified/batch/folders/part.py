"""A part of the output of a job with folders: some rows, with their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

import msgspec

from vllm_unified.batch.files.formats import Format
from vllm_unified.batch.files.lines import Joined, lines_for
from vllm_unified.batch.files.parquet import parquet_schema, write_parquet
from vllm_unified.batch.jobs.output import blocks


class PartForm(msgspec.Struct, frozen=True, kw_only=True):
    """How all parts of an output are written."""

    format: Format
    keep: Sequence[str] | None
    """Columns of the input; ``None`` for all."""
    inputs: Mapping[str, str]
    """The columns of the input with their types."""
    answers: Mapping[str, str]
    """The columns of answers with their types."""
    schema: Any = None
    """The input's own, where that is Parquet: as an Arrow schema."""

    @property
    def suffix(self) -> str:
        """What the names of parts end with."""
        return "jsonl" if self.format == "openai" else self.format

    def write(self, file: IO[bytes], rows: list[Joined]) -> None:
        """Write a part whole."""
        kept = [*(self.inputs if self.keep is None else self.keep)]
        if self.format == "parquet":
            schema = parquet_schema(self.schema, self.inputs, kept, self.answers)
            as_text = {name for name, kind in self.answers.items() if kind == "json"}
            if self.schema is None:
                as_text |= {name for name in kept if self.inputs[name] == "json"}
            write_parquet(file, rows, schema, frozenset(as_text))
            return
        for block in blocks(rows, lines_for(self.format, [*kept, *self.answers], self.keep), None):
            file.write(block)
