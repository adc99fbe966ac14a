"""The commands' names and what they are for; the rest of one is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
import typer.core
import typer.main

COMMANDS = {
    "demo": "See a real vLLM generate, chat, stream and answer a batch.",
    "serve": "Run a vLLM on this machine until Ctrl-C; it installs the engine if there is none.",
    "ps": "The servers that run on this machine by this library's hand.",
    "logs": "What the vLLM of a server writes.",
    "restart": "End a server's vLLM and start it again; those who use it wait.",
    "stop": "End a server that runs on this machine, for all who use it.",
    "generate": "Continue a text; it appears as it is generated.",
    "chat": "Chat: a conversation on a terminal, one answer to MESSAGE or to stdin otherwise.",
    "batch": "Answer every row of a file.",
    "models": "The models and LoRA adapters that a server answers to.",
    "endpoints": "How servers do, proven by a generated token: a live table, until Ctrl-C.",
    "stats": "What servers do, for everybody, by their own counters: a live table, until Ctrl-C.",
    "quantize": "Change how a running server's weights are stored, without an error for its users.",
    "doctor": "Look at hardware, engine, model, ports and server; say what to do about each "
    "problem.",
    "plan": "Whether a model fits here, how, and the arithmetic; the command that serves it so.",
    "simulate": "Run a vLLM look-alike that fails on request: for tests, without a GPU.",
    "engine": "The vLLM installs that servers run on.",
    "lora": "The LoRA adapters of running servers.",
}
"""By name, in the help's order, the first words of each one's own help."""


class Commands(typer.core.TyperGroup):
    """The commands, of which only the one that is run, completed or explained is imported."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, purpose in COMMANDS.items():
            self.add_command(typer.core.TyperCommand(name, help=purpose))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the first argument names, and the arguments that are its own."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else load(name), rest


def load(name: str) -> Any:
    """The command itself: a function of its module's name there, or a group called ``app``."""
    module = import_module(f"vllm_unified.cli.{name}")
    group = getattr(module, "app", None)
    if group is None:
        group = typer.Typer(add_completion=False)
        group.command(name)(getattr(module, name))
    return typer.main.get_command(group)
