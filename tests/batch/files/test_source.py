"""Reading rows of every format, whole and broken."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_unified.batch.files.compression import compressed
from vllm_unified.batch.files.formats import place_of
from vllm_unified.batch.files.source import Source
from vllm_unified.errors import ConfigurationError


def source(path: Path | str, format: str | None = None, **more: Any) -> Source:
    return Source(place_of(str(path), format, "input"), **more)


def read(path: Path, content: bytes) -> list[tuple[int, int, dict[str, Any] | None, str | None]]:
    path.write_bytes(content)
    return [(row.position, row.line, row.fields, row.problem) for row in source(path).rows()]


def test_json_lines_are_counted_as_the_file_has_them(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n  {"a": "\xe2\x80\xa8"}\n{"b":{}}'
    assert read(tmp_path / "x.jsonl", content) == [
        (0, 1, {"a": 1}, None),
        (1, 3, {"a": "\u2028"}, None),
        (2, 4, {"b": {}}, None),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [(b"{", "is not JSON"), (b"[1]", "no object"), (b'{"a": "\xff"}', "not JSON")],
)
def test_a_broken_line_is_a_row_with_its_number(tmp_path: Path, line: bytes, problem: str) -> None:
    found = read(tmp_path / "x.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert [position for position, *_ in found] == [0, 1, 2]
    assert found[1][2] is None
    assert "line 2" in str(found[1][3])
    assert problem in str(found[1][3])
    assert found[2][2] == {"a": 2}


def test_a_json_array_is_told_from_lines(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="one JSON array"):
        read(tmp_path / "x.json", b'[{"a": 1},\n{"a": 2}]')


def test_csv_with_all_its_corners(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbfid,text\r\n1,"a ""b"", c\nd"\r\n\r\n2,\xc3\xa9\r\n3\r\n4,\xff\r\n5,x\r\n'
    )
    assert read(tmp_path / "x.csv", content) == [
        (0, 3, {"id": "1", "text": 'a "b", c\nd'}, None),
        (1, 5, {"id": "2", "text": "é"}, None),
        (2, 6, None, "line 6 has 1 fields, and the header 2"),
        (3, 7, None, "line 7 is not UTF-8"),
        (4, 8, {"id": "5", "text": "x"}, None),
    ]


def test_a_csv_field_may_be_as_long_as_a_prompt(tmp_path: Path) -> None:
    long = b"x" * 300_000
    assert read(tmp_path / "x.tsv", b"text\tn\n" + long + b"\t1\n")[0][2] == {
        "text": long.decode(),
        "n": "1",
    }


@pytest.mark.parametrize(("content", "says"), [(b"", "empty"), (b"a,b,a\n", "'a' twice")])
def test_a_header_that_cannot_be_used(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        read(tmp_path / "x.csv", content)


def test_parquet_keeps_types(tmp_path: Path) -> None:
    table = pa.table({"n": pa.array([1, None], pa.int32()), "l": [[{"a": "b"}], []]})
    pq.write_table(table, tmp_path / "x.parquet")
    found = source(tmp_path / "x.parquet")
    assert found.count == 2
    assert found.columns == ("n", "l")
    assert found.schema == table.schema
    assert [row.fields for row in found.rows()] == table.to_pylist()


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_of_several_parts(tmp_path: Path, suffix: Any) -> None:
    content = compressed(b'{"a": 1}\n', suffix) + compressed(b'{"a": 2}\n', suffix)
    assert [fields for *_, fields, _ in read(tmp_path / f"x.jsonl.{suffix}", content)] == [
        {"a": 1},
        {"a": 2},
    ]


def test_compressed_data_that_is_cut_off(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        read(tmp_path / "x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000)[:-12])


def test_standard_input_is_json_lines() -> None:
    found = source("-", stdin=io.BytesIO(b'{"a": 1}\n'))
    assert not found.rereadable
    assert [row.fields for row in found.rows()] == [{"a": 1}]


@pytest.mark.parametrize("name", ["x.txt", "x", "x.gz", "x.parquet.gz"])
def test_a_name_that_says_no_format(name: str) -> None:
    with pytest.raises(ConfigurationError):
        place_of(name, None, "input")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        source(tmp_path / "nope.csv")


def test_no_parquet_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR0")
    with pytest.raises(ConfigurationError, match="cannot read"):
        source(tmp_path / "x.parquet")


def test_it_says_how_much_it_has_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n' * 10)
    found = source(tmp_path / "x.jsonl")
    rows = found.rows()
    for _ in range(5):
        next(rows)
    assert found.fraction == 0.5


def test_its_identity_is_that_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n')
    first = source(tmp_path / "x.jsonl").identity()
    (tmp_path / "y.jsonl").write_bytes(b'{"a": 1}\n')
    assert source(tmp_path / "y.jsonl").identity() == first
    (tmp_path / "y.jsonl").write_bytes(b'{"a": 2}\n')
    assert source(tmp_path / "y.jsonl").identity() != first
