"""A job with files that is ended again and again, and what its output is in the end."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tests.resilience.servers import Servers

COMMAND = (sys.executable, "-c", "from vllm_unified.cli import main; main()")
ASK = ("--prompt", r"Question {n}: {topic}\nAnswer:", "-n", "6", "--json")
SECONDS = 300.0
"""That a run has at most."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it."""

    rows: int
    jobs: int
    """Begun anew, because one was finished before it was ended often enough."""
    endings: int
    """Runs that were ended before their end."""
    codes: tuple[int, ...]
    """Exit codes of those, each once."""
    wrong: int
    """Outputs that differ from the uninterrupted one by a byte."""
    seconds: float


def write_rows(path: Path, rows: int) -> Path:
    """An input: every row another one."""
    with path.open("w") as file:
        for n in range(rows):
            file.write(f'{{"n": {n}, "topic": "{n * 7919 % 100_003} and {"so on " * (n % 9)}"}}\n')
    return path


def command(source: Path, output: Path, servers: Sequence[str], *more: str) -> list[str]:
    """The command line of a job."""
    return [*COMMAND, "batch", str(source), str(output), *ASK, "--url", servers[0], *more]


def run(arguments: Sequence[str], *, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """A run to its end; ``limit`` is the size in bytes to which no file may grow."""
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        preexec_fn=None if limit is None else lambda: _limit(limit),
    )


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def whole(folder: Path, servers: Sequence[str], rows: int, *more: str) -> tuple[Path, bytes, float]:
    """The input, the output that nothing interrupted, and the seconds that it took."""
    source = write_rows(folder / "in.jsonl", rows)
    began = time.monotonic()
    done = run(command(source, folder / "whole.jsonl", servers, *more))
    assert done.returncode == 0, done.stderr
    return source, (folder / "whole.jsonl").read_bytes(), time.monotonic() - began


def ended(
    folder: Path,
    servers: Sequence[str],
    *,
    rows: int,
    times: int,
    how: signal.Signals,
    seed: int,
    more: Sequence[str] = (),
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Send a signal at random moments, and go on each time, until it was ended so often."""
    moments = random.Random(seed)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As shells start jobs in the background, and programs would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    source, expected, took = whole(folder, servers, rows, *more)
    endings = jobs = wrong = 0
    codes: set[int] = set()
    while endings < times:
        jobs += 1
        output = folder / f"out{jobs}.jsonl"
        code = None
        while code != 0:
            with subprocess.Popen(
                command(source, output, servers, *more),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            ) as process:
                if endings < times:
                    # From before it has read a row to after it has written the output.
                    wait = moments.uniform(0.0, max(2.0, 3 * took / times))
                    try:
                        process.wait(wait)
                    except subprocess.TimeoutExpired:
                        process.send_signal(how)
                _, complaints = process.communicate(timeout=SECONDS)
            code = process.returncode
            if code != 0:
                # An interrupt while Python itself starts is Python's to tell.
                told = code in (-how, 130) or b"KeyboardInterrupt" in complaints
                assert told, complaints.decode()
                codes.add(code)
                endings += 1
                say(f"{endings} of {times}: ended ({code})")
        wrong += not is_right(output, expected, more)
    return Report(
        rows=rows,
        jobs=jobs,
        endings=endings,
        codes=tuple(sorted(codes)),
        wrong=wrong,
        seconds=time.monotonic() - began,
    )


def disk_full(
    folder: Path,
    servers: Sequence[str],
    *,
    rows: int,
    limits: Sequence[int],
    more: Sequence[str] = (),
) -> tuple[bool, list[str]]:
    """Run where no file may grow beyond a limit, then beyond the next, and at last without one;
    whether the output is right, and the complaints."""
    source, expected, _ = whole(folder, servers, rows, *more)
    output, complaints = folder / "out.jsonl", []
    for limit in limits:
        done = run(command(source, output, servers, *more), limit=limit)
        assert done.returncode == 1, done.stderr
        complaints.append(done.stderr)
    done = run(command(source, output, servers, *more))
    assert done.returncode == 0, done.stderr
    return is_right(output, expected, more), complaints


def is_right(output: Path, expected: bytes, more: Sequence[str]) -> bool:
    """Whether it is the uninterrupted output to the byte; in order of completion, its lines."""
    found = output.read_bytes()
    if "--unordered" in more:
        return sorted(found.splitlines()) == sorted(expected.splitlines())
    return found == expected


def servers_dying(
    folder: Path,
    servers: Servers,
    *,
    rows: int,
    times: int,
    seed: int,
    say: Callable[[str], object] = lambda text: None,
) -> tuple[bool, int]:
    """One job, whose servers die and come back, all at once and one by one, until it is done;
    whether the output is right, and how often a server died."""
    moments = random.Random(seed)
    source, expected, took = whole(folder, servers.urls, rows)
    config = folder / "fleet.toml"
    config.write_text(
        "".join(f'[endpoints.s{n}]\nurl = "{url}"\n' for n, url in enumerate(servers.urls))
    )
    output = folder / "out.jsonl"
    arguments = [*COMMAND, "batch", str(source), str(output), *ASK, "-c", str(config)]
    deaths = 0
    with subprocess.Popen(
        [*arguments, "--patience", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and deaths < times:
            time.sleep(moments.uniform(0.0, 2 * took / times))
            dying = [n for n in range(len(servers.urls)) if moments.random() < 0.7]
            for server in dying:
                servers.tell(server, "kill")
            time.sleep(moments.uniform(0.0, 0.3))
            for server in dying:
                servers.tell(server, "start")
            deaths += len(dying)
            say(f"{deaths} deaths")
        _, complaints = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, complaints.decode()
    return is_right(output, expected, ()), deaths


def on_small_disk(
    folder: Path, servers: Sequence[str], *, rows: int, sizes: Sequence[int]
) -> tuple[bool, list[str]]:
    """The same on a disk of its own that is too small, and grows. Takes the right to mount."""
    source, expected, _ = whole(folder, servers, rows)
    disk, complaints = folder / "disk", []
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sizes[0]}", "none", disk], check=True)
    try:
        for size in sizes:
            subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
            done = run(command(source, disk / "out.jsonl", servers))
            assert done.returncode == 1, done.stderr
            complaints.append(done.stderr)
        subprocess.run(["mount", "-o", f"remount,size={1 << 30}", disk], check=True)
        done = run(command(source, disk / "out.jsonl", servers))
        assert done.returncode == 0, done.stderr
        return (disk / "out.jsonl").read_bytes() == expected, complaints
    finally:
        subprocess.run(["umount", disk], check=True)
