"""Files of OpenAI's batch format, in and out, as ``vllm run-batch`` has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_unified import AsyncVllmUnified
from vllm_unified.batch.files.openai_lines import openai_item
from vllm_unified.errors import BadRequestError, ConfigurationError
from vllm_unified.simulator import BackgroundSimulator

CHAT = {
    "custom_id": "one",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {
        "model": "sim",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_completion_tokens": 5,
    },
}
COMPLETION = {
    "custom_id": "two",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"model": "sim", "prompt": "Once", "max_tokens": 3, "n": 2},
}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


async def run(
    simulator: BackgroundSimulator, source: Path, output: Path, **options: Any
) -> list[Any]:
    async with AsyncVllmUnified(api_url=simulator.url) as vllm:
        await vllm.run_batch(source, output, **options)
    return lines(output)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


async def test_each_line_is_answered_with_what_the_server_said(
    vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", CHAT, COMPLETION)
    chat, completion = await run(vllm_simulator, source, tmp_path / "out.jsonl")
    assert chat.keys() == {"id", "custom_id", "response", "error"}
    assert (chat["custom_id"], completion["custom_id"]) == ("one", "two")
    assert chat["error"] is None
    assert chat["response"]["status_code"] == 200
    assert chat["response"]["body"]["object"] == "chat.completion"
    assert chat["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert chat["response"]["body"]["usage"]["completion_tokens"] <= 5
    assert completion["response"]["body"]["object"] == "text_completion"
    assert len(completion["response"]["body"]["choices"]) == 2
    by_path = {request.path: request.json for request in vllm_simulator.requests}
    assert by_path["/v1/chat/completions"] == CHAT["body"]
    assert by_path["/v1/completions"] == COMPLETION["body"]


@pytest.mark.vllm_simulator(tasks=("embed",), embedding_size=8)
async def test_lines_that_ask_for_embeddings(
    vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    lines = [
        {"custom_id": "e", "url": "/v1/embeddings", "body": {"model": "sim", "input": text}}
        for text in ("a", ["a", "b"])
    ]
    source = write(tmp_path / "in.jsonl", *lines)
    one, two = await run(vllm_simulator, source, tmp_path / "out.jsonl")
    assert [len(each["embedding"]) for each in one["response"]["body"]["data"]] == [8]
    assert len(two["response"]["body"]["data"]) == 2
    rows = await run(
        vllm_simulator,
        source,
        tmp_path / "rows.jsonl",
        output_format="jsonl",
        columns=["embedding", "error"],
        keep=[],
    )
    assert rows[0]["embedding"] == one["response"]["body"]["data"][0]["embedding"]


async def test_a_line_that_fails_has_the_error_in_vllms_shape(
    vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    own = {"model": "nope", **{k: v for k, v in CHAT["body"].items() if k != "model"}}  # type: ignore[attr-defined]
    lines = [
        {**CHAT, "body": own},
        {**CHAT, "url": "/v1/audio/transcriptions"},
        {**CHAT, "method": "GET"},
        {**CHAT, "body": {**CHAT["body"], "stream": True}},  # type: ignore[dict-item]
        CHAT,
    ]
    found = await run(vllm_simulator, write(tmp_path / "i.jsonl", *lines), tmp_path / "o.jsonl")
    assert [line["custom_id"] for line in found] == ["one"] * 5
    assert [line["response"]["status_code"] for line in found] == [404, 400, 400, 400, 200]
    assert "`nope` does not exist" in found[0]["error"]["error"]["message"]
    assert "/v1/embeddings" in found[1]["error"]["error"]["message"]
    assert all(line["response"]["body"] is None for line in found[:4])


async def test_plain_rows_can_become_such_lines(
    vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    source = tmp_path / "in.csv"
    source.write_text("prompt\na\nb\n")
    found = await run(vllm_simulator, source, tmp_path / "out.jsonl", output_format="openai")
    assert [line["custom_id"] for line in found] == ["row-0", "row-1"]


async def test_such_lines_can_become_rows(
    vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", CHAT, COMPLETION)
    found = await run(
        vllm_simulator,
        source,
        tmp_path / "out.jsonl",
        output_format="jsonl",
        keep=["custom_id"],
        columns=["text", "texts"],
    )
    assert [list(row) for row in found] == [["custom_id", "text", "texts"]] * 2
    assert len(found[1]["texts"]) == 2


async def test_a_template_has_no_place_beside_such_lines(
    vllm_simulator: BackgroundSimulator, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", CHAT)
    with pytest.raises(ConfigurationError, match="say themselves"):
        await run(vllm_simulator, source, tmp_path / "out.jsonl", prompt="a")
    found = await run(
        vllm_simulator, source, tmp_path / "o.jsonl", prompt="{custom_id}", input_format="jsonl"
    )
    assert found[0]["url"] == CHAT["url"]


@pytest.mark.parametrize(
    "line",
    [
        {**CHAT, "custom_id": None},
        {**CHAT, "url": None},
        {**CHAT, "body": "x"},
        {**CHAT, "url": "/v1/completions"},
        {**COMPLETION, "url": "/v1/embeddings"},
        {**CHAT, "url": "/v1/embeddings", "body": {"input": "a", "encoding_format": "base64"}},
    ],
)
def test_what_is_no_such_line(line: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError):
        openai_item(line)
