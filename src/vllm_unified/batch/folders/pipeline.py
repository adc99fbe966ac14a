"""The pipeline: rows are read, asked by actors, and written, all of it by Ray Data. Needs ray.

Ray's checkpoints make it go on after whatever ended it. A part of the output is written in three
steps: the indices of its rows as a *pending* checkpoint, the part, and the checkpoint's new name. A
run begins by deleting parts whose checkpoint is still pending, and leaves out the rows of all
others.
"""

from __future__ import annotations

import asyncio
import io
import pickle
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from vllm_unified.batch.answer import BatchAnswer
from vllm_unified.batch.errors import BatchStoppedError
from vllm_unified.batch.files.formats import Format
from vllm_unified.batch.files.lines import Joined
from vllm_unified.batch.files.rows import Row
from vllm_unified.batch.files.source import rows_of
from vllm_unified.batch.folders.ledger import (
    COUNTS,
    DONE,
    INDEX,
    FailedRow,
    FolderLedger,
    add,
)
from vllm_unified.batch.folders.part import PartForm
from vllm_unified.batch.folders.place import Folder, InputFile
from vllm_unified.batch.folders.survey import Survey, survey_file
from vllm_unified.batch.jobs.ledger import Counts, Outcome
from vllm_unified.batch.jobs.on_ray import Recipe
from vllm_unified.batch.jobs.plan import Settled
from vllm_unified.batch.jobs.question import bare
from vllm_unified.batch.requests import RequestMaker
from vllm_unified.batch.runner import BatchRun
from vllm_unified.batch.source import Source
from vllm_unified.batch.stream import BatchStream
from vllm_unified.errors import (
    BadRequestError,
    ConfigurationError,
    OutputValidationError,
    VllmError,
)
from vllm_unified.wire.structure import OutputStructure, output_structure

import ray  # isort: skip
import pyarrow as pa  # isort: skip
import ray.data  # isort: skip
from ray.data.checkpoint import CheckpointConfig  # isort: skip
from ray.data.datasource import BlockBasedFileDatasink, FileBasedDatasource  # isort: skip

_READ_ROWS = 1024
_REPORT_SECONDS = 0.5
BLOCKS_AT_ONCE = 3
"""Of each actor, so that it does not wait for the slowest row of one."""
_PART_ROWS = (100, 10_000)
"""Rows of a part: at least, at most. An actor that is lost has to do its parts again."""
_OTHER_CPUS = 2
_PARTS_OF_ACTOR = 16
"""An actor writes so many parts at least, if they do not get too small."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """All that the pipeline has to know."""

    input: str
    output: str
    ledger: str
    files: Sequence[InputFile]
    starts: Sequence[int]
    """The index of each file's first row."""
    rows: int
    format: Format
    settled: Settled
    response_model: Any
    form: PartForm
    params: dict[str, Any]
    made_of: Recipe
    actors: int


class Tally:
    """An actor that knows how far the run is."""

    def __init__(self) -> None:
        self._counts = Counts()
        self._stopped: VllmError | None = None
        self._starts = 0

    def start(self) -> None:
        """An actor begins, the first time or in a lost one's place."""
        self._starts += 1

    def add(self, counts: Counts) -> None:
        """Rows are answered, though perhaps not written yet."""
        if counts.rows:
            self._starts = 0
        add(self._counts, counts)

    def stop(self, error: VllmError) -> None:
        """An actor reaches no server."""
        self._stopped = error

    def read(self) -> tuple[Counts, VllmError | None, int]:
        """How far it is, why it stopped, and how many actors began since the last answer."""
        return self._counts, self._stopped, self._starts


class Pipeline:
    """An actor that runs the pipeline: whoever kills it ends all of it."""

    def survey(self, folder: str, files: list[InputFile], format: Format) -> list[Survey]:
        """What is in each file."""
        task = ray.remote(_survey)
        found: list[Survey] = ray.get([task.remote(folder, file, format) for file in files])
        return found

    def run(self, work: Work, tally: Any, keeper: Any) -> None:
        """Ask all rows that are not done, and write them."""
        output, ledger = Folder(work.output), Folder(work.ledger)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        config = CheckpointConfig(
            id_column=INDEX,
            checkpoint_path=ledger.at(DONE),
            override_filesystem=ledger.files,
            delete_checkpoint_on_success=False,
        )
        config.checkpoint_actor_memory_bytes = 2**26  # Ray raises it to what the indices take
        context.checkpoint_config = config
        least, most = _PART_ROWS
        rows = min(max(work.rows // (work.actors * _PARTS_OF_ACTOR), least), most)
        # Without a number, Ray cuts what little there is into a block for each CPU.
        dataset = ray.data.read_datasource(
            RowsDatasource(work), override_num_blocks=len(work.files)
        )
        dataset = dataset.repartition(target_num_rows_per_block=rows).map_batches(
            Asker,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(work, tally, keeper),
            compute=ray.data.ActorPoolStrategy(size=work.actors),
            num_cpus=_cpus_of_actor(work.actors),
            max_concurrency=BLOCKS_AT_ONCE,
            scheduling_strategy="SPREAD",
        )
        dataset.write_datasink(PartsDatasink(output, ledger, work.form))


def _cpus_of_actor(actors: int) -> int:
    """Reading and writing take a CPU for each task, and the filter of what is done one for itself;
    on a small cluster actors that are counted would leave them none, and all would wait for ever.

    Raises:
        ConfigurationError: the cluster is too small even so.
    """
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < _OTHER_CPUS:
        raise ConfigurationError(f"a job with folders takes a cluster of two CPUs, not {cpus}")
    return 1 if cpus >= actors + _OTHER_CPUS else 0


def _survey(folder: str, file: InputFile, format: Format) -> Survey:
    return survey_file(Folder(folder), file, format)


class RowsDatasource(FileBasedDatasource):  # type: ignore[misc]
    """Ray's reader of files, with our rows: the same as those of a job with one file."""

    def __init__(self, work: Work) -> None:
        folder = Folder(work.input)
        self._format = work.format
        self._starts = {
            folder.at(file.name): start for file, start in zip(work.files, work.starts, strict=True)
        }
        super().__init__([*self._starts], filesystem=folder.files)

    def _open_input_source(self, filesystem: Any, path: str, **open_args: Any) -> Any:
        if self._format == "parquet":
            return filesystem.open_input_file(path)
        return super()._open_input_source(filesystem, path, **open_args)

    def _read_stream(self, f: Any, path: str) -> Iterator[pa.Table]:
        data = f if self._format == "parquet" else io.BufferedReader(f)
        start = self._starts[path]
        rows: list[Row] = []
        for row in rows_of(data, self._format, path):
            rows.append(row)
            if len(rows) == _READ_ROWS:
                yield _table(start, rows)
                rows = []
        if rows:
            yield _table(start, rows)


def _table(start: int, rows: list[Row]) -> pa.Table:
    indices = [start + row.position for row in rows]
    packed = [pickle.dumps(row) for row in rows]
    return pa.table({INDEX: pa.array(indices, pa.int64()), "row": pa.array(packed, pa.binary())})


class Asker:
    """An actor that asks: a client of its own, in a thread of its own, for several blocks."""

    def __init__(self, work: Work, tally: Any, keeper: Any) -> None:
        self._work = work
        self._tally = tally
        tally.start.remote()
        self._ledger = FolderLedger(Folder(work.ledger))
        self._structure = work.response_model and output_structure(work.response_model)
        self._failed_before = set(self._ledger.failed())
        self._stopped = False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        connecting = asyncio.run_coroutine_threadsafe(work.made_of.fleet(keeper), self._loop)
        self._fleet, self._limit = connecting.result()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The rows of a block that have an answer now, with it."""
        return asyncio.run_coroutine_threadsafe(self._answer(batch), self._loop).result()

    async def _answer(self, batch: pa.Table) -> pa.Table:
        block = _Block(self._work.settled, self._structure, batch, without=self._failed_before)
        if block.prompts and not self._stopped:
            requests = RequestMaker(self._fleet.settings, self._work.params, embeddings=True)
            run = BatchRun(
                self._fleet,
                Source(block.prompts, by_priority=False),
                requests,
                ordered=False,
                patience=self._work.made_of.patience,
                # A line of OpenAI's format has in it what the server said to one prompt.
                pack=None if self._work.settled.columns else 1,
            )
            try:
                async with BatchStream(run) as stream:
                    await self._take(stream, block)
            except BatchStoppedError as error:
                self._stopped = True
                self._tally.stop.remote(error)
        self._tally.add.remote(block.report())
        if block.failed:
            await asyncio.to_thread(self._ledger.note_failed, block.failed, uuid.uuid4().hex)
        return block.table()

    async def _take(self, stream: BatchStream, block: _Block) -> None:
        last = time.monotonic()
        async for answer in stream:
            block.take(answer)
            if time.monotonic() - last > _REPORT_SECONDS:
                last = time.monotonic()
                self._tally.add.remote(block.report())


class _Block:
    """Rows that are asked together."""

    def __init__(
        self,
        settled: Settled,
        structure: OutputStructure | None,
        batch: pa.Table,
        *,
        without: set[int],
    ) -> None:
        self._settled = settled
        self._structure = structure
        self.prompts: list[Any] = []
        self.failed: list[FailedRow] = []
        self._asked: list[tuple[int, bytes, Row]] = []
        self._answered: list[tuple[int, bytes, bytes, Counts]] = []
        self._new = Counts()
        indices = batch[INDEX].to_pylist()
        for index, packed in zip(indices, batch["row"].to_pylist(), strict=True):
            if index in without:
                continue
            # Answers say where in the whole input their row is.
            row = msgspec.structs.replace(pickle.loads(packed), position=index)
            try:
                item = self._settled.item(row)
            except BadRequestError as error:
                self._fail(index, packed, row, None, error, self._settled.unasked(row))
                continue
            self._asked.append((index, packed, row))
            self.prompts.append(bare(item))

    def take(self, answer: BatchAnswer) -> None:
        """A row has an answer, or an error."""
        index, packed, row = self._asked[answer.index]
        result, error, parsed = answer.result, answer.error, None
        if result is not None and self._structure is not None:
            try:
                parsed = self._structure.parse(result.text, finish_reason=result.finish_reason)
            except OutputValidationError as invalid:
                error = invalid
        if error is not None or result is None:
            self._fail(index, packed, row, result, error, Outcome.FAILED)
            return
        counts = Counts(
            rows=1,
            cut=int(getattr(result, "finish_reason", None) == "length"),
            prompt_tokens=result.usage.prompt_tokens,
            completion_tokens=result.usage.completion_tokens,
        )
        encoded = self._settled.answer(row, result, None, parsed)
        self._answered.append((index, packed, encoded, counts))
        self._count(counts)

    def _fail(
        self,
        index: int,
        packed: bytes,
        row: Row,
        result: Any,
        error: VllmError | None,
        outcome: Outcome,
    ) -> None:
        encoded = self._settled.answer(row, result, error)
        unasked = outcome is not Outcome.FAILED
        self.failed.append(FailedRow(index, unasked, packed, encoded))
        self._count(Counts(rows=1, failed=1, unasked=int(unasked)))

    def _count(self, counts: Counts) -> None:
        add(self._new, counts)

    def report(self) -> Counts:
        """What is new since the last report."""
        new, self._new = self._new, Counts()
        return new

    def table(self) -> pa.Table:
        """The rows with an answer, in the order of the input."""
        rows = sorted(self._answered, key=lambda each: each[0])
        counts = [msgspec.msgpack.encode(each[3]) for each in rows]
        return pa.table(
            {
                INDEX: pa.array([each[0] for each in rows], pa.int64()),
                "row": pa.array([each[1] for each in rows], pa.binary()),
                "answer": pa.array([each[2] for each in rows], pa.binary()),
                "counts": pa.array(counts, pa.binary()),
            }
        )


class PartsDatasink(BlockBasedFileDatasink):  # type: ignore[misc]
    """Ray's writer of files, with our lines and columns."""

    def __init__(self, output: Folder, ledger: Folder, form: PartForm) -> None:
        super().__init__(output.path, filesystem=output.files, file_format=form.suffix)
        self._ledger = ledger
        self._form = form

    def write_block(self, block: Any, block_index: int, ctx: Any) -> None:
        """Write a part; before it, what its rows add up to."""
        total = Counts()
        for packed in block.to_arrow()["counts"].to_pylist():
            add(total, msgspec.msgpack.decode(packed, type=Counts))
        name = self.filename_provider.get_filename_for_task(ctx.kwargs["write_uuid"], ctx.task_idx)
        base = name.removesuffix(f".{self._form.suffix}")
        self._ledger.write(msgspec.json.encode(total), COUNTS, f"{base}.json")
        super().write_block(block, block_index, ctx)

    def write_block_to_file(self, block: Any, file: Any) -> None:
        """Write a part."""
        table = block.to_arrow()
        pairs = zip(table["row"].to_pylist(), table["answer"].to_pylist(), strict=True)
        self._form.write(file, [Joined(pickle.loads(row), answer) for row, answer in pairs])
