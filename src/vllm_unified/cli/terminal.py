"""What the commands print with."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console

if TYPE_CHECKING:
    from vllm_unified.servers import Progress

out = Console(highlight=False, soft_wrap=True)
"""For results."""
err = Console(stderr=True, highlight=False, soft_wrap=True)
"""For everything else, so that results can be piped."""


def complain(text: str) -> None:
    """Say what went wrong; the first line stands out."""
    first, _, rest = text.partition("\n")
    err.print(first, style="bold red", markup=False)
    if rest:
        err.print(rest, markup=False)


def print_table(*rows: Sequence[str]) -> None:
    """Columns under the titles in the first row; a row is one line, however long."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        line = "  ".join(map(str.ljust, row, widths)).rstrip()
        out.print(line, style="bold" if number == 0 else None, markup=False)


def print_json(value: Any) -> None:
    """One JSON document, for scripts."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")
    sys.stdout.flush()  # at the interpreter's end it is too late to be silent for a closed pipe


@contextmanager
def progress_lines(quiet: bool = False) -> Iterator[Progress]:
    """Shows messages of long work: one line that changes on a terminal, a line each elsewhere."""
    if quiet:
        yield lambda message: None
    elif err.is_terminal:
        with err.status("") as status:
            yield lambda message: status.update(message)
    else:
        yield lambda message: err.print(message, markup=False)
