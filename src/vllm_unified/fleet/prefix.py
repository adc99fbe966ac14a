"""Which servers were lately sent which beginnings of prompts. Pure bookkeeping."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import msgspec

BLOCK_BYTES = 512
"""Some 128 tokens. What is shared below that is computed again faster than it is looked up."""
MAX_KEYS = 256
"""Blocks of one prompt that are looked at, as in llm-d's scheduler; the rest is ignored."""


class _Prompt(msgspec.Struct, gc=False):
    """What of a request decides what its KV cache holds; vLLM puts the tools before the chat."""

    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    cache_salt: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_Prompt)


def prefix_keys(body: bytes, model: str | None) -> list[int]:
    """A key for each full block of the prompt in a request's JSON, in order.

    Two requests have the same n-th key if they have the same model, tools, and first n blocks of
    messages, text or token ids; wherever in the body these stand, and whatever else is in it. Keys
    hold within this process. A body that has no prompt has no keys.
    """
    try:
        request = _decoder.decode(body)
    except msgspec.DecodeError:
        return []
    # Without the closing bracket: the next turn of a chat has a comma there.
    prompt = bytes(request.messages or request.prompt)[:-1]
    key = hash((model, bytes(request.tools), bytes(request.cache_salt)))
    keys = []
    for end in range(BLOCK_BYTES, min(len(prompt), MAX_KEYS * BLOCK_BYTES) + 1, BLOCK_BYTES):
        key = hash((key, prompt[end - BLOCK_BYTES : end]))
        keys.append(key)
    return keys


class PrefixIndex:
    """Blocks of prompts and the servers that were sent them: a guess at their prefix caches.

    Bounded: the block that was not used for longest goes first, and of one prompt the last block
    first, as in vLLM, so that what is known of a prompt is always its beginning.
    """

    def __init__(self, *, max_blocks: int = 32_768, ttl: float = 120.0) -> None:
        """``max_blocks`` bounds the index; a server is trusted with a block for ``ttl`` seconds.

        The defaults: what llm-d expects one 80 GB GPU to hold (31,250 blocks), and vllm-router's
        eviction interval.
        """
        self._max_blocks = max_blocks
        self._ttl = ttl
        self._holders: OrderedDict[int, dict[str, float]] = OrderedDict()
        """For each block, when its servers were last sent it, and in that order; the first to
        evict in front."""
        self._inner: set[int] = set()
        """Blocks after which a prompt went on."""
        self._held: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._holders)

    def longest(
        self,
        keys: Sequence[int],
        fits: Callable[[str], bool],
        now: float,
        *,
        most: int = sys.maxsize,
    ) -> tuple[int, list[str]]:
        """How many leading blocks a server that ``fits`` holds at most, and which hold them: at
        most so many of them, those that were sent them last."""
        if not keys or keys[0] not in self._holders:
            return 0, []
        unfit: set[str] = set()
        for count in range(len(keys), 0, -1):
            used = self._holders.get(keys[count - 1])
            holders = [] if used is None else self._valid(used, fits, now, most, unfit)
            if holders:
                return count, holders
        return 0, []

    def _valid(
        self,
        used: dict[str, float],
        fits: Callable[[str], bool],
        now: float,
        most: int,
        unfit: set[str],
    ) -> list[str]:
        """The last of the servers that ``used`` a block; none is asked twice whether it fits."""
        holders: list[str] = []
        for id, at in reversed(used.items()):
            if now - at > self._ttl:
                break
            if id in unfit:
                continue
            if fits(id):
                holders.append(id)
                most -= 1
                if not most:
                    break
            else:
                unfit.add(id)
        return holders

    def is_fork(self, keys: Sequence[int], count: int) -> bool:
        """Whether a prompt leaves another one behind after its first ``count`` blocks; no fork is
        one that goes on where the other ended, as the next turn of a conversation does."""
        return 0 < count < len(keys) and keys[count - 1] in self._inner

    def held(self, holder: str) -> int:
        """How many blocks this server was sent, of those that are remembered."""
        return self._held[holder]

    def add(self, keys: Sequence[int], holder: str, now: float) -> None:
        """Note that ``holder`` is sent a prompt with these blocks. ``now`` never goes back."""
        for key in reversed(keys):
            used = self._holders.setdefault(key, {})
            # The last one is the one that was sent it last.
            self._held[holder] += used.pop(holder, None) is None
            used[holder] = now
            self._holders.move_to_end(key)
        self._inner.update(keys[:-1])
        while len(self._holders) > self._max_blocks:
            self._drop(next(iter(self._holders)))
        self._expire(now)

    def forget(self, holder: str) -> None:
        """Forget what this server holds; it was restarted, or is gone."""
        for used in self._holders.values():
            used.pop(holder, None)
        for key in [key for key, used in self._holders.items() if not used]:
            self._drop(key)
        del self._held[holder]

    def _expire(self, now: float) -> None:
        while self._holders:
            oldest = next(iter(self._holders))
            if now - next(reversed(self._holders[oldest].values())) <= self._ttl:
                return
            self._drop(oldest)

    def _drop(self, key: int) -> None:
        self._held.subtract(self._holders.pop(key).keys())
        self._inner.discard(key)
