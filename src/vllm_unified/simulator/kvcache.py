"""The KV cache: blocks of tokens, shared between prompts that begin alike. Pure bookkeeping."""

from __future__ import annotations

import zlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class Allocation:
    """Blocks that one sequence holds."""

    __slots__ = ("cached_tokens", "keys", "private")

    def __init__(self) -> None:
        self.keys: list[int] = []
        """Shared blocks, by hash."""
        self.private = 0
        """Blocks that nobody else can use."""
        self.cached_tokens = 0
        """Prompt tokens that were in the cache already."""

    @property
    def blocks(self) -> int:
        """All blocks held."""
        return len(self.keys) + self.private


class KVCache:
    """A fixed number of blocks; full blocks of prompts are kept after use and found again."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Blocks that are cached and unused, the one to evict first in front."""
        self._private = 0
        self.queries = 0
        """Prompt tokens looked up."""
        self.hits = 0
        """Prompt tokens found."""

    @property
    def used(self) -> int:
        """Blocks held by sequences."""
        return len(self._references) + self._private

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, from 0 to 1."""
        return self.used / self.num_blocks

    def allocate(self, prompt: Sequence[int], salt: int = 0) -> Allocation | None:
        """Blocks for a prompt and one more token, or ``None`` if too few are free.

        The last token of a prompt is always computed, as in vLLM, so a whole prompt that is
        cached counts one block less.
        """
        keys = self._keys(prompt, salt) if self._prefix_caching else []
        reusable = self._reusable(keys, (len(prompt) - 1) // self.block_size)
        needed = len(prompt) // self.block_size + 1
        fresh = needed - sum(1 for key in keys[:reusable] if key in self._references)
        if self.used + fresh > self.num_blocks:
            return None
        allocation = Allocation()
        allocation.cached_tokens = reusable * self.block_size
        for key in keys:
            self._take(key)
        allocation.keys = keys
        allocation.private = needed - len(keys)
        self._private += allocation.private
        self._evict()
        if self._prefix_caching:
            self.queries += len(prompt)
            self.hits += allocation.cached_tokens
        return allocation

    def extend(self, allocation: Allocation, tokens: int) -> bool:
        """Make room for a sequence of that many tokens; false if no block is free."""
        if tokens <= allocation.blocks * self.block_size:
            return True
        if self.used >= self.num_blocks:
            return False
        allocation.private += 1
        self._private += 1
        self._evict()
        return True

    def free(self, allocation: Allocation) -> None:
        """Give the blocks back; those of the prompt stay cached until their room is needed."""
        for key in reversed(allocation.keys):
            self._references[key] -= 1
            if not self._references[key]:
                del self._references[key]
                self._idle[key] = None
        self._private -= allocation.private
        allocation.keys, allocation.private = [], 0

    def reset(self) -> bool:
        """Forget what is cached; false, and nothing done, while sequences hold blocks."""
        if self.used:
            return False
        self._idle.clear()
        return True

    def _keys(self, prompt: Sequence[int], salt: int) -> list[int]:
        key, keys, size = salt, [], self.block_size
        for start in range(0, len(prompt) - size + 1, size):
            block = array("I", prompt[start : start + size]).tobytes()
            key = (key << 32 | zlib.crc32(block, key & 0xFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF
            keys.append(key)
        return keys

    def _reusable(self, keys: list[int], limit: int) -> int:
        count = 0
        for key in keys[:limit]:
            if key not in self._references and key not in self._idle:
                break
            count += 1
        return count

    def _take(self, key: int) -> None:
        self._idle.pop(key, None)
        self._references[key] = self._references.get(key, 0) + 1

    def _evict(self) -> None:
        while self._idle and self.used + len(self._idle) > self.num_blocks:
            self._idle.popitem(last=False)
