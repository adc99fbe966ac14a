"""The fake engine, with answers that depend on the model's folder, as weights would have it.

``fake.json`` in the folder has ``mode`` (``fail``: exit 1 with an engine's words; ``mute``: a
server that generates nothing), ``logprob`` (of every token of a prompt), ``delay`` (seconds before
it listens). A prompt that begins with ``slow`` takes half a second.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

# Servers run with PYTHONSAFEPATH.
sys.path.insert(0, str(Path(__file__).parent))

import fake_engine  # type: ignore[import-not-found]

folder = Path(sys.argv[sys.argv.index("--model") + 1])
nature: dict[str, Any] = {}
if (folder / "fake.json").exists():
    nature = json.loads((folder / "fake.json").read_text())


class Handler(fake_engine.Handler):  # type: ignore[misc]
    def do_POST(self) -> None:
        if self.path != "/v1/completions":
            super().do_POST()
            return
        fake_engine.running += 1
        try:
            length = int(self.headers["Content-Length"])
            self.complete(json.loads(self.rfile.read(length)))
        finally:
            fake_engine.running -= 1

    def complete(self, asked: dict[str, Any]) -> None:
        prompt = str(asked["prompt"])
        if nature.get("mode") == "mute" and asked.get("prompt_logprobs"):
            self.answer(500, {"error": {"message": "no kernel for this shape", "code": 500}})
            return
        if prompt.startswith("slow"):
            time.sleep(0.5)
        count = asked.get("max_tokens", 1)
        choice = {"index": 0, "text": " 2" * count, "finish_reason": "length"}
        if asked.get("prompt_logprobs"):
            choice["prompt_logprobs"] = [None, *(self.position(letter) for letter in prompt[1:9])]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count, "total_tokens": 0}
        self.answer(
            200,
            {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 1,
                "model": str(folder),
                "choices": [choice],
                "usage": usage,
            },
        )

    def position(self, letter: str) -> dict[str, dict[str, Any]]:
        return {str(ord(letter)): {"logprob": nature.get("logprob", -1.0), "rank": 1}}


if __name__ == "__main__":
    if nature.get("mode") == "fail":
        fake_engine.starts()
        print("(EngineCore pid=2) ERROR 11-22 15:30:41 [core.py:1] ValueError: no such kernel")
        sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
    time.sleep(nature.get("delay", 0))
    fake_engine.Handler = Handler
    fake_engine.main()
