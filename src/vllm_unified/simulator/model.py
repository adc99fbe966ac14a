"""The imaginary model: the next token, from all the token ids before it.

A checksum over every id so far decides, so equal ids always continue equally: an answer that is
cut and continued from its token ids goes on as the uninterrupted one would. Nothing is random.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

import msgspec

from vllm_unified.simulator.sampling import Sampling
from vllm_unified.simulator.vocabulary import CHARACTERS, EOS, FIRST_BYTE, IDS, SIZE, WORDS

_WORD_IDS = tuple(IDS[f" {word}".encode()] for word in dict.fromkeys(WORDS))
_MARKS = tuple(IDS[mark] for mark in (b".", b",", b". ", b", ", b"\n", b"! "))
_ENCODED = tuple(character.encode() for character in CHARACTERS)
_CONTINUATIONS: dict[bytes, tuple[int, ...]] = {}
for _character in _ENCODED:
    for _length in range(1, len(_character)):
        _head, _next = _character[:_length], FIRST_BYTE + _character[_length]
        if _next not in (_known := _CONTINUATIONS.get(_head, ())):
            _CONTINUATIONS[_head] = (*_known, _next)
_STARTS = tuple(dict.fromkeys(FIRST_BYTE + character[0] for character in _ENCODED))
_NON_ASCII = FIRST_BYTE + 0x80
_LAST_BYTE = FIRST_BYTE + 0xFF

_MASK = 0xFFFFFFFF


def weights(*parts: object) -> int:
    """A number that stands for a model's weights: its name, an adapter, a seed."""
    return zlib.crc32("\x00".join(map(str, parts)).encode())


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token and how likely the model found it."""

    token: int
    logprob: float
    """Natural logarithm of its probability."""


class State:
    """A model that has read some tokens."""

    __slots__ = ("_eos", "_hash", "_salt", "_tail")

    def __init__(self, prompt: Sequence[int], salt: int, eos_probability: float) -> None:
        self._hash = zlib.crc32(array("I", prompt).tobytes())
        self._salt = salt
        self._eos = int(eos_probability * 1_000_000)
        self._tail = _unfinished(prompt[-4:])

    def read(self, token: int) -> None:
        """Take one more token."""
        self._hash = zlib.crc32(token.to_bytes(4, "little"), self._hash)
        if _NON_ASCII <= token <= _LAST_BYTE:
            self._tail = _unfinished_bytes(self._tail + bytes([token - FIRST_BYTE]))
        else:
            self._tail = b""

    def draw(self) -> int:
        """A number that depends on all tokens so far and on the weights, of 32 bits."""
        mixed = (self._hash ^ self._salt) * 0x9E3779B1 & _MASK
        mixed ^= mixed >> 15
        mixed = mixed * 0x85EBCA77 & _MASK
        return mixed ^ mixed >> 13

    def next_token(self, *, may_end: bool) -> int:
        """The most likely token; the end of the answer only if ``may_end``."""
        draw = self.draw()
        if self._tail:
            return _pick(_CONTINUATIONS[self._tail], draw)
        if may_end and draw % 1_000_000 < self._eos:
            return EOS
        kind = (draw >> 8) % 100
        if kind < 84:
            return _pick(_WORD_IDS, draw)
        if kind < 93:
            return _pick(_MARKS, draw)
        return _pick(_STARTS, draw)

    def alternatives(self, chosen: int, count: int) -> list[TokenLogprob]:
        """The chosen token and, after it, the next likely ones: ``max(count, 1)`` in all."""
        draw = self.draw()
        best = -((draw & 0xFFFF) / 0x10000) * 2.0 - 1e-3
        result = [TokenLogprob(chosen, best)]
        candidate = draw
        while len(result) < min(count, SIZE):
            candidate = (candidate * 1103515245 + 12345) & 0x7FFFFFFF
            token = _pick(_WORD_IDS, candidate)
            if all(token != other.token for other in result):
                result.append(TokenLogprob(token, result[-1].logprob - 0.125 - len(result) * 0.25))
        return result


def _pick(choices: Sequence[int], draw: int) -> int:
    return choices[draw % len(choices)]


def _unfinished(tokens: Sequence[int]) -> bytes:
    tail = b""
    for token in tokens:
        if _NON_ASCII <= token <= _LAST_BYTE:
            tail = _unfinished_bytes(tail + bytes([token - FIRST_BYTE]))
        else:
            tail = b""
    return tail


def _unfinished_bytes(data: bytes) -> bytes:
    """The bytes, if a character of the model's begins with them and goes on; else nothing."""
    if data in _CONTINUATIONS:
        return data
    return data[-1:] if data[-1:] in _CONTINUATIONS else b""


def salt_of(base: int, sampling: Sampling, sample: int) -> int:
    """What makes one sample's text differ from another's.

    Greedy sampling is the model alone. With a temperature, the seed and the number of the sample
    take part; without a seed the first sample equals the greedy text, so that tests repeat.
    """
    if sampling.greedy or (sampling.seed in (None, -1) and sample == 0):
        return base
    seed = None if sampling.seed == -1 else sampling.seed
    return weights(base, seed, sample)
