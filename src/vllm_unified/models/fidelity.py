"""How close two servers are: what each makes of the same texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vllm_unified.errors import ProtocolError

PROBES = (
    "The Moon goes around the Earth once in about twenty-seven days, and always shows it the same "
    "side, because it turns around its own axis in the same time.",
    "User: What is the capital of Japan?\nAssistant: The capital of Japan is Tokyo.",
    "def add(a, b):\n    return a + b\n\n\ndef mean(numbers):\n    return sum(numbers) / "
    "len(numbers)\n",
    "Tom has 12 apples. He gives 5 of them to Anna and buys 3 more. How many has he now? 12 - 5 = "
    "7, and 7 + 3 = 10. The answer is 10.",
    '{"name": "Maria", "age": 34, "languages": ["Spanish", "English"], "active": true}',
    "Once upon a time there was a little fox who lived at the edge of a dark forest. Every evening "
    "she looked at the stars and wondered how far away they were.",
    "Paris est la capitale de la France, et la Seine traverse la ville d'est en ouest.",
    "Dear Sir or Madam, I am writing to ask whether the position that you advertised last week is "
    "still open. I look forward to hearing from you.",
    "1. Open the box.\n2. Take out the cable.\n3. Plug it into the wall.\n4. Press the button on "
    "the back.\n5. Wait until the light is green.",
    "SELECT name, price FROM products WHERE price > 100 ORDER BY price DESC LIMIT 10;",
    "Water consists of hydrogen and oxygen. When it freezes it expands, which is why ice floats.",
    "The court found that the contract was void, since one of the parties had not been of age when "
    "it was signed.",
)
"""Twelve short texts of different kinds, with 356 positions for the bundled model's tokenizer."""


class Reading(msgspec.Struct, frozen=True):
    """What one server makes of one text, token by token; the first token has nothing before it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the tokens that are there."""
    likeliest: tuple[int, ...]
    """The token that the server would have put there."""


class Likeness(msgspec.Struct, frozen=True, kw_only=True):
    """How close a server is to another one."""

    perplexity_ratio: float
    """New to old: 1 is as good, more is worse."""
    agreement: float
    """Share of positions where both find the same token the most likely."""


def probe_body(text: str) -> dict[str, Any]:
    """The parameters of a completion whose answer :func:`reading_of` understands."""
    return {"prompt": text, "prompt_logprobs": 1, "max_tokens": 1, "temperature": 0}


def reading_of(answer: Mapping[str, Any]) -> Reading:
    """What a completion with ``prompt_logprobs`` says of its prompt.

    Each position has the token that is there and the likeliest one, which may be the same.

    Raises:
        ProtocolError: the answer has no logprobs of its prompt.
    """
    try:
        positions = answer["choices"][0]["prompt_logprobs"][1:]
        tokens, logprobs, likeliest = [], [], []
        for position in positions:
            token = next(iter(position))  # vLLM puts the one that is there first
            tokens.append(int(token))
            logprob = position[token]["logprob"]  # null where it is not a number
            logprobs.append(math.nan if logprob is None else float(logprob))
            likeliest.append(int(min(position, key=lambda each: position[each]["rank"])))
    except (KeyError, IndexError, TypeError, ValueError, StopIteration):
        raise ProtocolError("the answer has no logprobs of its prompt") from None
    return Reading(tuple(tokens), tuple(logprobs), tuple(likeliest))


def perplexity(readings: Sequence[Reading]) -> float:
    """``exp`` of the mean negative logprob of all tokens; 1 would be to know them all.

    Infinite where a logprob is not a number: such weights compute nonsense.
    """
    logprobs = [logprob for reading in readings for logprob in reading.logprobs]
    mean = -sum(logprobs) / max(1, len(logprobs))
    return math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf


def likeness(old: Sequence[Reading], new: Sequence[Reading]) -> Likeness:
    """Compare what two servers made of the same texts.

    Raises:
        ProtocolError: they do not read the same tokens in them, so they are different models.
    """
    if [reading.token_ids for reading in old] != [reading.token_ids for reading in new]:
        raise ProtocolError(
            "the two servers split the same text into different tokens",
            hint="The checkpoint belongs to another model, or its tokenizer was changed.",
        )
    pairs = [
        (a, b)
        for before, after in zip(old, new, strict=True)
        for a, b in zip(before.likeliest, after.likeliest, strict=True)
    ]
    return Likeness(
        perplexity_ratio=perplexity(new) / perplexity(old),
        agreement=sum(a == b for a, b in pairs) / max(1, len(pairs)),
    )
