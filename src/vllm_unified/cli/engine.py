"""``vllm-unified engine list|install|remove``"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from vllm_unified.cli.generate import AsJson
from vllm_unified.cli.terminal import err, out, print_json, print_table, progress_lines
from vllm_unified.servers import VLLM_VERSION, install_engine, list_engines, remove_engine

app = typer.Typer(
    help="The vLLM installs that servers run on.", no_args_is_help=True, add_completion=False
)


class Kind(StrEnum):
    """What an engine computes on."""

    cpu = "cpu"
    cuda = "cuda"


@app.command("list")
def list_(json: AsJson = False) -> None:
    """Every vLLM on this machine: those installed here, and those found."""
    engines = list_engines()
    if json:
        print_json(engines)
        return
    if not engines:
        err.print("No vLLM here. `vllm-unified engine install` installs one.")
        return
    rows = (
        (engine.name, engine.version, engine.kind, engine.origin, engine.path) for engine in engines
    )
    print_table(("name", "vllm", "for", "origin", "path"), *rows)


@app.command()
def install(
    kind: Annotated[
        Kind | None, typer.Argument(help="Default: cuda where there is an NVIDIA GPU, else cpu.")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", help=f"vLLM's version; default {VLLM_VERSION}.")
    ] = None,
) -> None:
    """Install a vLLM into an environment of its own, in the user's cache."""
    with progress_lines() as say:
        engine = install_engine(kind.value if kind else None, version=version, progress=say)
    out.print(f"{engine.name} is installed in {engine.path}", markup=False)


@app.command()
def remove(name: Annotated[str, typer.Argument(help="As `engine list` shows it.")]) -> None:
    """Remove an installed vLLM."""
    remove_engine(name)
    out.print(f"{name} is removed", markup=False)
