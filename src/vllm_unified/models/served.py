"""Which of the names that a server answers to is meant. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_unified.errors import ModelNotFoundError
from vllm_unified.results import ModelCard


def base_name(cards: Sequence[ModelCard], model: str) -> str:
    """The name under which the server itself knows the base of a model: the first one it was given.

    ``model`` is a name, an alias or an adapter.

    Raises:
        ModelNotFoundError: the server does not serve it; names what it serves.
    """
    card = card_of(cards, model)
    base = base_card(cards, card)
    return next(each.id for each in cards if each.root == base.root and each.parent == base.parent)


def card_of(cards: Sequence[ModelCard], model: str | None) -> ModelCard:
    """The card of a model, or the first.

    Raises:
        ModelNotFoundError: the server does not serve it; names what it serves.
    """
    found = next((card for card in cards if model in (None, card.id)), None)
    if found is None:
        names = ", ".join(card.id for card in cards) or "nothing"
        wanted = "a model" if model is None else f"the model {model!r}"
        error = ModelNotFoundError(f"the server does not serve {wanted}; it serves {names}")
        error.model = model
        raise error
    return found


def base_card(cards: Iterable[ModelCard], card: ModelCard) -> ModelCard:
    """The card of an adapter's base model; of a base model, its own."""
    return next((each for each in cards if each.id == card.parent), card)
