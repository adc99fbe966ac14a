"""Problems of GSM8K, answered by ``vllm-unified batch`` on a real vLLM: how many right, how fast.

    python -m benchmarks.batch_gsm8k gsm8k_test.jsonl [--rows 1319] [--url http://localhost:8000]

From the repository's root. The file is ``grade_school_math/data/test.jsonl`` of the public
repository openai/grade-school-math. Without --url a server of the bundled model is started.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

from vllm_unified import VllmUnified

COMMAND = (sys.executable, "-c", "from vllm_unified.cli import main; main()")
ASK = ("--prompt", "{question}", "--chat", "-n", "256", "-t", "0", "--timeout", "3600", "--json")


def last_number(text: str) -> str:
    """The number that an answer ends with."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1].replace(",", "") if numbers else ""


def answer(source: Path, rows: int, url: str) -> None:
    """Answer that many problems, and count."""
    with tempfile.TemporaryDirectory() as folder:
        problems, output = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        with source.open() as lines:
            problems.write_text("".join(islice(lines, rows)))
        command = [*COMMAND, "batch", str(problems), str(output), *ASK, "--url", url]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = [json.loads(line) for line in output.read_bytes().splitlines()]
    summary = json.loads(done.stdout)
    right = sum(
        last_number(row["text"]) == row["answer"].rpartition("####")[2].strip().replace(",", "")
        for row in found
    )
    tokens, seconds = summary["completion_tokens"], summary["seconds"]
    print(
        f"{len(found):,} problems in {seconds:.0f} s: {right} right ({right / len(found):.1%}), "
        f"{tokens:,} tokens, {tokens / seconds:.0f} tokens/s, {summary['cut']} cut off"
    )


def main() -> None:
    """With a server."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=1319)
    parser.add_argument("--url")
    options = parser.parse_args()
    if options.url:
        answer(options.file, options.rows, options.url)
        return
    with VllmUnified.local() as vllm:
        answer(options.file, options.rows, vllm.settings.api_url)


if __name__ == "__main__":
    main()
