"""The ledger: what is in it stays, and it is held by one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_unified.batch.jobs.ledger import Counts, Entry, Ledger, Outcome
from vllm_unified.errors import BatchFileError, ConfigurationError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl.ledger"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    found = Ledger(path)
    yield found
    found.close()


def entry(position: int, outcome: Outcome = Outcome.ANSWERED, size: int = 2) -> Entry:
    return Entry(position, bytes([position % 256]) * 8, outcome, b"{" + b" " * size + b"}")


def test_what_was_recorded_is_there_for_the_next(path: Path, ledger: Ledger) -> None:
    entries = [entry(3), entry(0), entry(1, Outcome.FAILED)]
    ledger.record(entries, Counts(rows=3, failed=1, completion_tokens=9), written=7)
    ledger.close()
    again = Ledger(path)
    assert list(again.entries()) == sorted(entries, key=lambda each: each.position)
    assert list(again.entries(2)) == [entry(3)]
    assert [each.position for each in again.entries(failed_only=True)] == [1]
    assert again.counts == Counts(rows=3, failed=1, completion_tokens=9)
    assert again.read("written", int) == 7
    assert again.last() == 3
    assert again.done(0, 2) == {0: bytes(8), 1: bytes([1]) * 8}
    again.close()


def test_many_entries_come_page_by_page(ledger: Ledger) -> None:
    entries = [entry(position) for position in range(5001)]
    ledger.record(entries, Counts(rows=5001))
    assert list(ledger.entries()) == entries


def test_a_second_job_is_turned_away(path: Path, ledger: Ledger) -> None:
    with pytest.raises(ConfigurationError, match="another job is at work"):
        Ledger(path)
    ledger.record([entry(0)], Counts(rows=1))
    ledger.close()
    Ledger(path).close()


def test_a_transaction_that_fails_leaves_nothing(ledger: Ledger) -> None:
    ledger.record([entry(0)], Counts(rows=1))
    with pytest.raises(BatchFileError):
        ledger.record([entry(1), entry(0)], Counts(rows=3))
    assert list(ledger.entries()) == [entry(0)]
    assert ledger.counts == Counts(rows=1)
    ledger.record([entry(1)], Counts(rows=2))


def test_a_full_disk_is_told_and_costs_only_what_did_not_fit(path: Path, ledger: Ledger) -> None:
    ledger._file.execute("PRAGMA max_page_count = 20")
    positions = iter(range(100))

    def fill() -> None:
        for position in positions:
            ledger.record([entry(position, size=2000)], Counts(rows=position + 1))

    with pytest.raises(BatchFileError, match="the disk is full") as raised:
        fill()
    assert str(path) in str(raised.value)
    rows = ledger.counts.rows
    assert 0 < rows < 100
    assert [each.position for each in ledger.entries()] == list(range(rows))


def test_failed_rows_can_be_forgotten(ledger: Ledger) -> None:
    entries = [entry(0), entry(1, Outcome.FAILED), entry(2, Outcome.UNASKED)]
    ledger.record(entries, Counts(rows=3, failed=2, unasked=1), finished=True)
    ledger.forget_failed()
    assert list(ledger.entries()) == [entry(0)]
    assert ledger.counts == Counts(rows=1)
    assert ledger.read("finished") is None


def test_it_shrinks_when_its_rows_are_in_the_output(path: Path, ledger: Ledger) -> None:
    ledger.record([entry(each, size=1000) for each in range(2000)], Counts(rows=2000), job={"a": 1})
    ledger.shrink()
    ledger.close()
    assert path.stat().st_size < 50_000
    again = Ledger(path)
    assert again.read("job") == {"a": 1}
    assert again.counts.rows == 2000
    again.close()


def test_a_file_that_is_something_else_is_left_alone(path: Path) -> None:
    path.write_text("my notes, " * 100)
    with pytest.raises(ConfigurationError, match="no ledger"):
        Ledger(path)
    assert path.read_text() == "my notes, " * 100


def test_another_programs_database_is_left_alone(path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE mine (a)")
    other.close()
    with pytest.raises(ConfigurationError, match="not a ledger"):
        Ledger(path)
