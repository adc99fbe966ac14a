"""``vllm-unified batch``"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import msgspec
import typer

from vllm_unified.batch.files.formats import FORMATS
from vllm_unified.batch.jobs.columns import COLUMNS
from vllm_unified.cli.batch_progress import Display, display, rows_of, summary_lines
from vllm_unified.cli.generate import Param, Temperature, parameters
from vllm_unified.cli.target import Config, Model, Url, target
from vllm_unified.cli.terminal import err, print_json
from vllm_unified.errors import BadRequestError, ConfigurationError

_INTERRUPTED = 130
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
_ROWS, _ANSWERS, _JOB = "Rows", "Answers", "Job"


def batch(
    context: typer.Context,
    input: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="A file of rows: .jsonl, .csv, .tsv, .parquet, OpenAI's batch format; .gz and "
            ".zst after it. '-' is standard input. With --ray also a folder of such files, or its "
            "address.",
        ),
    ],
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="The same rows with their answers; '-' prints.")
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            help=r"A template over the columns: 'Q: {question}\nA:'. Without it, the column "
            "'messages' or 'prompt' is asked.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help="A template for the system message.", rich_help_panel=_ROWS),
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Has the messages.", rich_help_panel=_ROWS),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Send the prompt as a user's message.", rich_help_panel=_ROWS),
    ] = False,
    params_column: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Has parameters of the row's own.", rich_help_panel=_ROWS
        ),
    ] = None,
    input_format: Annotated[
        str | None,
        typer.Option(metavar="|".join(FORMATS), help="Of IN.", rich_help_panel=_ROWS),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Send nothing if a row is broken.", rich_help_panel=_ROWS),
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "-n", min=1, help="Tokens at most, of each answer."),
    ] = None,
    temperature: Temperature = None,
    param: Param = None,
    schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A JSON schema that each answer has to fit; it comes in the column 'parsed'.",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help=f"Of the answers, with commas: {', '.join(COLUMNS)}. text=reply renames.",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Columns of IN that OUT has, with commas; 'none'. By default all.",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    output_format: Annotated[
        str | None,
        typer.Option(metavar="|".join(FORMATS), help="Of OUT.", rich_help_panel=_ANSWERS),
    ] = None,
    unordered: Annotated[
        bool,
        typer.Option(
            "--unordered", help="Write rows as they are answered.", rich_help_panel=_ANSWERS
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", help="Ask again the rows without an answer.", rich_help_panel=_JOB
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Begin anew; drop what is done.", rich_help_panel=_JOB),
    ] = False,
    ledger: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Knows what is done; by default OUT.ledger.", rich_help_panel=_JOB
        ),
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Seconds without any success before it ends; by default 60, and 10 before the "
            "first one.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Ask from workers on a Ray cluster: 'auto', 'local' or HOST:PORT.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    ray_workers: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many.", rich_help_panel=_JOB)
    ] = 2,
    json: Annotated[
        bool, typer.Option("--json", help="Print a summary as JSON.", rich_help_panel=_JOB)
    ] = False,
    url: Url = None,
    config: Config = None,
    model: Model = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for each row; by default 300.")
    ] = None,
) -> None:
    """Answer every row of a file.

    Whatever ends it (Ctrl-C, a crash, a full disk, servers that are gone): the same command goes on
    where it stopped. The exit code is 1 if rows have no answer.
    """
    if json and output == "-":
        raise ConfigurationError("--json prints the summary where OUT prints the rows")
    servers = target(context, url, config)
    params = parameters(param, max_tokens=max_tokens, temperature=temperature)
    with servers.connect(model, timeout) as vllm, display() as show, _interrupts(show):
        try:
            summary = vllm.run_batch(
                input,
                output,
                params,
                prompt=_unescaped(prompt),
                system=_unescaped(system),
                messages=messages,
                chat=chat,
                params_column=params_column,
                response_model=None if schema is None else _read_schema(schema),
                columns=None if columns is None else _names(columns),
                keep=None if keep is None else [] if keep == "none" else _names(keep),
                input_format=input_format,
                output_format=output_format,
                unordered=unordered,
                retry_failed=retry_failed,
                overwrite=overwrite,
                strict=strict,
                ledger=ledger,
                patience=patience,
                ray=ray,
                ray_workers=ray_workers,
                on_progress=show,
            )
        except KeyboardInterrupt:
            show.close()
            kept = ledger or (f"{output.rstrip('/')}.ledger" if output != "-" else None)
            err.print(f"Stopped after {rows_of(show.last)}. {_how_to_go_on(kept)}", markup=False)
            raise typer.Exit(_INTERRUPTED) from None
    if json:
        print_json(summary)
    for line in summary_lines(summary):
        err.print(line, markup=False)
    raise typer.Exit(1 if summary.failed else 0)


def _how_to_go_on(ledger: object) -> str:
    if ledger is None:
        return "Nothing of it is kept: standard output has a ledger only with --ledger."
    return f"They are in {ledger}, and the same command goes on after them."


@contextmanager
def _interrupts(show: Display) -> Iterator[None]:
    """The first Ctrl-C lets what is done be written; a second one ends the program at once."""
    pressed = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            show.close()
            os._exit(_INTERRUPTED)
        pressed = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _unescaped(text: str | None) -> str | None:
    r"""A shell has no easy way to type ``\n``."""
    if text is None:
        return None
    return re.sub(r"\\([nt\\])", lambda found: _ESCAPES[found[1]], text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _read_schema(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ConfigurationError(f"--schema cannot be read: {error}") from None
    except msgspec.DecodeError as error:
        raise BadRequestError(f"{path} is no JSON schema: {error}") from None
