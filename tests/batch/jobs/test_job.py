"""Jobs with files, against a simulated server: every row once, in order, whatever happens."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import json
import os
from collections.abc import AsyncIterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from tests.support.clients import KINDS, Kind, make_client
from tests.support.waiting import eventually
from vllm_unified import AsyncVllmUnified, BatchStoppedError, BatchSummary
from vllm_unified.batch.jobs.job import Ask, run_job
from vllm_unified.batch.jobs.plan import Job
from vllm_unified.batch.jobs.question import Asking
from vllm_unified.batch.jobs.summary import BatchProgress, JobStoppedError
from vllm_unified.errors import BadRequestError, ConfigurationError
from vllm_unified.simulator import BackgroundSimulator, Fleet

ROWS = 60
QUESTION = "What is {n}?"


@pytest.fixture
async def vllm(vllm_simulator: BackgroundSimulator) -> AsyncIterator[AsyncVllmUnified]:
    async with AsyncVllmUnified(api_url=vllm_simulator.url, max_concurrent_requests=4) as client:
        yield client


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", ROWS)


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(count)))
    return path


async def run(vllm: AsyncVllmUnified, source: Path, output: Path, **options: Any) -> BatchSummary:
    return await vllm.run_batch(
        source, output, **{"prompt": QUESTION, "max_tokens": 4, "patience": 0.01, **options}
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def names(folder: Path) -> list[str]:
    """Of the files that are there."""
    return sorted(path.name for path in folder.iterdir())


def asked(simulator: BackgroundSimulator) -> int:
    """How many prompts arrived."""
    bodies = [request.json for request in simulator.requests]
    return sum(
        len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1 for body in bodies
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_every_row_is_answered_in_order(
    kind: Kind, vllm_simulator: BackgroundSimulator, source: Path, tmp_path: Path
) -> None:
    shown: list[BatchProgress] = []
    async with make_client(kind, api_url=vllm_simulator.url) as client:
        summary = await run(client, source, tmp_path / "out.jsonl", on_progress=shown.append)
        texts = await client.batch([f"What is {n}?" for n in range(ROWS)], max_tokens=4)
    found = lines(tmp_path / "out.jsonl")
    assert [row["n"] for row in found] == list(range(ROWS))
    assert [row["text"] for row in found] == texts
    assert list(found[0]) == ["n", "text", "finish_reason", "usage", "error"]
    assert (summary.rows, summary.failed, summary.resumed) == (ROWS, 0, 0)
    assert summary.completion_tokens == sum(row["usage"]["completion_tokens"] for row in found)
    assert shown[-1].rows == shown[-1].total == ROWS
    assert names(tmp_path) == ["in.jsonl", "out.jsonl", "out.jsonl.ledger"]


async def test_the_same_call_on_a_finished_job_asks_nothing(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    await run(vllm, source, output)
    before, count = output.read_bytes(), asked(vllm_simulator)
    summary = await run(vllm, source, output)
    assert (summary.rows, summary.resumed) == (ROWS, ROWS)
    assert (output.read_bytes(), asked(vllm_simulator)) == (before, count)
    output.unlink()
    await run(vllm, source, output)
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_tokens": 5}, "max_tokens was 4 and is 5"),
        ({"temperature": 0.5}, "temperature was not given and is 0.5"),
        ({"prompt": "Why {n}?"}, 'prompt was "What is {n}?" and is "Why {n}?"'),
        ({"model": "sim"}, 'model was not given and is "sim"'),
        ({"columns": ["text"]}, "columns"),
        ({"unordered": True}, "unordered was false and is true"),
    ],
)
async def test_a_changed_job_is_refused_with_what_changed(
    vllm: AsyncVllmUnified, source: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    await run(vllm, source, tmp_path / "out.jsonl")
    with pytest.raises(ConfigurationError) as raised:
        await run(vllm, source, tmp_path / "out.jsonl", **change)
    assert says in str(raised.value)
    assert "--overwrite" in str(raised.value)
    summary = await run(vllm, source, tmp_path / "out.jsonl", overwrite=True, **change)
    assert (summary.rows, summary.resumed) == (ROWS, 0)


async def test_what_changes_no_answer_may_change(
    vllm: AsyncVllmUnified, source: Path, tmp_path: Path
) -> None:
    await run(vllm, source, tmp_path / "out.jsonl", timeout=10)
    assert (await run(vllm, source, tmp_path / "out.jsonl", timeout=20, priority=3)).resumed == ROWS


async def test_an_output_of_somebody_else_is_left_alone(
    vllm: AsyncVllmUnified, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(ConfigurationError, match="exists"):
        await run(vllm, source, output)
    assert output.read_text() == "mine"
    await run(vllm, source, output, overwrite=True)
    assert len(lines(output)) == ROWS


async def test_two_jobs_on_one_output_refuse_each_other(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator, source: Path, tmp_path: Path
) -> None:
    vllm_simulator.hang()
    first = asyncio.create_task(run(vllm, source, tmp_path / "out.jsonl", patience=60))
    await eventually(
        lambda: (tmp_path / "out.jsonl.ledger").exists() and bool(asked(vllm_simulator))
    )
    with pytest.raises(ConfigurationError, match="another job is at work"):
        await run(vllm, source, tmp_path / "out.jsonl")
    vllm_simulator.heal()
    assert (await first).rows == ROWS


async def interrupted(
    vllm: AsyncVllmUnified, source: Path, output: Path, after: int, **options: Any
) -> None:
    """Cancel a job when so many of its rows are done."""
    reached = asyncio.Event()

    def watch(progress: BatchProgress) -> None:
        if progress.rows >= after:
            reached.set()

    job = asyncio.create_task(run(vllm, source, output, on_progress=watch, **options))
    waiting = asyncio.create_task(reached.wait())
    await asyncio.wait([job, waiting], return_when=asyncio.FIRST_COMPLETED)
    job.cancel()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job


@pytest.mark.parametrize("unordered", [False, True], ids=["ordered", "unordered"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
async def test_a_job_goes_on_where_it_was_interrupted(
    vllm: AsyncVllmUnified,
    vllm_simulator: BackgroundSimulator,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unordered: bool,
    suffix: str,
) -> None:
    monkeypatch.setattr("vllm_unified.batch.jobs.job.FLUSH_ROWS", 5)
    options = {"unordered": unordered}
    await run(vllm, source, tmp_path / "whole.jsonl", **options)
    output = tmp_path / f"out.jsonl{suffix}"
    count = asked(vllm_simulator)
    await interrupted(vllm, source, output, 10, **options)
    assert output.exists() == unordered
    summary = await run(vllm, source, output, **options)
    assert 10 <= summary.resumed < ROWS
    assert asked(vllm_simulator) - count < 2 * ROWS
    data = output.read_bytes()
    found = (gzip.decompress(data) if suffix else data).splitlines()
    whole = (tmp_path / "whole.jsonl").read_bytes().splitlines()
    if unordered:
        found.sort()
        whole.sort()
    assert found == whole


async def test_a_row_that_is_broken_fails_alone(vllm: AsyncVllmUnified, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    more = "".join(f'{{"n": {n}}}\n' for n in range(3, 300))
    source.write_text(f'{{"n": 0}}\n{{"n": \n\n{{"m": 2}}\n{more}{{"n": 300, "text": "mine"}}\n')
    summary = await run(vllm, source, tmp_path / "out.jsonl")
    assert (summary.rows, summary.failed, summary.unasked) == (301, 3, 3)
    found = lines(tmp_path / "out.jsonl")
    assert [row.get("n") for row in found] == [0, None, None, *range(3, 300), None]
    assert [row["text"] is None for row in found] == [False, True, True, *[False] * 297, True]
    assert "line 2 is not JSON" in found[1]["error"]
    assert "line 4: the row has no column 'n'" in found[2]["error"]
    assert found[2]["m"] == 2
    assert "line 302 has a column 'text'" in found[300]["error"]


async def test_strict_sends_nothing_if_a_row_is_broken(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", 500)
    source.write_text(source.read_text() + "broken\n")
    with pytest.raises(ConfigurationError, match="line 501 is not JSON"):
        await run(vllm, source, tmp_path / "out.jsonl", strict=True)
    assert asked(vllm_simulator) == 0
    assert names(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("unordered", [False, True], ids=["ordered", "unordered"])
async def test_failed_rows_are_asked_again_when_it_is_wanted(
    vllm_fleet: Fleet, tmp_path: Path, unordered: bool
) -> None:
    small, large = vllm_fleet.add(max_model_len=40), vllm_fleet.add()
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"n": 0}\n{"n": "%s"}\n{"n": 2}\n' % ("long " * 50))
    async with AsyncVllmUnified() as vllm:

        async def again(where: BackgroundSimulator, **options: Any) -> BatchSummary:
            options = {"endpoint_url": where.url, "unordered": unordered, **options}
            return await run(vllm, source, output, **options)

        summary = await again(small)
        assert (summary.rows, summary.failed, summary.unasked) == (3, 1, 0)
        assert [bool(row["error"]) for row in lines(output)].count(True) == 1
        assert (await again(large)).failed == 1
        assert asked(large) == 0
        assert (await again(small, retry_failed=True)).failed == 1
        summary = await again(large, retry_failed=True)
    assert (summary.rows, summary.failed, summary.resumed) == (3, 0, 2)
    assert asked(large) == 1
    assert [row["error"] for row in lines(output)] == [None] * 3
    assert sorted(str(row["n"])[:1] for row in lines(output)) == ["0", "2", "l"]


async def test_servers_that_are_gone_end_it_with_what_to_do(
    vllm: AsyncVllmUnified,
    vllm_simulator: BackgroundSimulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_unified.batch.jobs.job.FLUSH_ROWS", 1)
    source, output = write_rows(tmp_path / "in.jsonl", 1000), tmp_path / "out.jsonl"

    def die(progress: BatchProgress) -> None:
        if progress.rows >= 10:
            vllm_simulator.kill()

    with pytest.raises(JobStoppedError) as raised:
        await run(vllm, source, output, on_progress=die)
    assert raised.value.is_transient_error
    assert "the same call goes on" in str(raised.value)
    assert 10 <= raised.value.summary.rows < 1000
    assert not output.exists()
    vllm_simulator.start()
    async with AsyncVllmUnified(api_url=vllm_simulator.url) as fresh:
        summary = await run(fresh, source, output)
    assert summary.resumed == raised.value.summary.rows
    assert [row["n"] for row in lines(output)] == list(range(1000))


async def test_a_model_that_is_not_there_ends_it_at_once_and_leaves_nothing(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", 5000)
    with pytest.raises(JobStoppedError, match="`nope` does not exist") as raised:
        await run(vllm, source, tmp_path / "out.jsonl", model="nope")
    assert isinstance(raised.value.__cause__, BatchStoppedError)
    assert asked(vllm_simulator) < 1000
    assert names(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": "{nope}"}, "Its columns are: n."),
        ({"keep": ["nope"]}, "Its columns are: n."),
        ({"columns": ["text=n"]}, "column 'n', as the answers have"),
        ({"columns": ["nope"]}, "Columns: index, text"),
        ({"columns": ["text", "text=other"]}, "twice"),
        ({"max_token": 3}, "did you mean 'max_tokens'"),
        ({"input_format": "nope"}, "one of jsonl"),
        ({"overwrite": True, "retry_failed": True}, "retry_failed"),
        ({"output_format": "parquet", "unordered": True}, "as a whole"),
        ({"output_format": "csv", "unordered": True}, "keep"),
        ({"input_format": "openai"}, "OpenAI"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
async def test_what_is_wrong_with_the_job_is_told_before_anything_is_sent(
    vllm: AsyncVllmUnified,
    vllm_simulator: BackgroundSimulator,
    source: Path,
    tmp_path: Path,
    options: dict[str, Any],
    says: str,
) -> None:
    with pytest.raises((ConfigurationError, BadRequestError)) as raised:
        await run(vllm, source, tmp_path / "out.jsonl", **options)
    assert says in str(raised.value)
    assert vllm_simulator.requests == []
    assert names(tmp_path) == ["in.jsonl"]


async def test_input_and_output_must_differ(vllm: AsyncVllmUnified, source: Path) -> None:
    with pytest.raises(ConfigurationError, match="same file"):
        await run(vllm, source, source)


async def test_an_input_that_changed_is_noticed(
    vllm: AsyncVllmUnified, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_unified.batch.jobs.job.FLUSH_ROWS", 1)
    await interrupted(vllm, source, tmp_path / "out.jsonl", 10)
    write_rows(source, ROWS + 1)
    with pytest.raises(ConfigurationError, match="input was"):
        await run(vllm, source, tmp_path / "out.jsonl")
    write_rows(source, ROWS)
    assert (await run(vllm, source, tmp_path / "out.jsonl")).resumed >= 10


def asking_of(vllm: AsyncVllmUnified) -> Ask:
    return lambda prompts, params, pack: vllm.stream_batch(prompts, params, pack=pack)


async def from_stdin(vllm: AsyncVllmUnified, output: str, data: bytes, **job: Any) -> bytes:
    """What a job with this on standard input writes to standard output."""
    stdout = io.BytesIO()
    await run_job(
        Job(input="-", output=output, asking=Asking(prompt=QUESTION), **job),
        asking_of(vllm),
        stdin=io.BytesIO(data),
        stdout=stdout,
    )
    return stdout.getvalue()


ROW_BYTES = b"".join(b'{"n": %d}\n' % n for n in range(ROWS))


async def test_standard_output_gets_the_rows_in_order(
    vllm: AsyncVllmUnified, tmp_path: Path, source: Path
) -> None:
    await run(vllm, source, tmp_path / "out.jsonl")
    found = await from_stdin(vllm, "-", ROW_BYTES, params={"max_tokens": 4})
    assert found.splitlines() == (tmp_path / "out.jsonl").read_bytes().splitlines()


def has_lines(out: io.BytesIO, count: int) -> bool:
    return out.getvalue().count(b"\n") == count


async def test_standard_output_gets_a_row_when_it_is_answered(vllm: AsyncVllmUnified) -> None:
    """As ``tail -f questions | vllm-unified batch - -``."""
    ends, out = os.pipe(), io.BytesIO()
    with os.fdopen(ends[0], "rb") as reading, os.fdopen(ends[1], "wb", buffering=0) as writing:
        job = Job(input="-", output="-", asking=Asking(prompt=QUESTION))
        running = asyncio.create_task(run_job(job, asking_of(vllm), stdin=reading, stdout=out))
        for count in (1, 2):
            writing.write(b'{"n": 0}\n')
            await eventually(partial(has_lines, out, count))
        writing.close()
        assert (await running).rows == 2


async def test_with_a_ledger_a_piped_job_goes_on(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    ledger = str(tmp_path / "ledger")
    first = await from_stdin(vllm, "-", ROW_BYTES, ledger=ledger, overwrite=True)
    count = asked(vllm_simulator)
    with pytest.raises(ConfigurationError, match="line 2 is not what it was"):
        await from_stdin(vllm, "-", ROW_BYTES.replace(b"1", b"7"), ledger=ledger)
    assert await from_stdin(vllm, "-", ROW_BYTES, ledger=ledger) == first
    assert asked(vllm_simulator) == count


@pytest.mark.parametrize("format", ["csv", "parquet"])
async def test_rows_of_one_format_come_out_in_another(
    vllm: AsyncVllmUnified, tmp_path: Path, format: str
) -> None:
    source = tmp_path / "in.jsonl"
    rows = [
        {"n": 1, "flag": True, "mixed": 1, "big": 2**70},
        {"n": 2.5, "list": ["a"], "mixed": "x", "big": 1},
        {"n": None, "mixed": None, "late": 'a "b",\n'},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / f"out.{format}"
    summary = await run(vllm, source, output, prompt="a", columns=["text", "usage", "latency"])
    assert summary.failed == 0
    if format == "csv":
        found: Any = list(csv.DictReader(io.StringIO(output.read_text())))
        assert [row["n"] for row in found] == ["1", "2.5", ""]
        assert found[1]["list"] == '["a"]'
        assert found[2]["late"] == 'a "b",\n'
    else:
        table = pq.read_table(output)
        assert table.schema.field("n").type == pa.float64()
        assert table.schema.field("flag").type == pa.bool_()
        found = table.to_pylist()
        assert [row["n"] for row in found] == [1.0, 2.5, None]
        assert [row["mixed"] for row in found] == ["1", '"x"', None]
        assert found[1]["usage"]["completion_tokens"] > 0
    assert list(found[0]) == [
        *("n", "flag", "mixed", "big", "list", "late"),
        *("text", "usage", "latency"),
    ]


async def test_parquet_to_parquet_keeps_types(vllm: AsyncVllmUnified, tmp_path: Path) -> None:
    table = pa.table(
        {
            "n": pa.array([1, 2], pa.int8()),
            "when": pa.array([0, 1], pa.timestamp("ms", tz="UTC")),
            "money": pa.array([Decimal("1.10"), None], pa.decimal128(5, 2)),
            "bytes": [b"\xff", b""],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    await run(vllm, tmp_path / "in.parquet", tmp_path / "out.parquet", keep=["when", "money", "n"])
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.select(["when", "money", "n"]).equals(table.select(["when", "money", "n"]))
    assert all(found.column("text").to_pylist())


async def test_zstd_on_both_sides(vllm: AsyncVllmUnified, tmp_path: Path) -> None:
    (tmp_path / "in.csv.zst").write_bytes(zstd.compress(b"n\n1\n2\n"))
    await run(vllm, tmp_path / "in.csv.zst", tmp_path / "out.tsv.zst", columns=["finish_reason"])
    found = zstd.decompress((tmp_path / "out.tsv.zst").read_bytes())
    assert found.startswith(b"n\tfinish_reason\n1\t")


async def test_every_answer_fits_the_schema_or_has_an_error(
    vllm: AsyncVllmUnified, source: Path, tmp_path: Path
) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    output = tmp_path / "out.jsonl"
    summary = await run(vllm, source, output, response_model=schema, max_tokens=24)
    found = lines(output)
    assert summary.answered > 0
    for row in found:
        if row["error"] is None:
            assert isinstance(row["parsed"]["a"], int)
            assert json.loads(row["text"]) == row["parsed"]
        else:
            assert "OutputValidationError" in row["error"]
            assert row["parsed"] is None
    assert summary.failed == sum(row["error"] is not None for row in found)


async def test_an_empty_input_makes_an_empty_output(
    vllm: AsyncVllmUnified, vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"")
    (tmp_path / "in.csv").write_bytes(b"n\n")
    assert (await run(vllm, tmp_path / "in.jsonl", tmp_path / "out.jsonl")).rows == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    await run(vllm, tmp_path / "in.csv", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == b"n,text,finish_reason,usage,error\n"
    assert vllm_simulator.requests == []


async def test_without_a_name_one_model_has_to_answer_all(
    vllm_fleet: Fleet, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_unified.batch.jobs.job.FLUSH_ROWS", 1)
    one, other = vllm_fleet.add(model="one"), vllm_fleet.add(model="other")
    async with AsyncVllmUnified(max_concurrent_requests=4) as vllm:
        await interrupted(vllm, source, tmp_path / "out.jsonl", 10, endpoint_url=one.url)
        with pytest.raises(ConfigurationError, match="answered by 'one', and now 'other'"):
            await run(vllm, source, tmp_path / "out.jsonl", endpoint_url=other.url)
        summary = await run(vllm, source, tmp_path / "out.jsonl", endpoint_url=one.url)
    assert (summary.rows, summary.failed) == (ROWS, 0)
