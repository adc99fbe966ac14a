"""Jobs with folders on a Ray cluster of two nodes: the rows are those of jobs with files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from tests.ray.conftest import gauge, processes
from tests.resilience import jobs
from tests.resilience.servers import Servers
from tests.support.waiting import until
from vllm_unified import BatchProgress, JobStoppedError, VllmUnified
from vllm_unified.errors import ConfigurationError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

FILES, ROWS = 4, 2000
PROMPT = "Question {n}: {topic}\nAnswer:"
ASKER = "MapWorker"
COLUMNS = ["index", "text", "finish_reason", "usage", "error"]


def write(folder: Path, suffix: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Files of these rows, so that they are in order by the files' names."""
    folder.mkdir()
    size = -(-len(rows) // FILES)
    for number in range(FILES):
        write_file(folder / f"{number}.{suffix}", rows[number * size : (number + 1) * size])
    return folder


def write_file(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(list(rows))
    match path.suffix:
        case ".parquet":
            pa.parquet.write_table(table, path)
        case ".csv":
            pa.csv.write_csv(table, path)
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def all_rows(count: int) -> list[dict[str, Any]]:
    return [{"n": n, "topic": f"{n * 7919 % 100_003} and so on"} for n in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "in", "jsonl", all_rows(ROWS))


@pytest.fixture(scope="module")
def expected(source: Path, servers: Servers) -> list[str]:
    """The lines of a job with one file."""
    whole, output = source.with_name("whole.jsonl"), source.with_name("answers.jsonl")
    write_file(whole, all_rows(ROWS))
    with VllmUnified({"endpoints": servers.urls}) as client:
        run(client, whole, output, columns=COLUMNS)
    return output.read_text().splitlines()


@pytest.fixture
def command(servers: Servers, address: str, source: Path, tmp_path: Path) -> list[str]:
    """A job on the command line."""
    config = tmp_path / "fleet.toml"
    lines = [f'[endpoints.s{n}]\nurl = "{url}"\n' for n, url in enumerate(servers.urls)]
    config.write_text("".join(lines))
    command = [*jobs.COMMAND, "batch", str(source), str(tmp_path / "out"), *jobs.ASK]
    return [*command, "-c", str(config), "--ray", address, "--model", "sim"]


def run(vllm: VllmUnified, source: Path, output: Path, **options: Any) -> Any:
    options = {"prompt": PROMPT, "max_tokens": 6, "model": "sim", **options}
    return vllm.run_batch(source, output, **options)


def lines(output: Path) -> list[str]:
    """Of all parts, in the order of the input."""
    found = [line for part in output.iterdir() for line in part.read_text().splitlines()]
    return sorted(found, key=lambda line: int(json.loads(line)["index"]))


def asked(servers: Servers) -> float:
    """Prompts that the servers have answered, when they have nothing more to do."""
    until(lambda: not any(gauge(url, "vllm:num_requests_running") for url in servers.urls), 60)
    return sum(gauge(url, "vllm:request_success_total") for url in servers.urls)


def at_row(number: int, do: Callable[[], object]) -> Callable[[BatchProgress], None]:
    """Do this once, when so many rows are answered."""
    done: list[object] = []

    def look(progress: BatchProgress) -> None:
        if progress.rows >= number and not done:
            done.append(do())

    return look


def test_the_rows_are_those_of_a_job_with_one_file(
    vllm: VllmUnified, address: str, source: Path, expected: list[str], tmp_path: Path
) -> None:
    told: list[BatchProgress] = []
    summary = run(vllm, source, tmp_path / "out", ray=address, on_progress=told.append)
    assert (summary.rows, summary.failed, summary.resumed) == (ROWS, 0, 0)
    assert lines(tmp_path / "out") == expected
    assert told[-1].rows == told[-1].total == ROWS


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_formats(
    vllm: VllmUnified, address: str, expected: list[str], tmp_path: Path, suffix: str
) -> None:
    source = write(tmp_path / "in", suffix, all_rows(200))
    run(vllm, source, tmp_path / "out", ray=address)
    read = pa.csv.read_csv if suffix == "csv" else pa.parquet.read_table
    table = pa.concat_tables([read(part) for part in (tmp_path / "out").iterdir()])
    rows = table.sort_by("index").to_pylist()
    wanted = [json.loads(line) for line in expected[:200]]
    for name in ("index", "n", "topic", "text"):
        assert [row[name] for row in rows] == [row[name] for row in wanted]


@pytest.mark.thorough
def test_parquet_keeps_its_types(vllm: VllmUnified, address: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({"n": pa.array([1, 2], pa.int8()), "topic": ["a", "b"]})
    table = table.append_column("at", pa.array([0, 1], pa.timestamp("ms")))
    pa.parquet.write_table(table, tmp_path / "in" / "a.parquet")
    run(vllm, tmp_path / "in", tmp_path / "out", ray=address)
    [part] = (tmp_path / "out").iterdir()
    found = pa.parquet.read_table(part)
    assert found.select(["n", "topic", "at"]).equals(table)


def test_a_worker_that_is_killed_loses_nothing(
    vllm: VllmUnified, address: str, source: Path, expected: list[str], tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill() -> None:
        victim = processes(ASKER)[0]
        killed.append(victim.pid)
        victim.kill()

    on_progress = at_row(200, kill)
    summary = run(vllm, source, tmp_path / "out", ray=address, on_progress=on_progress)
    assert killed
    assert (summary.rows, summary.failed) == (ROWS, 0)
    assert lines(tmp_path / "out") == expected


def test_a_job_that_is_killed_asks_only_what_is_missing(
    command: list[str], servers: Servers, expected: list[str], tmp_path: Path
) -> None:
    parts = tmp_path / "out.ledger" / "done"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until(lambda: parts.exists() and len(whole(parts)) >= 5, 120)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    until(lambda: not processes(ASKER), 60)
    done = sum(len(pa.parquet.read_table(part)) for part in whole(parts))
    before = asked(servers)
    rest = jobs.run(command)
    assert rest.returncode == 0, rest.stderr
    assert 0 < done < ROWS
    assert asked(servers) - before == ROWS - done
    assert lines(tmp_path / "out") == expected


def whole(parts: Path) -> list[Path]:
    return [part for part in parts.iterdir() if ".pending." not in part.name]


@pytest.mark.thorough
def test_ctrl_c_ends_it_and_says_how_to_go_on(
    command: list[str], expected: list[str], tmp_path: Path
) -> None:
    parts = tmp_path / "out.ledger" / "done"
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: parts.exists() and len(whole(parts)) >= 3, 120)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert f"They are in {tmp_path}/out.ledger" in said
    assert "Traceback" not in said
    until(lambda: not processes(ASKER), 60)
    assert jobs.run(command).returncode == 0
    assert lines(tmp_path / "out") == expected


def test_rows_without_an_answer_are_there_and_asked_again(
    vllm: VllmUnified, servers: Servers, address: str, tmp_path: Path
) -> None:
    rows = all_rows(400)
    source = write(tmp_path / "in", "jsonl", rows)
    with (source / "1.jsonl").open("a") as file:
        file.write("this is no JSON\n")
        file.write(json.dumps({"n": 0, "topic": "long " * 20_000}) + "\n")
    summary = run(vllm, source, tmp_path / "out", ray=address)
    assert (summary.rows, summary.failed, summary.unasked) == (402, 2, 1)
    found = [json.loads(line) for line in lines(tmp_path / "out")]
    assert [row["index"] for row in found] == list(range(402))
    errors = {row["index"]: row["error"] for row in found if row["error"]}
    assert list(errors) == [200, 201]
    assert "not JSON" in errors[200]
    before = asked(servers)
    again = run(vllm, source, tmp_path / "out", ray=address)
    assert (again.rows, again.failed, again.resumed) == (402, 2, 402)
    again = run(vllm, source, tmp_path / "out", ray=address, retry_failed=True)
    assert (again.rows, again.failed, again.resumed) == (402, 2, 400)
    assert asked(servers) == before
    assert [json.loads(line) for line in lines(tmp_path / "out")] == found


@pytest.mark.thorough
def test_another_job_is_refused(vllm: VllmUnified, address: str, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in", "jsonl", all_rows(40)), tmp_path / "out"
    run(vllm, source, output, ray=address)
    with pytest.raises(ConfigurationError, match="max_tokens was 6 and is 7"):
        run(vllm, source, output, ray=address, max_tokens=7)
    write_file(source / "2.jsonl", all_rows(41))
    with pytest.raises(
        ConfigurationError, match=r"input has changed .* 2\.jsonl in .* has changed"
    ):
        run(vllm, source, output, ray=address)
    summary = run(vllm, source, output, ray=address, overwrite=True)
    assert (summary.rows, summary.resumed) == (71, 0)
    with pytest.raises(ConfigurationError, match="nothing"):
        run(vllm, source, output, ray=address, overwrite=True, prompt="{nothing}")
    assert len(lines(output)) == 71


@pytest.mark.thorough
def test_servers_that_are_gone_end_it(
    address: str, servers: Servers, nobody: str, tmp_path: Path
) -> None:
    source, output = write(tmp_path / "in", "jsonl", all_rows(40)), tmp_path / "out"
    with (
        VllmUnified(api_url=f"http://{nobody}") as client,
        pytest.raises(JobStoppedError, match="stopped after 0 of 40 rows") as raised,
    ):
        run(client, source, output, ray=address, patience=0.1)
    assert raised.value.is_transient_error
    with VllmUnified(api_url=servers.urls[0]) as client:
        assert run(client, source, output, ray=address).answered == 40


@pytest.mark.thorough
def test_rows_that_kill_workers_end_it(
    vllm: VllmUnified, servers: Servers, address: str, source: Path, tmp_path: Path
) -> None:
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.05):
            if any(gauge(url, "vllm:num_requests_running") for url in servers.urls):
                for asker in processes(ASKER):
                    asker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(JobStoppedError, match="none of them had a row answered"):
            run(vllm, source, tmp_path / "out", ray=address, ray_workers=1)
    finally:
        ended.set()
        killer.join()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": "nowhere://folder"}, "no folder"),
        ({"model": None}, "which model"),
        ({"strict": True}, "strict is for jobs with files"),
        ({"output": "in/out"}, "within the input"),
        ({"ray": None}, "take a Ray cluster"),
        ({"prompt": "{nothing}"}, "nothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused(
    vllm: VllmUnified, address: str, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    source = write(tmp_path / "in", "jsonl", all_rows(8))
    told = {"input": str(source), "output": "out", "ray": address, **change}
    with pytest.raises(ConfigurationError, match=words):
        run(vllm, told.pop("input"), tmp_path / told.pop("output"), **told)
    assert os.listdir(tmp_path) == ["in"]
    assert len(os.listdir(source)) == FILES


def test_files_of_others_are_not_mixed_with_parts(
    vllm: VllmUnified, address: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "in", "jsonl", all_rows(8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="has files in it"):
        run(vllm, source, tmp_path / "out", ray=address)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.thorough
def test_a_cluster_made_for_it(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a program of its own: this one may have a cluster already."""
    source = write(tmp_path / "in", "jsonl", all_rows(40))
    monkeypatch.chdir(tmp_path)  # the actors have another working directory
    command = [*jobs.COMMAND, "batch", source.name, "out/", *jobs.ASK]
    command += ["--url", servers.urls[0], "--ray", "local", "--model", "sim"]
    done = jobs.run(command)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "out")) == 40
