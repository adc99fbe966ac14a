"""``vllm-unified logs``"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from vllm_unified.cli.stop import Where
from vllm_unified.errors import NoSuchServerError
from vllm_unified.servers import RunningServer, find_server, running_servers
from vllm_unified.servers.logs import tail

_POLL = 0.2


def logs(
    where: Where = None,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, max=10_000, help="How many of the last lines.")
    ] = 100,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the server ends, or Ctrl-C.")
    ] = False,
) -> None:
    """What the vLLM of a server writes."""
    server = find_server(where)
    log = Path(server.log_path)
    try:
        size = log.stat().st_size
    except OSError as error:
        raise NoSuchServerError(f"cannot read {log}: {error.strerror}") from error
    if text := tail(log, lines):
        _write(f"{text}\n".encode())
    if follow:
        _follow(server, log, size)


def _follow(server: RunningServer, log: Path, position: int) -> None:
    running = True
    while running:
        running = any(server.fingerprint == other.fingerprint for other in running_servers())
        with log.open("rb") as file:
            if file.seek(0, 2) < position:
                position = 0  # it was cut
            file.seek(position)
            new = file.read()
        position += len(new)
        _write(new)
        if running:
            time.sleep(_POLL)


def _write(text: bytes) -> None:
    sys.stdout.write(text.decode("utf-8", "replace"))
    sys.stdout.flush()
