"""``vllm-unified serve``"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import Annotated

import typer

from vllm_unified.cli.serve_container import serve_container
from vllm_unified.cli.terminal import err, print_json, progress_lines
from vllm_unified.errors import ServerError
from vllm_unified.servers import BUNDLED_NAME, LocalServer, ServerSpec

_USUAL_PORT = 8000


def serve(
    model: Annotated[
        str, typer.Argument(help=f"A folder, a repository's id, or 'bundled' ({BUNDLED_NAME}).")
    ] = "bundled",
    vllm_args: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM ARGUMENTS]", help="Passed to vLLM.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(help=f"Default: {_USUAL_PORT}, or a free one if that is taken."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="The model's name in requests; more of them are aliases."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer together.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Such as awq; without it, what the checkpoint says.")
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="GPUs that share each layer.")
    ] = None,
    enable_lora: Annotated[bool, typer.Option(help="Serve LoRA adapters.")] = False,
    max_restarts: Annotated[
        int, typer.Option(help="How often in a row a vLLM that ends or hangs is started again.")
    ] = 3,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when it is ready, and leave it running.")
    ] = False,
    container: Annotated[
        str | None,
        typer.Option(metavar="IMAGE", help="Run it in a container of this image (Docker, Podman)."),
    ] = None,
    gpus: Annotated[
        str, typer.Option(help="Of the container: all, none, a number, or device=0,1.")
    ] = "all",
    json: Annotated[bool, typer.Option(help="Print address and model as JSON when ready.")] = False,
) -> None:
    """Run a vLLM on this machine until Ctrl-C; it installs the engine if there is none.

    A key that requests must carry is taken from VLLM_API_KEY.
    """
    names = name or []
    spec = ServerSpec(
        model=model,
        served_model_name=names[0] if names else None,
        aliases=tuple(names[1:]),
        host=host,
        port=port or _usual_port(host),
        max_model_len=max_model_len,
        dtype=dtype,
        quantization=quantization,
        tensor_parallel_size=tensor_parallel_size,
        enable_lora=enable_lora,
        max_restarts=max_restarts,
        api_key=os.environ.get("VLLM_API_KEY") or None,
        extra_args=tuple(vllm_args or ()),
    )
    if container:
        serve_container(spec, container, gpus, detach=detach, json=json)
    else:
        asyncio.run(_serve(spec, detach=detach, json=json))


async def _serve(spec: ServerSpec, *, detach: bool, json: bool) -> None:
    with progress_lines() as say:
        server = await LocalServer.start(spec, progress=say, detached=detach)
    async with server:
        if json:
            print_json(
                {
                    "url": server.url,
                    "model": server.model,
                    "pid": server.pid,
                    "id": server.fingerprint,
                    "log_path": str(server.log_path),
                }
            )
        err.print(f"{server.model} is served at {server.url}", style="bold", markup=False)
        if detach:
            mark = server.fingerprint[:8]
            err.print(f"Its log:    vllm-unified logs {mark} --follow", style="dim", markup=False)
            err.print(f"To stop it: vllm-unified stop {mark}", style="dim", markup=False)
            return
        err.print(f"Log: {server.log_path}", style="dim", markup=False)
        err.print("Try `vllm-unified chat` in another terminal. Ctrl-C stops it.", style="dim")
        await _stay(server)


async def _stay(server: LocalServer) -> None:
    """Show what happens to the server, until it is over or Ctrl-C."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _interrupt)
    try:
        reason = await server.follow(_say_where, progress=_say)
    except asyncio.CancelledError:
        with progress_lines() as say:
            say("Stopping...")
            await server.stop()
        raise
    raise ServerError(f"the server ended: {reason}", hint=f"Its log: {server.log_path}")


def _say(message: str) -> None:
    err.print(message, style="dim", markup=False)


def _say_where(server: LocalServer) -> None:
    err.print(f"{server.model} is served at {server.url}", style="bold", markup=False)


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def _usual_port(host: str) -> int | None:
    """Port 8000 if it is free, else none, which lets the system choose."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, _USUAL_PORT))
        except OSError:
            return None
    return _USUAL_PORT
