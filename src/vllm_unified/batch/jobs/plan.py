"""A job: what is asked of which rows, and where the answers go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec

from vllm_unified.batch.files.formats import Place, place_of
from vllm_unified.batch.files.openai_lines import is_openai_line, openai_answer
from vllm_unified.batch.files.rows import Row
from vllm_unified.batch.files.source import Source
from vllm_unified.batch.jobs.columns import DEFAULT_COLUMNS, AnswerColumns, Result
from vllm_unified.batch.jobs.fingerprint import Fingerprint
from vllm_unified.batch.jobs.ledger import Outcome
from vllm_unified.batch.jobs.question import Ask, Asking, Item, ask_for
from vllm_unified.batch.jobs.template import check_columns
from vllm_unified.errors import BadRequestError, ConfigurationError, VllmError
from vllm_unified.settings import CALL_SETTINGS
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
        params: For all rows, the model among them.
    """

    def __init__(self, job: Job, stdin: IO[bytes] | None = None) -> None:
        """Raises:
        ConfigurationError: something in it cannot be; nothing was read, written or sent.
        BadRequestError: a parameter, or the response model, cannot be sent.
        """
        self.job = job
        if job.retry_failed and job.overwrite:
            raise ConfigurationError("retry_failed goes on with a job, and overwrite drops it")
        self.params, self.structure = shared_params(job)
        place = place_of(job.input, job.input_format, "input")
        self.place = _resolved(place_of(job.output, job.output_format, "output"))
        self.ledger = _ledger(job, self.place)
        _check_places(job, place, self.place)
        self.source = Source(place, stdin)
        self.stores_rows = self.place.path is None or not self.source.rereadable
        """Whether the ledger has to have the rows themselves."""
        if job.strict and not self.source.rereadable:
            raise ConfigurationError("strict reads the input twice, so it needs a file")

    def settled(self, first: Sequence[Row]) -> Settled:
        """The rest, once the first rows have been seen.

        Raises:
            ConfigurationError: they have not what the job takes.
        """
        return Settled(self, first)


class PlannedSource(Protocol):
    """What is known of an input before its rows are read."""

    place: Place
    columns: tuple[str, ...] | None

    @property
    def rereadable(self) -> bool:
        """Whether its rows can be read a second time."""

    def identity(self) -> str:
        """What tells this input from another one."""


class Planned(Protocol):
    """A job that has been checked; of files, or of folders."""

    job: Job
    place: Place
    params: dict[str, Any]
    structure: OutputStructure | None

    @property
    def source(self) -> PlannedSource:
        """The input."""


def shared_params(job: Job) -> tuple[dict[str, Any], OutputStructure | None]:
    """The parameters for all rows, and what each answer has to parse as.

    Raises:
        ConfigurationError: they contradict each other.
        BadRequestError: the response model cannot be sent.
    """
    params, structure = {**job.params}, None
    if job.model is not None:
        params["model"] = job.model
    if job.response_model is not None:
        if params.get("response_format") is not None:
            raise ConfigurationError("give response_model or response_format, not both")
        structure = output_structure(job.response_model)
        params["response_format"] = structure.response_format
    return params, structure


class Settled:
    """What the first rows settle: formats and columns, and with them what each row becomes.

    Attributes:
        place: Of the output.
        columns: Of answers; ``None`` where the output's lines are answers as a whole.
        fingerprint: What the job is.
        needs_shape: Whether the output has to know the columns that all rows have.
    """

    def __init__(self, plan: Planned, first: Sequence[Row]) -> None:
        job, source = plan.job, plan.source
        readable = [row.fields for row in first if row.fields is not None]
        if not source.rereadable:
            readable = readable[:1]  # how many have come by now is chance
        there = source.columns or tuple(dict.fromkeys(name for row in readable for name in row))
        self.is_openai = source.place.format == "openai"
        if source.place.format == "jsonl" and job.input_format is None and readable:
            self.is_openai = is_openai_line(readable[0])
        self.place = plan.place
        if self.is_openai and job.output_format is None and plan.place.format == "jsonl":
            self.place = msgspec.structs.replace(plan.place, format="openai")
        self.columns = _answer_columns(plan, self.place)
        self.needs_shape = source.columns is None and self.place.format in _KNOWING
        if self.needs_shape and job.unordered and job.keep is None:
            raise ConfigurationError(
                f"{self.place.format} in order of completion has to know its columns beforehand, "
                f"and {source.place.format} does not say them",
                hint="Say which columns to keep with keep=[...] (--keep).",
            )
        self.fingerprint = _fingerprint(plan, self)
        self._keep = job.keep
        self._ask: Ask | None = None
        if there:
            self._ask = ask_for(job.asking, there, openai=self.is_openai)
            check_columns(job.keep or (), there, "keep")
            self._refuse_collisions(there)
        elif first:
            raise ConfigurationError(
                f"no row can be read: {first[0].problem}", hint="Is its format the right one?"
            )

    def _refuse_collisions(self, there: Sequence[str]) -> None:
        if found := self._collisions(there):
            raise ConfigurationError(
                f"the input has a column {found[0]!r}, as the answers have",
                hint=f"Give that of the answers another name, such as {found[0]}={found[0]}_new in "
                "columns (--columns), or keep only other columns of the input (--keep).",
            )

    def _collisions(self, columns: Iterable[str]) -> list[str]:
        if self.columns is None:
            return []
        kept = columns if self._keep is None else self._keep
        return self.columns.collisions([*kept])

    def item(self, row: Row) -> Item:
        """What is asked of this row.

        Raises:
            BadRequestError: nothing can be.
        """
        if row.fields is None:
            raise BadRequestError(row.problem or f"line {row.line} cannot be read")
        if found := self._collisions(row.fields):
            raise BadRequestError(f"line {row.line} has a column {found[0]!r}, as the answers have")
        assert self._ask is not None
        try:
            return self._ask(row.fields)
        except BadRequestError as error:
            raise BadRequestError(f"line {row.line}: {error.message}") from None

    def unasked(self, row: Row) -> Outcome:
        """What becomes of a row of which nothing can be asked."""
        if row.fields is not None and self._collisions(row.fields):
            return Outcome.COLLIDING
        return Outcome.UNASKED

    def answer(
        self, row: Row, result: Result | None, error: VllmError | None, parsed: Any = None
    ) -> bytes:
        """A row's answer as it stands in the ledger."""
        if self.columns is not None:
            return self.columns.encode(row.position, result, error, parsed)
        custom_id = (row.fields or {}).get("custom_id")
        if not isinstance(custom_id, str):
            custom_id = f"row-{row.position}"
        outcome = error if error is not None else result
        assert outcome is not None
        return openai_answer(custom_id, outcome)


_NOT_PARAMETERS = ("model", "response_format", "priority")
_KNOWING = ("csv", "tsv", "parquet")
"""Formats whose columns are the same in all rows."""


def _answer_columns(plan: Planned, place: Place) -> AnswerColumns | None:
    job = plan.job
    if place.format != "openai":
        default = (*DEFAULT_COLUMNS, "parsed") if plan.structure else DEFAULT_COLUMNS
        if job.unordered:
            default = ("index", *default)
        return AnswerColumns(job.columns or default)
    if job.columns is not None or job.keep is not None:
        raise ConfigurationError(
            "columns cannot be chosen for output in OpenAI's batch format",
            hint="output_format='jsonl' (--output-format jsonl) has them.",
        )
    return None


def _fingerprint(plan: Planned, settled: Settled) -> Fingerprint:
    job = plan.job
    return {
        "input": plan.source.identity(),
        "input format": plan.source.place.format,
        "model": plan.params.get("model"),
        "parameters": {
            name: value
            for name, value in plan.params.items()
            if name not in CALL_SETTINGS and name not in _NOT_PARAMETERS
        },
        **msgspec.structs.asdict(job.asking),
        "response_format": plan.params.get("response_format"),
        "output format": settled.place.format,
        "compression": settled.place.compression if job.unordered else None,
        "columns": settled.columns.wanted if settled.columns else None,
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
        raise ConfigurationError(
            "retry_failed goes on with a job, and standard output has no ledger"
        )
