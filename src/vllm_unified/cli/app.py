"""The commands together."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vllm_unified.cli.commands import Commands
from vllm_unified.version import __version__

app = typer.Typer(
    name="vllm-unified",
    cls=Commands,
    help="One client for every vLLM server that you run, and the hand that runs them.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no server reached, 130 interrupted. "
    "A key is taken from VLLM_API_KEY only, so that no process list shows it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-unified {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """One client for every vLLM server that you run, and the hand that runs them."""


def run() -> None:
    """Run the command line of this process. Typer ends it for Ctrl-C and for a closed pipe."""
    try:
        app(prog_name="vllm-unified")
    except Exception as error:
        from vllm_unified.cli.endings import ending  # it takes what help and --version do without

        code = ending(error)
        if code is None:
            raise
        sys.exit(code)
