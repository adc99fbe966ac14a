"""Text to token ids and back, without loss, and the incremental detokenizer of a stream.

Words of the vocabulary are one token, unknown words are pairs of letters, and all else is bytes,
so that a character outside ASCII spans two to four tokens, as in any byte-level tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vllm_unified.simulator.vocabulary import FIRST_BYTE, IDS, PIECES, SIZE, SPECIAL

_SPECIAL = re.compile("|".join(f"({re.escape(name)})" for name in SPECIAL).encode())
_RUN = re.compile(rb" ?[A-Za-z]+(?:-[a-z]+)?|[.,;:!?] |\n\n|'s| - |.", re.DOTALL)


def encode(text: str) -> list[int]:
    """Token ids of a text; the names of special tokens become these tokens.

    Lone surrogates, which JSON can carry, are encoded as ``?``.
    """
    data = text.encode("utf-8", "replace")
    ids: list[int] = []
    position = 0
    for match in _SPECIAL.finditer(data):
        ids += _encode_plain(data[position : match.start()])
        ids.append(IDS[match.group()])
        position = match.end()
    return ids + _encode_plain(data[position:])


def _encode_plain(data: bytes) -> list[int]:
    ids: list[int] = []
    known = IDS.get
    for run in _RUN.findall(data):
        token = known(run)
        if token is not None:
            ids.append(token)
        else:
            ids += _encode_unknown(run)
    return ids


def _encode_unknown(run: bytes) -> list[int]:
    """Pairs of letters where the vocabulary has them, single bytes elsewhere."""
    ids: list[int] = []
    position = 0
    while position < len(run):
        pair = IDS.get(run[position : position + 2])
        if pair is not None and position + 1 < len(run):
            ids.append(pair)
            position += 2
        else:
            ids.append(FIRST_BYTE + run[position])
            position += 1
    return ids


def token_bytes(token: int, *, skip_special: bool = False) -> bytes:
    """Bytes of one token; an id outside the vocabulary has none."""
    if not 0 <= token < SIZE or (skip_special and token < FIRST_BYTE):
        return b""
    return PIECES[token]


def decode(ids: Iterable[int], *, skip_special: bool = False) -> str:
    """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
    data = b"".join(token_bytes(token, skip_special=skip_special) for token in ids)
    return data.decode("utf-8", "replace")


def token_strings(ids: Iterable[int]) -> list[str]:
    """How a byte-level tokenizer spells its tokens: ``Ġ`` for a space, ``Ċ`` for a newline."""
    return ["".join(_BYTE_ALPHABET[byte] for byte in token_bytes(token)) for token in ids]


def _byte_alphabet() -> tuple[str, ...]:
    """The printable stand-ins for bytes that GPT-2's tokenizer introduced."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(spare)) for byte in range(256))


_BYTE_ALPHABET = _byte_alphabet()


class Detokenizer:
    """Text of a stream of tokens, as soon as it is certain.

    It follows the ``DecodeStream`` of Hugging Face's ``tokenizers``, which vLLM uses: text is held
    back while it ends in U+FFFD, what is incomplete at the end is never delivered, and after a
    prompt that ends inside a character the first text contains the whole prompt.
    """

    def __init__(self, prompt: Sequence[int] = (), *, skip_special: bool = True) -> None:
        self._skip_special = skip_special
        tail = b"".join(token_bytes(token, skip_special=skip_special) for token in prompt[-4:])
        self._pending = b""
        if tail.decode("utf-8", "replace").endswith("\ufffd"):
            self._pending = b"".join(token_bytes(t, skip_special=skip_special) for t in prompt)

    def push(self, token: int) -> str:
        """Take one token; the text that became certain, or the empty string."""
        piece = token_bytes(token, skip_special=self._skip_special)
        if not self._pending and piece.isascii():
            return piece.decode("ascii")
        self._pending += piece
        text = self._pending.decode("utf-8", "replace")
        if not text or text.endswith("\ufffd"):
            return ""
        self._pending = b""
        return text
