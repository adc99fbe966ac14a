"""A file of real problems, answered by the command on a real vLLM."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import msgspec
import pytest

from vllm_unified import VllmUnified

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]

COMMAND = (sys.executable, "-c", "from vllm_unified.cli import main; main()")


class Answered(msgspec.Struct):
    """A line of the output."""

    question: str
    answer: str
    text: str
    finish_reason: str
    error: str | None


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Some of GSM8K."""
    path = tmp_path / "gsm8k.jsonl"
    path.write_bytes((files("vllm_unified.cli") / "gsm8k_sample.jsonl").read_bytes())
    return path


def last_number(text: str) -> str:
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1].replace(",", "") if numbers else ""


def test_gsm8k(url: str, problems: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    arguments = ["batch", str(problems), str(output), "--url", url, "--prompt", "{question}"]
    options = ["--chat", "-n", "160", "-t", "0", "--system", "Think, then say the number."]
    done = subprocess.run(
        [*COMMAND, *arguments, *options], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = msgspec.json.Decoder(Answered).decode_lines(output.read_bytes())
    asked = problems.read_bytes().splitlines()
    assert len(rows) == len(asked)
    for row, line in zip(rows, asked, strict=True):
        assert row.question == msgspec.json.decode(line)["question"]
        assert row.error is None
        assert row.text.strip()
    right = sum(last_number(row.text) == row.answer.rpartition("####")[2].strip() for row in rows)
    print(f"{right} of {len(rows)} right")  # a model of 135 million parameters can hardly count


def test_every_answer_fits_its_schema(url: str, tmp_path: Path) -> None:
    source, output = tmp_path / "in.csv", tmp_path / "out.parquet"
    source.write_text("country\nFrance\nItaly\nJapan\n")
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    with VllmUnified(api_url=url) as vllm:
        summary = vllm.run_batch(
            source,
            output,
            prompt="What is the capital of {country}?",
            chat=True,
            response_model=schema,
            temperature=0,
            max_tokens=60,
        )
    assert (summary.rows, summary.failed) == (3, 0)
    from pyarrow import parquet

    rows = parquet.read_table(output).to_pylist()
    assert [row["country"] for row in rows] == ["France", "Italy", "Japan"]
    capitals = [msgspec.json.decode(row["parsed"])["capital"] for row in rows]
    assert "Paris" in capitals[0]
    assert all(isinstance(capital, str) for capital in capitals)


def test_lines_for_vllm_run_batch(url: str, model: str, tmp_path: Path) -> None:
    """The example of vLLM's own documentation."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {
        "model": model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello world!"},
        ],
        "max_completion_tokens": 10,
    }
    lines = [
        {"custom_id": f"request-{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n in (1, 2)
    ]
    source.write_bytes(b"\n".join(map(msgspec.json.encode, lines)))
    with VllmUnified(api_url=url) as vllm:
        summary = vllm.run_batch(source, output)
    assert (summary.rows, summary.failed) == (2, 0)
    for n, line in enumerate(output.read_bytes().splitlines(), 1):
        answer = msgspec.json.decode(line)
        assert answer["custom_id"] == f"request-{n}"
        assert answer["error"] is None
        assert answer["response"]["body"]["object"] == "chat.completion"
        assert answer["response"]["body"]["usage"]["completion_tokens"] <= 10
