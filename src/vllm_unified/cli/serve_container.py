"""``vllm-unified serve --container IMAGE``"""

from __future__ import annotations

import asyncio
import signal
from typing import Literal

from vllm_unified.cli.terminal import err, print_json, progress_lines
from vllm_unified.errors import ConfigurationError, ServerError
from vllm_unified.servers import ContainerServer, ContainerSpec, ServerSpec

Gpus = Literal["all"] | int | tuple[str, ...] | None


def serve_container(server: ServerSpec, image: str, gpus: str, *, detach: bool, json: bool) -> None:
    """Run vLLM in a container until Ctrl-C, or, detached, until it is stopped.

    Args:
        server: What to serve.
        image: Downloaded where it is missing, as ``docker run`` does.
        gpus: As ``docker run --gpus`` takes them, or ``none``.
        detach: Whether to return when it is ready.
        json: Whether to print address and model as JSON.

    Raises:
        VllmError: it does not start; or it ended too often.
    """
    spec = ContainerSpec(server=server, image=image, gpus=gpus_of(gpus))
    asyncio.run(_serve(spec, detach=detach, json=json))


def gpus_of(text: str) -> Gpus:
    """``all``, ``none``, ``2``, or ``device=0,1``.

    Raises:
        ConfigurationError: something else.
    """
    if text == "all":
        return "all"
    if text == "none":
        return None
    if text.isdecimal():
        return int(text)
    name, _, ids = text.partition("=")
    if name == "device" and ids:
        return tuple(ids.split(","))
    raise ConfigurationError(f"--gpus {text} is none of: all, none, a number, device=0,1")


async def _serve(spec: ContainerSpec, *, detach: bool, json: bool) -> None:
    server = ContainerServer(spec, keep=detach, pull=True)
    with progress_lines() as say:
        await server.start_container(progress=say)
    async with server:
        status = await server.get_container_status()
        if json:
            print_json({"url": server.url, "model": server.model, "container": status.name})
        err.print(f"{server.model} is served at {server.url}", style="bold", markup=False)
        err.print(f"Its log:    docker logs -f {status.name}", style="dim", markup=False)
        if detach:
            err.print(f"To stop it: docker rm -f {status.name}", style="dim", markup=False)
            return
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGTERM, signal.raise_signal, signal.SIGINT
        )
        reason = await server.follow(progress=_say)
        raise ServerError(f"the server ended: {reason}")


def _say(message: str) -> None:
    err.print(message, style="dim", markup=False)
