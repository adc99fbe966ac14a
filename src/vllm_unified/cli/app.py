"""The commands together, and the one place where errors become exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vllm_unified.batch.errors import BatchStoppedError
from vllm_unified.batch.jobs.summary import JobStoppedError
from vllm_unified.cli import (
    batch,
    chat,
    demo,
    doctor,
    endpoints,
    engine,
    generate,
    logs,
    lora,
    models,
    plan,
    ps,
    quantize,
    restart,
    serve,
    simulate,
    stats,
    stop,
)
from vllm_unified.cli.terminal import complain
from vllm_unified.errors import (
    BadRequestError,
    CircuitOpenError,
    ConfigurationError,
    ConnectError,
    NoSuchServerError,
    VllmError,
)
from vllm_unified.version import __version__

app = typer.Typer(
    name="vllm-unified",
    help="One client for every vLLM server that you run, and the hand that runs them.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no server reached, 130 interrupted. "
    "A key is taken from VLLM_API_KEY only, so that no process list shows it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(serve.serve)
app.command()(ps.ps)
app.command()(logs.logs)
app.command()(restart.restart)
app.command()(stop.stop)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(batch.batch)
app.command()(models.models)
app.command()(endpoints.endpoints)
app.command()(stats.stats)
app.command()(quantize.quantize)
app.command()(doctor.doctor)
app.command()(plan.plan)
app.command()(simulate.simulate)
app.add_typer(engine.app, name="engine")
app.add_typer(lora.app, name="lora")


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
    except VllmError as error:
        complain(str(error))
        sys.exit(exit_code(error))


_OUTER = (JobStoppedError, BatchStoppedError, CircuitOpenError)
"""Errors that say less than their cause."""


def exit_code(error: VllmError) -> int:
    """What the command ends with for this error."""
    cause = error.__cause__
    if isinstance(error, _OUTER) and isinstance(cause, VllmError):
        return exit_code(cause)
    if isinstance(error, ConfigurationError | BadRequestError) and error.status_code is None:
        return 2
    return 3 if isinstance(error, ConnectError | NoSuchServerError) else 1
