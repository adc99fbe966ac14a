"""``vllm-unified demo``"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_unified.blocking import VllmUnified
from vllm_unified.cli.target import Url, connect
from vllm_unified.cli.terminal import err, out, progress_lines
from vllm_unified.results import Usage

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class _Problem(msgspec.Struct):
    question: str
    answer: str
    """Worked out; its last line is ``#### <number>``."""


def demo(url: Url = None) -> None:
    """See a real vLLM generate, chat, stream and answer a batch.

    Without --url it starts one on this machine, and installs the engine first if there is none:
    about 3.5 GB and a few minutes, once.
    """
    with _server(url) as vllm:
        _generate(vllm)
        _chat(vllm)
        _stream(vllm)
        _batch(vllm)
        stopping = time.monotonic()
    if url is None:
        out.print(f"\nThe server is stopped ({time.monotonic() - stopping:.1f} s).")
    out.print(
        "\n[bold]What to try next[/bold]\n"
        "  vllm-unified serve       keep a server running (Ctrl-C stops it), and beside it:\n"
        "  vllm-unified chat        talk to it\n"
        "  vllm-unified doctor      see what this machine and its servers can do\n"
        "  and in Python:\n"
        "    from vllm_unified import VllmUnified\n"
        "    with VllmUnified.local() as vllm:   # or VllmUnified(api_url=...)\n"
        "        print(vllm.chat('Tell me about dragons.', max_tokens=100).content)",
        markup=True,
    )


@contextmanager
def _server(url: str | None) -> Iterator[VllmUnified]:
    if url is not None:
        with connect(url, None, 120.0) as vllm:
            yield vllm
        return
    started = time.monotonic()
    with progress_lines() as say:
        vllm = VllmUnified.local(progress=say)
    with vllm:
        server = vllm.server
        assert server is not None
        how = "joined" if server.shared else "started"
        out.print(
            f"vLLM {server.engine.version} ({server.engine.kind}) {how} in "
            f"{time.monotonic() - started:.1f} s: {server.model} at {server.url}"
        )
        yield vllm


def _title(text: str, call: str) -> None:
    out.print(f"\n[bold]{text}[/bold]")
    out.print(f">>> {call}", style="cyan", markup=False)


def _speed(usage: Usage | None, seconds: float, more: str = "") -> None:
    tokens = usage.completion_tokens if usage else 0
    out.print(
        f"[{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s{more}]",
        style="dim",
        markup=False,
    )


def _generate(vllm: VllmUnified) -> None:
    _title(
        "Generate", "vllm.generate('Tell me a short story about dragons', max_tokens=80, ...).text"
    )
    result = vllm.generate(
        "Tell me a short story about dragons",
        max_tokens=80,
        min_tokens=60,
        temperature=0.7,
        seed=7,
    )
    out.print(result.text.strip(), markup=False)
    _speed(result.usage, result.metadata.duration)


def _chat(vllm: VllmUnified) -> None:
    _title("Chat", "vllm.chat([{'role': 'user', 'content': ...}], {'temperature': 0}).content")
    question = "What is the capital of France?"
    result = vllm.chat(
        [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": question},
        ],
        {"temperature": 0, "max_tokens": 60},
    )
    out.print(f"{question}\n{result.content}", markup=False)
    _speed(result.usage, result.metadata.duration)


def _stream(vllm: VllmUnified) -> None:
    _title("Stream", "for chunk in vllm.stream_chat('Tell me about dragons.', max_tokens=80): ...")
    with vllm.stream_chat(
        "Tell me about dragons.", max_tokens=80, temperature=0.7, seed=7
    ) as stream:
        for text in stream.texts():
            sys.stdout.write(text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    metadata = stream.result.metadata
    first = metadata.time_to_first_token or 0.0
    _speed(stream.usage, metadata.duration, f", the first after {first * 1000:.0f} ms")


def _batch(vllm: VllmUnified) -> None:
    _title("Batch", "vllm.batch(questions, max_tokens=160, temperature=0)")
    sample = (files("vllm_unified.cli") / "gsm8k_sample.jsonl").read_bytes()
    problems = msgspec.json.Decoder(_Problem).decode_lines(sample)
    prompts = [[{"role": "user", "content": problem.question}] for problem in problems]
    started = time.monotonic()
    with Progress(
        TextColumn("GSM8K"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err
    ) as bar:
        task = bar.add_task("", total=len(prompts))
        answers = vllm.batch(
            prompts,
            max_tokens=160,
            temperature=0,
            on_progress=lambda done: bar.update(task, completed=done),
        )
    seconds = time.monotonic() - started
    right = 0
    for problem, answer in zip(problems, answers, strict=True):
        wanted, got = problem.answer.rpartition("####")[2].strip(), _last_number(answer)
        right += wanted == got
        out.print(f"{problem.question[:66]}...  {got} (right: {wanted})", markup=False)
    tokens = sum(vllm.tokenize(answer, add_special_tokens=False).count for answer in answers)
    _speed(Usage(completion_tokens=tokens), seconds, f", {len(prompts)} prompts at once")
    out.print(
        f"{right} of {len(problems)} right: at 135 million parameters, this model can talk, "
        "but hardly count."
        if vllm.server
        else f"{right} of {len(problems)} right.",
        style="dim",
    )


def _last_number(text: str) -> str:
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "").rstrip(".") if numbers else "no number"
