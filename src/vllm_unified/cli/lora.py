"""``vllm-unified lora list|load|unload``"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
import typer

from vllm_unified.blocking import VllmUnified
from vllm_unified.cli.generate import AsJson
from vllm_unified.cli.target import Config, Target, Url, target
from vllm_unified.cli.terminal import err, out, print_json, print_table
from vllm_unified.errors import ConfigurationError, ConnectError
from vllm_unified.models.lora.adapters import LoraResult
from vllm_unified.models.lora.placement import Replicas

T = TypeVar("T")

app = typer.Typer(
    help="The LoRA adapters of running servers.", no_args_is_help=True, add_completion=False
)

Name = Annotated[str, typer.Argument(help="The adapter's name in requests.")]
Seconds = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds for all of it.")]


@app.command("list")
def list_(
    context: typer.Context,
    url: Url = None,
    config: Config = None,
    json: AsJson = False,
    timeout: Seconds = 10.0,
) -> None:
    """The adapters, and the servers that have them."""
    servers = target(context, url, config)
    adapters = _ask(servers, lambda vllm: vllm.list_lora_adapters(timeout=timeout))
    if json:
        print_json(adapters)
        return
    if not adapters:
        err.print("No LoRA adapter is loaded.")
        return
    rows = (
        (each.name, each.base_model or "", ", ".join(each.endpoints), each.path)
        for each in adapters
    )
    print_table(("adapter", "base model", "at", "loaded from"), *rows)


@app.command()
def load(
    context: typer.Context,
    name: Name,
    path: Annotated[
        str, typer.Argument(help="A folder where the server runs, or a repository it can reach.")
    ],
    url: Url = None,
    config: Config = None,
    replicas: Annotated[
        str, typer.Option(metavar="N|all", help="How many of a file's servers get it.")
    ] = "all",
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Refuse unless the server serves this model.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Compare its files with the server's model before."
        ),
    ] = True,
    json: AsJson = False,
    timeout: Seconds = 120.0,
) -> None:
    """Load an adapter and prove it by a token; another version of it is replaced.

    Nobody looks after it when this command has ended: a server that is restarted has forgotten it.
    In a program, load_lora_adapter() loads it again.
    """
    servers = target(context, url, config)
    count = _replicas(replicas)
    result = _ask(
        servers,
        lambda vllm: vllm.load_lora_adapter(
            adapter_name=name,
            adapter_path=path,
            base_model=base_model,
            replicas=count,
            keep=False,
            check=check,
            timeout=timeout,
        ),
    )
    for note in result.notes:
        err.print(note, style="yellow", markup=False)
    if json:
        print_json(_plain(result))
        return
    done = "was loaded already" if result.already_loaded else "is loaded"
    out.print(f"{name} {done} at {', '.join(result.endpoints)}", markup=False)


@app.command()
def unload(
    context: typer.Context,
    name: Name,
    url: Url = None,
    config: Config = None,
    json: AsJson = False,
    timeout: Seconds = 30.0,
) -> None:
    """Unload an adapter; requests that run with it go on."""
    servers = target(context, url, config)
    result = _ask(servers, lambda vllm: vllm.unload_lora_adapter(name=name, timeout=timeout))
    if json:
        print_json(_plain(result))
        return
    out.print(f"{name} is unloaded", markup=False)


def _ask(servers: Target, question: Callable[[VllmUnified], T]) -> T:
    try:
        with servers.connect() as vllm:
            return question(vllm)
    except ConnectError as error:
        raise servers.explain_absence(error) from error


def _replicas(text: str) -> Replicas:
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise ConfigurationError(f'--replicas must be a number or "all", not {text!r}')
    return int(text)


def _plain(result: LoraResult) -> dict[str, Any]:
    plain = msgspec.structs.asdict(result)
    plain["failed"] = {id: str(error) for id, error in result.failed.items()}
    return plain
