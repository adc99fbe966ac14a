"""Which server a command talks to, or which servers."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from vllm_unified.blocking import VllmUnified
from vllm_unified.cli.terminal import err
from vllm_unified.configfile import ClientConfig, read_config
from vllm_unified.errors import ConfigurationError, ConnectError
from vllm_unified.settings import DEFAULT_API_URL, server_address

if TYPE_CHECKING:
    from vllm_unified.servers import RunningServer

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        "-u",
        envvar="VLLM_API_URL",
        help=f"The server. Without it: one that `serve` started here, else {DEFAULT_API_URL}.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        envvar="VLLM_UNIFIED_CONFIG",
        help="Servers and settings in a TOML file, in place of --url.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", envvar="VLLM_MODEL", help="A model or LoRA adapter it serves."),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.001, help="Seconds for the first token, and between.")
]


class Target(msgspec.Struct, frozen=True):
    """A server, or the servers of a file."""

    url: str | None
    config: Path | None
    typed: frozenset[str]
    """Names of the options that the command line has; others are defaults, or of variables."""

    def connect(self, model: str | None = None, timeout: float | None = None) -> VllmUnified:
        """A client. What was typed wins over the file, and the file over everything else.

        Raises:
            ConfigurationError: something in the file is wrong.
        """
        if self.config is None:
            return connect(self.url, model, timeout)
        config = self.client_config()
        patience = {} if timeout is None else {"timeout": timeout * 1000}
        return VllmUnified(
            config.resources,
            {**patience, **config.metadata},
            model=model if "model" in self.typed else None,
            timeout=timeout if "timeout" in self.typed else None,
        )

    def client_config(self) -> ClientConfig:
        """What the file says, or the same for one server; warns of a key that others can read.

        Raises:
            ConfigurationError: something in the file is wrong, or the address.
        """
        if self.config is None:
            url = server_address(self.url or default_url(), key="--url")
            return ClientConfig(resources={"endpoints": {url: url}}, metadata={})
        config = read_config(self.config, os.environ)
        if config.holds_key and _others_can_read(self.config):
            err.print(
                f"{self.config} holds a key, and others can read it: chmod 600, or api_key_env",
                style="yellow",
                markup=False,
            )
        return config

    def explain_absence(self, error: ConnectError) -> ConnectError:
        """The error that says, in one line, that no server is there and what to do."""
        if self.config is None:
            where, advice = self.url or default_url(), "start one with `vllm-unified serve`"
            text = f"No vLLM server answers at {where} ({error.message}): {advice}"
        else:
            advice = f"`vllm-unified endpoints -c {self.config}` shows how they do"
            text = f"No server of {self.config} answers ({error.message}): {advice}"
        found = type(error)(text, hint="")
        return found if found.is_transient_error else error


def target(context: typer.Context, url: str | None, config: Path | None) -> Target:
    """What these options mean: one on the command line wins over a variable, then the file.

    Raises:
        ConfigurationError: the command line has both.
    """
    typed = frozenset(name for name in context.params if _is_typed(context, name))
    if {"url", "config"} <= typed:
        raise ConfigurationError("--url and --config are both given: keep one of them")
    if "url" in typed:
        config = None
    return Target(None if config else url, config, typed)


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _others_can_read(file: Path) -> bool:
    return os.name == "posix" and bool(file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))


def connect(url: str | None, model: str | None = None, timeout: float | None = None) -> VllmUnified:
    """A client for the server that is meant."""
    # Somebody waits at the keyboard: one retry, half a second at most.
    return VllmUnified(api_url=url or default_url(), model=model, timeout=timeout, max_retries=1)


def default_url() -> str:
    """The newest server that runs here by this library's hand, else vLLM's usual address."""
    local = local_servers()
    return local[-1].url if local else DEFAULT_API_URL


def local_servers() -> list[RunningServer]:
    """Servers of this library that are ready; none where they cannot run."""
    if os.name != "posix":
        return []
    from vllm_unified.servers import running_servers  # slow to import, and no use where --url is

    return [server for server in running_servers() if server.state == "ready"]
