"""``vllm-unified models``"""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_unified.cli.generate import AsJson
from vllm_unified.cli.target import Config, Model, Timeout, Url, target
from vllm_unified.cli.terminal import print_json, print_table
from vllm_unified.errors import ConnectError
from vllm_unified.models.info import ModelInfo
from vllm_unified.results import ModelCard


def models(
    context: typer.Context,
    url: Url = None,
    config: Config = None,
    model: Model = None,
    info: Annotated[
        bool,
        typer.Option(
            "--info", help="All that is known of --model, or of the first, and from where."
        ),
    ] = False,
    json: AsJson = False,
    timeout: Timeout = 10.0,
) -> None:
    """The models and LoRA adapters that a server answers to."""
    servers = target(context, url, config)
    try:
        with servers.connect(timeout=timeout) as vllm:
            found = (
                vllm.get_model_info(None, model, timeout=timeout) if info else vllm.list_models()
            )
    except ConnectError as error:
        raise servers.explain_absence(error) from error
    if json:
        print_json(found)
    elif isinstance(found, ModelInfo):
        print_table(("", "value", "source"), *_known(found))
    else:
        print_table(("model", "context", "base model", "loaded from"), *map(_row, found))


def _row(card: ModelCard) -> tuple[str, ...]:
    return (card.id, str(card.max_model_len or ""), card.parent or "", card.root or "")


def _known(info: ModelInfo) -> list[tuple[str, ...]]:
    """A line for each field that is known, and one for those that are not."""
    fields = [name for name in info.__struct_fields__ if name != "sources"]
    lines: list[tuple[str, ...]] = [
        (name.replace("_", " "), _words(getattr(info, name)), info.sources[name])
        for name in fields
        if name in info.sources
    ]
    unknown = [name.replace("_", " ") for name in fields if name not in info.sources]
    return [*lines, ("not known", ", ".join(unknown), "")] if unknown else lines


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
