"""A job: what is asked of which rows, and where the answers go."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_unified.batch.columns import DEFAULT_COLUMNS, AnswerColumns
from vllm_unified.batch.files.formats import DELIMITERS, Place, place_of
from vllm_unified.batch.files.source import Source
from vllm_unified.batch.fingerprint import Fingerprint
from vllm_unified.batch.question import Asking
from vllm_unified.errors import ConfigurationError
from vllm_unified.wire.parameters import check_names
from vllm_unified.wire.structure import OutputStructure, output_structure


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a job is told."""

    input: str
    output: str
    asking: Asking = Asking()
    model: str | None = None
    params: Mapping[str, Any] = msgspec.field(default_factory=dict)
    """For all rows; a row's own win."""
    response_model: Any = None
    columns: Sequence[str] | None = None
    keep: Sequence[str] | None = None
    input_format: str | None = None
    output_format: str | None = None
    unordered: bool = False
    retry_failed: bool = False
    overwrite: bool = False
    strict: bool = False
    ledger: str | None = None


class Plan:
    """A job that has been checked, as far as it can be without reading rows.

    Attributes:
        source: The input.
        place: Of the output.
        ledger: The ledger's file; ``None`` for one that ends with the run.
        structure: What each answer has to parse as.
    """

    def __init__(self, job: Job) -> None:
        """Raises:
        ConfigurationError: something in it cannot be; nothing was read, written or sent.
        BadRequestError: a parameter, or the response model, cannot be sent.
        """
        self.job = job
        check_names(job.params)
        self.structure: OutputStructure | None = None
        if job.response_model is not None:
            self.structure = output_structure(job.response_model)
        place = place_of(job.input, job.input_format, "input")
        self.place = _resolved(place_of(job.output, job.output_format, "output"))
        self.ledger = _ledger(job, self.place)
        _check_places(job, place, self.place)
        self.source = Source(place)
        self.stores_rows = self.place.path is None or not self.source.rereadable
        """Whether the ledger has to have the rows themselves."""
        if job.strict and not self.source.rereadable:
            raise ConfigurationError("strict reads the input twice, so it needs a file")

    def settled(self, *, is_openai: bool) -> Settled:
        """The rest, once the first rows have been seen."""
        return Settled(self, is_openai=is_openai)


class Settled:
    """What the first rows settle: the formats and the columns.

    Attributes:
        columns: Of answers; ``None`` where the output's lines are answers as a whole.
    """

    def __init__(self, plan: Plan, *, is_openai: bool) -> None:
        job = plan.job
        self.is_openai = is_openai
        self.place = plan.place
        if is_openai and job.output_format is None and plan.place.format == "jsonl":
            self.place = msgspec.structs.replace(plan.place, format="openai")
        self.columns: AnswerColumns | None = None
        if self.place.format != "openai":
            default = (*DEFAULT_COLUMNS, "parsed") if plan.structure else DEFAULT_COLUMNS
            self.columns = AnswerColumns(job.columns or default)
        elif job.columns is not None or job.keep is not None:
            raise ConfigurationError(
                "columns cannot be chosen for output in OpenAI's batch format",
                hint="output_format='jsonl' (--output-format jsonl) has them.",
            )
        if (
            job.unordered
            and self.place.format in DELIMITERS
            and plan.source.columns is None
            and job.keep is None
        ):
            raise ConfigurationError(
                f"{self.place.format} in order of completion has to know its columns beforehand, "
                f"and {plan.source.place.format} does not say them",
                hint="Say which columns to keep with keep=[...] (--keep).",
            )
        self.fingerprint: Fingerprint = {
            "input": plan.source.identity(),
            "input format": plan.source.place.format,
            "model": job.model,
            "parameters": job.params,
            "prompt": job.asking.prompt,
            "system": job.asking.system,
            "messages": job.asking.messages,
            "chat": job.asking.chat,
            "params_column": job.asking.params_column,
            "response_model": plan.structure.response_format if plan.structure else None,
            "output format": self.place.format,
            "compression": self.place.compression if job.unordered else None,
            "columns": self.columns.names if self.columns else None,
            "keep": job.keep,
            "unordered": job.unordered,
        }


def _resolved(place: Place) -> Place:
    """The file itself where it is a link, so that it is not the link that is replaced."""
    if place.path is None:
        return place
    return msgspec.structs.replace(place, path=Path(os.path.realpath(place.path)))


def _ledger(job: Job, output: Place) -> Path | None:
    if job.ledger is not None:
        return Path(job.ledger)
    if output.path is None:
        return None
    return output.path.with_name(output.path.name + ".ledger")


def _check_places(job: Job, source: Place, output: Place) -> None:
    path = output.path
    if path is not None:
        if not path.parent.is_dir():
            raise ConfigurationError(f"the folder of {job.output} does not exist")
        if path.exists() and not path.is_file():
            raise ConfigurationError(
                f"{job.output} is no regular file", hint="Standard output is '-'."
            )
        if source.path is not None and path.exists() and path.samefile(source.path):
            raise ConfigurationError("input and output are the same file")
    if job.unordered and output.format == "parquet":
        raise ConfigurationError(
            "Parquet is written as a whole, so it cannot be a stream in order of completion",
            hint="Leave out unordered (--unordered), or write JSON lines.",
        )
    if job.unordered and path is None and job.ledger is not None:
        raise ConfigurationError(
            "in order of completion on standard output, nobody knows which rows arrived, so there "
            "is nothing to go on with: leave out the ledger, or write to a file"
        )
    if job.retry_failed and path is None and job.ledger is None:
        raise ConfigurationError("retry_failed goes on with a job, and standard output has no ledger")
