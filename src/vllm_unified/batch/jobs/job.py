"""A job: rows out of a file, answers into another, and nothing lost in between."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec

from vllm_unified.batch.answer import BatchAnswer
from vllm_unified.batch.files.rows import Row
from vllm_unified.batch.files.shape import Shape
from vllm_unified.batch.files.source import Source
from vllm_unified.batch.jobs.delivery import Delivery, delivery_for
from vllm_unified.batch.jobs.fingerprint import as_noted, check_same
from vllm_unified.batch.jobs.ledger import Counts, Entry, Ledger, Outcome
from vllm_unified.batch.jobs.output import changed_input, row_digest
from vllm_unified.batch.jobs.plan import Job, Plan, Settled
from vllm_unified.batch.jobs.question import bare
from vllm_unified.batch.jobs.summary import (
    BatchProgress,
    BatchSummary,
    JobStoppedError,
    summary_of,
)
from vllm_unified.batch.jobs.workers import Feed, Hand
from vllm_unified.errors import (
    BadRequestError,
    BatchFileError,
    ConfigurationError,
    OutputValidationError,
    VllmError,
)
from vllm_unified.wire.requests import GenerationInput

Ask = Callable[[AsyncIterator[GenerationInput], Mapping[str, Any], int | None], "AnswerStream"]
"""Has prompts answered, in order of completion, with parameters for all, and so many of them in
one request as is said."""


class AnswerStream(Protocol):
    """Answers in order of completion."""

    @property
    def trouble(self) -> VllmError | None:
        """Why prompts fail at this moment, while none succeeds."""

    def __aiter__(self) -> AsyncIterator[BatchAnswer]: ...

    async def close(self) -> None:
        """Leave what is under way. May be called twice."""


OnProgress = Callable[[BatchProgress], object]

FLUSH_SECONDS = 0.5
FLUSH_ROWS = 1000
"""Answers go into the ledger after so many, or so often: this much is asked again after
``kill -9``."""
_PAGE = 8192
_SHOWN = 3
_LOOK = 256
"""Rows of a file that say which columns there are."""


async def run_job(
    job: Job,
    ask: Ask,
    *,
    on_progress: OnProgress | None = None,
    stdin: IO[bytes] | None = None,
    stdout: IO[bytes] | None = None,
) -> BatchSummary:
    """Run a job to its end, or go on with it.

    Args:
        ask: Asks the servers.
        on_progress: Called when rows have gone into the ledger.
        stdin: In place of standard input.
        stdout: In place of standard output.

    Raises:
        ConfigurationError: it cannot be run like this, or is not the job that was begun.
        BadRequestError: a parameter is wrong.
        JobStoppedError: it ended before its end; what was done is kept.
    """
    run = _Run(Plan(job, stdin), ask, on_progress, stdout)
    try:
        return await run.to_end()
    finally:
        await asyncio.shield(run.close())


class _Run:
    """One run of a job. Files are touched in two threads: one reads rows, one writes."""

    def __init__(
        self, plan: Plan, ask: Ask, on_progress: OnProgress | None, stdout: IO[bytes] | None
    ) -> None:
        self._plan = plan
        self._job = plan.job
        self._ask = ask
        self._on_progress = on_progress
        self._stdout = stdout
        self._began = time.monotonic()
        self._feed: Feed[Row] | None = None
        self._hand = Hand("vllm-unified ledger")
        self._settled: Settled | None = None
        self._ledger: Ledger | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._delivery: Delivery | None = None
        self._answers: AnswerStream | None = None
        self._shape = Shape(plan.source.columns or ())
        self._counts = Counts()
        self._before = Counts()
        """What earlier runs had done."""
        self._last_done = -1
        self._page: dict[int, bytes] = {}
        self._page_end = 0
        self._under_way: dict[int, Row] = {}
        """By position among the prompts."""
        self._done: list[tuple[Row, Entry]] = []
        """Not in the ledger yet."""
        self._is_full = False
        self._rows_read = 0

    async def to_end(self) -> BatchSummary:
        """Ask what is not done, and deliver."""
        plan = self._plan
        first: list[Row] = []
        if plan.source.rereadable:
            looked = await self._hand.do(partial(_look, plan.source))
        feed = self._feed = Feed(plan.source.rows())
        chunks = feed.chunks()
        if not plan.source.rereadable:
            first = looked = await _first_readable(chunks)
        settled = plan.settled(looked)
        # A line of OpenAI's format has in it what the server said to one prompt.
        pack = None if settled.columns else 1
        prompts = self._prompts(settled, first, chunks)
        answers = self._answers = self._ask(prompts, plan.params, pack)
        if self._job.strict:
            await self._hand.do(lambda: _check_rows(plan, settled))
        if await self._hand.do(lambda: self._open(settled)):
            return self._summary()
        try:
            await self._ask_all(settled, answers)
            await self._hand.do(self._finish)
        except ConfigurationError:
            raise
        except VllmError as error:
            await self._flush_if_possible()
            raise self._stopped(error) from error
        return self._summary()

    async def close(self) -> None:
        """Put what is done into the ledger, and let go of everything."""
        if self._feed is not None:
            self._feed.close()
        if self._answers is not None:
            await self._answers.close()
        await self._flush_if_possible()
        await self._hand.do(self._let_go)
        self._hand.close()

    # Ledger and output; in the writing thread

    def _open(self, settled: Settled) -> bool:
        """Take the ledger; whether the job is finished already."""
        job, path = self._job, settled.place.path
        output = path is not None and path.exists()
        if self._plan.ledger is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="vllm-unified-")
            ledger = Ledger(Path(self._temporary.name) / "ledger")
        else:
            is_new = not self._plan.ledger.exists()
            if output and is_new and not job.overwrite:
                raise ConfigurationError(
                    f"{job.output} exists, and no ledger says that it is of this job",
                    hint="Take another output, or overwrite=True (--overwrite).",
                )
            ledger = Ledger(self._plan.ledger)
        self._ledger = ledger
        if job.overwrite:
            ledger.reset()
        if ledger.counts.rows or ledger.read("finished"):
            check_same(ledger.read("job", dict[str, Any]) or {}, settled.fingerprint, job.output)
        finished = bool(ledger.read("finished"))
        if finished and not output and path is not None and ledger.last() < 0:
            ledger.reset()  # the output was deleted, and its rows are nowhere else
            finished = False
        if job.retry_failed and ledger.counts.failed:
            ledger.forget_failed()
            finished = False
        self._counts = msgspec.structs.replace(ledger.counts)
        self._before = ledger.counts
        if finished and output:
            return True
        ledger.note(job=as_noted(settled.fingerprint))
        self._last_done = ledger.last()
        self._delivery = delivery_for(self._plan, settled, ledger, self._stdout)
        self._delivery.open()
        return False

    def _finish(self) -> None:
        assert self._ledger is not None
        assert self._delivery is not None
        self._delivery.finish(self._shape)
        self._delivery.close()
        self._ledger.note(finished=True)
        if self._plan.place.path is not None and not self._ledger.counts.failed:
            self._ledger.shrink()

    def _let_go(self) -> None:
        if self._delivery is not None:
            self._delivery.close()
        if self._ledger is not None:
            if not self._ledger.counts.rows and not self._ledger.read("finished"):
                if self._delivery is not None:
                    self._delivery.discard()
                self._ledger.remove()
            self._ledger.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    # Rows and answers; on the event loop

    async def _ask_all(self, settled: Settled, answers: AnswerStream) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                ticking = group.create_task(self._flush_regularly())
                async for answer in answers:
                    self._take(settled, answer)
                    if len(self._done) >= FLUSH_ROWS:
                        await self._flush()
                ticking.cancel()
                await self._flush()
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed.exceptions[0].__cause__

    async def _prompts(
        self, settled: Settled, first: list[Row], chunks: AsyncIterator[list[Row]]
    ) -> AsyncIterator[GenerationInput]:
        """What is to be asked, read as it is needed."""
        number = 0
        chunk: list[Row] | None = first
        while chunk is not None:
            for row in chunk:
                self._rows_read += 1
                if settled.needs_shape and row.fields is not None:
                    self._shape.see(row.fields)
                if row.position <= self._last_done and await self._is_done(row):
                    continue
                try:
                    item = settled.item(row)
                except BadRequestError as error:
                    self._settle(settled, row, settled.unasked(row), None, error)
                    if len(self._done) >= FLUSH_ROWS:
                        await self._flush()
                    continue
                self._under_way[number] = row
                number += 1
                yield bare(item)
            chunk = await anext(chunks, None)
        if self._last_done >= self._rows_read:
            raise changed_input(None)

    async def _is_done(self, row: Row) -> bool:
        """Whether it was answered in an earlier run."""
        ledger = self._ledger
        assert ledger is not None
        if row.position >= self._page_end:
            start, self._page_end = row.position, row.position + _PAGE
            self._page = await self._hand.do(lambda: ledger.done(start, start + _PAGE))
        digest = self._page.get(row.position)
        if digest is not None and digest != row_digest(row):
            raise changed_input(row)
        return digest is not None

    def _take(self, settled: Settled, answer: BatchAnswer) -> None:
        row = self._under_way.pop(answer.index)
        result, error, parsed = answer.result, answer.error, None
        if result is not None:
            if self._plan.params.get("model") is None and not settled.is_openai:
                self._check_model(result.model)
            if self._plan.structure is not None:
                try:
                    parsed = self._plan.structure.parse(
                        result.text, finish_reason=result.finish_reason
                    )
                except OutputValidationError as invalid:
                    error = invalid
        outcome = Outcome.ANSWERED if error is None else Outcome.FAILED
        self._settle(settled, row, outcome, result, error, parsed)

    def _settle(
        self,
        settled: Settled,
        row: Row,
        outcome: Outcome,
        result: Any,
        error: VllmError | None,
        parsed: Any = None,
    ) -> None:
        """A row is done."""
        counts = self._counts
        counts.rows += 1
        counts.failed += outcome is not Outcome.ANSWERED
        counts.unasked += outcome in (Outcome.UNASKED, Outcome.COLLIDING)
        if result is not None:
            counts.cut += getattr(result, "finish_reason", None) == "length"
            counts.prompt_tokens += result.usage.prompt_tokens
            counts.completion_tokens += result.usage.completion_tokens
        answer = settled.answer(row, result, error, parsed)
        self._done.append((row, Entry(row.position, row_digest(row), outcome, answer)))

    def _check_model(self, model: str) -> None:
        """Without a name, whatever is served answers; but one model for all rows."""
        counts = self._counts
        if counts.model is None:
            counts.model = model
        if model != counts.model:
            raise ConfigurationError(
                f"rows were answered by {counts.model!r}, and now {model!r} answers",
                hint="Say which model is meant with model=... (--model).",
            )

    async def _flush_regularly(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self._flush()

    async def _flush(self) -> None:
        """What is done, into the ledger."""
        done, self._done = self._done, []
        delivery = self._delivery
        if done and delivery is not None:
            counts = msgspec.structs.replace(self._counts)
            try:
                await self._hand.do(lambda: delivery.record(done, counts))
            except BatchFileError:
                self._is_full = True
                raise
        if self._on_progress is not None:
            self._on_progress(self._progress())

    async def _flush_if_possible(self) -> None:
        """Before the end: a disk that did not take the last rows does not get more."""
        if self._done and not self._is_full:
            await self._flush()

    # How it does

    def _progress(self) -> BatchProgress:
        total, exact = self._total()
        counts = self._ledger.counts if self._ledger is not None else Counts()
        return BatchProgress(
            rows=counts.rows,
            failed=counts.failed,
            total=total,
            total_is_exact=exact,
            new_rows=counts.rows - self._before.rows,
            completion_tokens=counts.completion_tokens - self._before.completion_tokens,
            seconds=time.monotonic() - self._began,
            trouble=self._answers.trouble if self._answers is not None else None,
        )

    def _total(self) -> tuple[int | None, bool]:
        feed = self._feed
        if feed is None:
            return None, False
        if feed.ended:
            return feed.count, True
        source = self._plan.source
        if source.count is not None:
            return source.count, True
        fraction = source.fraction
        return (int(feed.count / fraction) if fraction else None), False

    def _summary(self) -> BatchSummary:
        ledger = self._plan.ledger
        counts = self._ledger.counts if self._ledger is not None else Counts()
        return summary_of(
            counts,
            output=self._job.output,
            resumed=self._before.rows,
            seconds=time.monotonic() - self._began,
            ledger=None if ledger is None else str(ledger),
        )

    def _stopped(self, error: VllmError) -> JobStoppedError:
        summary = self._summary()
        total, exact = self._total()
        of = "" if total is None else f" of {'' if exact else 'about '}{total:,}"
        if not summary.rows:
            kept = ""
        elif self._plan.ledger is not None:
            kept = f"{summary.ledger} has what is done, and the same call goes on after it."
        else:
            kept = "Nothing of it is kept: standard output has a ledger only if ledger is given."
        return JobStoppedError(
            f"stopped after {summary.rows:,}{of} rows: {error.message}",
            summary=summary,
            hint="\n".join(line for line in (error.hint, kept) if line),
            like=error,
        )


def _look(source: Source) -> list[Row]:
    with contextlib.closing(source.rows()) as rows:
        return [*islice(rows, _LOOK)]


async def _first_readable(chunks: AsyncIterator[list[Row]]) -> list[Row]:
    """Rows until one can be read."""
    found: list[Row] = []
    async for chunk in chunks:
        found += chunk
        if any(row.fields is not None for row in chunk):
            break
    return found


def _check_rows(plan: Plan, settled: Settled) -> None:
    """See that something can be asked of every row."""
    broken = []
    for row in plan.source.rows():
        try:
            settled.item(row)
        except BadRequestError as error:
            broken.append(error.message)
    if broken:
        raise ConfigurationError(
            f"{len(broken):,} rows of {plan.source.place.name} cannot be asked, and nothing was "
            f"sent. The first: {'; '.join(broken[:_SHOWN])}"
        )
