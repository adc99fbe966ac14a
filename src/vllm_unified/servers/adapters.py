"""The LoRA adapters of a server, kept over its restarts: vLLM itself forgets them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from vllm_unified.servers.probe import Contact

_LIST_SECONDS = 3.0
_LOAD_SECONDS = 120.0


class _Card(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


async def loaded_adapters(contact: Contact) -> dict[str, str] | None:
    """Name and path of what is loaded; ``None`` where the server does not tell."""
    body = await contact.look("/v1/models", _LIST_SECONDS)
    try:
        cards = msgspec.json.decode(body or b"", type=_Cards)
    except msgspec.DecodeError:
        return None
    return {card.id: card.root for card in cards.data if card.parent and card.root}


async def load_again(contact: Contact, adapters: Mapping[str, str]) -> list[str]:
    """Load what is not loaded; a sentence for each that cannot be."""
    if not adapters:
        return []
    there = await loaded_adapters(contact) or {}
    problems = []
    for name, path in adapters.items():
        if name not in there and (problem := await _load(contact, name, path)):
            problems.append(f"the adapter {name!r} ({path}) cannot be loaded again: {problem}")
    return problems


async def _load(contact: Contact, name: str, path: str) -> str | None:
    try:
        async with asyncio.timeout(_LOAD_SECONDS):
            answer = await contact.ask(
                "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}
            )
    except TimeoutError:
        return f"no answer within {_LOAD_SECONDS:g} s"
    except (OSError, ValueError) as error:
        return str(error)
    said = answer.body.decode("utf-8", "replace")
    if answer.status == 200 or "already been" in said:
        return None
    return f"HTTP {answer.status}: {' '.join(said.split())[:300]}"
