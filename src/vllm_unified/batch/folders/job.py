"""A job with folders: what it is told, and how it goes from beginning to end."""

from __future__ import annotations

import asyncio
import contextlib
import io
import pickle
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import Any, TypeVar

import msgspec

from vllm_unified.batch.errors import BatchStoppedError
from vllm_unified.batch.files.formats import FORMATS, Format, Place
from vllm_unified.batch.files.lines import Joined
from vllm_unified.batch.files.rows import Row
from vllm_unified.batch.folders.ledger import UNANSWERED, FailedRow, FolderLedger, Noted, add
from vllm_unified.batch.folders.part import PartForm
from vllm_unified.batch.folders.pipeline import Pipeline, Tally, Work
from vllm_unified.batch.folders.place import Folder, InputFile, format_of
from vllm_unified.batch.folders.survey import Survey, schema_of, together
from vllm_unified.batch.jobs.fingerprint import as_noted, check_same
from vllm_unified.batch.jobs.job import OnProgress
from vllm_unified.batch.jobs.ledger import Counts, Outcome
from vllm_unified.batch.jobs.on_ray import Recipe, beside_us, join_cluster
from vllm_unified.batch.jobs.plan import Job, Settled, shared_params
from vllm_unified.batch.jobs.summary import (
    BatchProgress,
    BatchSummary,
    JobStoppedError,
    summary_of,
)
from vllm_unified.batch.requests import RequestMaker
from vllm_unified.errors import BatchFileError, ConfigurationError, VllmError

import ray  # isort: skip

_LOOK_SECONDS = 0.5
_LEAVE_SECONDS = 30.0
"""Which a job that was killed has, to be gone."""
_MOST_STARTS = 5
"""Of each actor, without an answer in between."""
_NAMESPACE = "vllm-unified"

T = TypeVar("T")


async def run_folder_job(
    job: Job, made_of: Recipe, *, address: str, actors: int, on_progress: OnProgress | None = None
) -> BatchSummary:
    """Run a job to its end, or go on with it.

    Args:
        made_of: Of which each actor gets a client.
        address: Of the Ray cluster.
        actors: How many ask.
        on_progress: Called about twice a second.

    Raises:
        ConfigurationError: it cannot be run like this, or is not the job that was begun.
        BadRequestError: a parameter is wrong.
        JobStoppedError: it ended before its end; what was done is kept.
    """
    plan = await asyncio.to_thread(FolderPlan, job)
    RequestMaker(made_of.settings, plan.params)  # raises for what is wrong for all
    is_new = join_cluster(address)
    try:
        async with contextlib.AsyncExitStack() as stack:
            pipeline = await _take_hold(plan)
            stack.callback(ray.kill, pipeline)
            return await _Run(plan, made_of, pipeline, actors, on_progress).to_end()
    finally:
        if is_new:
            ray.shutdown()


class FolderPlan:
    """A job that has been checked, as far as it can be without reading rows.

    Attributes:
        source: The input.
        output: The folder with the parts.
        place: The output's format.
        ledger: What is done.
        params: For all rows, the model among them.
        structure: What each answer has to parse as.
    """

    def __init__(self, job: Job) -> None:
        """Raises:
        ConfigurationError: something in it cannot be; nothing was read, written or sent.
        BadRequestError: the response model cannot be sent.
        """
        self.job = msgspec.structs.replace(job, unordered=True)
        if job.strict:
            raise ConfigurationError("strict is for jobs with files, not with folders")
        if job.retry_failed and job.overwrite:
            raise ConfigurationError("retry_failed goes on with a job, and overwrite drops it")
        if job.output_format is not None and job.output_format not in FORMATS:
            raise ConfigurationError(f"output_format must be one of {', '.join(FORMATS)}")
        self.params, self.structure = shared_params(job)
        self.source = FolderSource(Folder(job.input), job.input_format)
        self.output = Folder(job.output)
        name = job.ledger or f"{job.output.rstrip('/')}.ledger"
        self.ledger = FolderLedger(Folder(name))
        self.place = Place(None, _format(job.output_format) or self.source.place.format)
        inside = self.source.folder.path
        if f"{self.output.path}/".startswith(f"{inside}/"):
            raise ConfigurationError("the output is within the input: its parts would be read")


class FolderSource:
    """The input: files of one format."""

    def __init__(self, folder: Folder, format: str | None) -> None:
        self.folder = folder
        self.files = folder.inputs()
        self.place = format_of(self.files, format)
        self.rereadable = True
        self.columns: tuple[str, ...] | None = None
        """Of all files; there when they have been surveyed."""

    def identity(self) -> str:
        """What tells this input from another one: names, sizes and times of its files."""
        digest = blake2b(msgspec.json.encode(self.files), digest_size=8).hexdigest()
        size = sum(file.size for file in self.files)
        return f"{len(self.files):,} files, {size:,} bytes, {digest}"


def _format(name: str | None) -> Format | None:
    return next((format for format in FORMATS if format == name), None)


async def _take_hold(plan: FolderPlan) -> Any:
    """The actor that runs the pipeline; there is one for each output."""
    name = f"batch {plan.output.path}"
    actor = ray.remote(Pipeline).options(**beside_us(), name=name, namespace=_NAMESPACE)
    until = time.monotonic() + _LEAVE_SECONDS
    while True:
        try:
            return actor.remote()
        except ValueError:  # the name is taken
            if time.monotonic() > until:
                raise ConfigurationError(
                    f"another job on this cluster writes to {plan.output.name}"
                ) from None
            await asyncio.sleep(_LOOK_SECONDS)


class _Run:
    """One run of a job."""

    def __init__(
        self,
        plan: FolderPlan,
        made_of: Recipe,
        pipeline: Any,
        actors: int,
        on_progress: OnProgress | None,
    ) -> None:
        self._plan = plan
        self._job = plan.job
        self._made_of = made_of
        self._pipeline = pipeline
        self._actors = actors
        self._on_progress = on_progress
        self._began = time.monotonic()
        self._before = Counts()
        """What earlier runs had done."""
        self._counts = Counts()
        self._total = 0

    async def to_end(self) -> BatchSummary:
        """Ask what is not done, and write it."""
        ledger, job = self._plan.ledger, self._job
        noted = None if job.overwrite else await self._do(ledger.job)
        await self._do(self._check_output, noted)
        surveys = await self._survey(noted)
        whole = together(surveys)
        self._total = whole.rows
        settled = self._settle(whole)
        form = await self._do(self._form, settled, whole)
        if job.overwrite:
            await self._do(self._reset)
        if noted is not None:
            check_same(noted.fingerprint, settled.fingerprint, job.output)
            if noted.finished and not job.retry_failed:
                self._counts = self._before = await self._do(self._done)
                return self._summary()
        noted = Noted(
            fingerprint=as_noted(settled.fingerprint),
            files=self._plan.source.files,
            surveys=surveys,
        )
        # Before anything of it is taken back: what is finished is not looked at again.
        await self._do(ledger.note, noted)
        if job.retry_failed:
            await self._do(self._plan.output.delete, _unanswered(form))
            await self._do(ledger.forget_failed)
        self._counts = self._before = await self._do(self._done)
        await self._ask(self._work(settled, whole, surveys, form))
        await self._do(self._finish, settled, whole, form)
        noted.finished = True
        await self._do(ledger.note, noted)
        return self._summary()

    async def _do(self, work: Callable[..., T], *args: Any) -> T:
        """In a thread: a store may be slow, and the loop is the caller's."""
        return await asyncio.to_thread(work, *args)

    def _check_output(self, noted: Noted | None) -> None:
        if noted is None and not self._job.overwrite and self._plan.output.names():
            raise ConfigurationError(
                f"{self._job.output} has files in it, and no ledger says that they are of this job",
                hint="Take another output, or overwrite=True (--overwrite).",
            )

    def _reset(self) -> None:
        for name in self._plan.output.names():
            self._plan.output.delete(name)
        self._plan.ledger.reset()

    async def _survey(self, noted: Noted | None) -> list[Survey]:
        """What is in each file; read once in a job's life."""
        source = self._plan.source
        if noted is not None:
            _check_files(noted.files, source.files, self._job.input)
            return noted.surveys
        folder, format = source.folder.address, source.place.format
        surveys: list[Survey] = await self._call(
            self._pipeline.survey.remote(folder, source.files, format)
        )
        return surveys

    def _settle(self, whole: Survey) -> Settled:
        if whole.first is None:
            problem = whole.problem or "there is none"
            raise ConfigurationError(
                f"no row can be read: {problem}", hint="Is its format the right one?"
            )
        self._plan.source.columns = tuple(whole.types)
        first = msgspec.json.decode(whole.first, type=dict[str, Any])
        settled = Settled(self._plan, [Row(0, 1, whole.first, first)])
        if self._job.model is None and not settled.is_openai:
            raise ConfigurationError(
                "a job of many actors has to know which model is meant",
                hint="Name it with model=... (--model).",
            )
        return settled

    def _form(self, settled: Settled, whole: Survey) -> PartForm:
        source = self._plan.source
        is_parquet = source.place.format == settled.place.format == "parquet"
        return PartForm(
            format=settled.place.format,
            keep=self._job.keep,
            inputs=whole.types,
            answers=settled.columns.types if settled.columns else {},
            schema=schema_of(source.folder, source.files[0]) if is_parquet else None,
        )

    def _work(
        self, settled: Settled, whole: Survey, surveys: Sequence[Survey], form: PartForm
    ) -> Work:
        source = self._plan.source
        return Work(
            input=source.folder.address,
            output=self._plan.output.address,
            ledger=self._plan.ledger.folder.address,
            files=source.files,
            starts=[0, *accumulate(each.rows for each in surveys)][:-1],
            rows=whole.rows,
            format=source.place.format,
            settled=settled,
            response_model=self._job.response_model,
            form=form,
            params=self._plan.params,
            made_of=self._made_of,
            actors=self._actors,
        )

    async def _ask(self, work: Work) -> None:
        tally = ray.remote(Tally).options(**beside_us()).remote()
        keeper = self._made_of.keeper()
        run = self._pipeline.run.remote(work, tally, keeper)
        running = asyncio.ensure_future(self._call(run))
        stopped: VllmError | None = None
        try:
            while not running.done():
                await asyncio.wait([running], timeout=_LOOK_SECONDS)
                counts, stopped, starts = await tally.read.remote()
                self._report(counts, stopped)
                if starts > _MOST_STARTS * self._actors:
                    self._counts = await self._do(self._done)
                    raise self._stopped(_deaths(starts))
            await running
        finally:
            running.cancel()
            ray.kill(tally)
            ray.kill(keeper)
        if stopped is not None:
            self._counts = await self._do(self._done)
            raise self._stopped(stopped) from stopped

    async def _call(self, reference: Any) -> Any:
        """What an actor answers, or raises."""
        try:
            return await reference
        except ray.exceptions.RayTaskError as error:
            cause = _own_error(error)
            if isinstance(cause, VllmError):
                raise cause from None
            first = str(cause).partition("\n")[0]
            failure = BatchFileError(f"the pipeline failed: {type(cause).__name__}: {first}")
            self._counts = await self._do(self._done)
            raise self._stopped(failure) from error
        except ray.exceptions.RayActorError as error:
            failure = BatchFileError("the actor that runs the pipeline is lost")
            self._counts = await self._do(self._done)
            raise self._stopped(failure) from error

    def _finish(self, settled: Settled, whole: Survey, form: PartForm) -> None:
        """Write the rows that have no answer, and see that every row is there once."""
        failed = self._failed()
        if failed:
            rows = [self._unanswered_row(settled, failed[index]) for index in sorted(failed)]
            data = io.BytesIO()
            form.write(data, rows)
            self._plan.output.write(data.getvalue(), _unanswered(form))
        self._counts = self._done()
        if self._counts.rows != whole.rows:
            raise BatchFileError(
                f"{self._job.output} has {self._counts.rows:,} rows, and not {whole.rows:,}",
                hint="Were files of it, or of the input, changed meanwhile?",
            )

    def _unanswered_row(self, settled: Settled, failed: FailedRow) -> Joined:
        row: Row = pickle.loads(failed.row)
        collides = failed.unasked and settled.unasked(row) is Outcome.COLLIDING
        return Joined(None if collides else row, failed.answer)

    def _failed(self) -> dict[int, FailedRow]:
        failed = self._plan.ledger.failed()
        for index in self._plan.ledger.answered(failed):
            del failed[index]
        return failed

    def _done(self) -> Counts:
        """What is done, as it stands in the ledger."""
        counts = self._plan.ledger.counts()
        failed = self._failed().values()
        unasked = sum(row.unasked for row in failed)
        add(counts, Counts(rows=len(failed), failed=len(failed), unasked=unasked))
        return counts

    # How it does

    def _report(self, new: Counts, trouble: VllmError | None) -> None:
        if self._on_progress is None:
            return
        self._on_progress(
            BatchProgress(
                rows=min(self._before.rows + new.rows, self._total),
                failed=self._before.failed + new.failed,
                total=self._total,
                total_is_exact=True,
                new_rows=new.rows,
                completion_tokens=new.completion_tokens,
                seconds=time.monotonic() - self._began,
                trouble=trouble,
            )
        )

    def _summary(self) -> BatchSummary:
        return summary_of(
            self._counts,
            output=self._job.output,
            resumed=self._before.rows,
            seconds=time.monotonic() - self._began,
            ledger=self._plan.ledger.folder.name,
        )

    def _stopped(self, error: VllmError) -> JobStoppedError:
        summary = self._summary()
        kept = f"{summary.ledger} has what is done, and the same call goes on after it."
        return JobStoppedError(
            f"stopped after {summary.rows:,} of {self._total:,} rows: {error.message}",
            summary=summary,
            hint="\n".join(line for line in (error.hint, kept) if line),
            like=error,
        )


def _unanswered(form: PartForm) -> str:
    return f"{UNANSWERED}.{form.suffix}"


def _deaths(starts: int) -> VllmError:
    return BatchStoppedError(
        f"{starts} workers began, one after the other, and none of them had a row answered",
        hint="Look at the workers' logs on the cluster: one of the rows, or memory?",
    )


def _own_error(error: BaseException) -> BaseException:
    """What an actor raised, out of all that Ray wraps it in."""
    while isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    return error


def _check_files(then: Sequence[InputFile], now: Sequence[InputFile], name: str) -> None:
    """See that an input is what it was.

    Raises:
        ConfigurationError: it is not; says which file is another.
    """
    if list(then) == list(now):
        return
    before, after = {each.name: each for each in then}, {each.name: each for each in now}
    for file in sorted({*before, *after}):
        if before.get(file) == after.get(file):
            continue
        what = "is new" if file not in before else "is gone" if file not in after else "has changed"
        raise ConfigurationError(
            f"the input has changed since rows of it were answered: {file} in {name} {what}",
            hint="Give back the old input, or begin anew with overwrite=True (--overwrite).",
        )
