"""Hashes of texts that are the same in every process. Pure."""

from __future__ import annotations

from hashlib import blake2b


def stable_hash(text: str) -> int:
    """64 bits, the same in every process; Python's own hash of a text is not."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


class StableHashes(dict[str, int]):
    """Hashes of texts, each computed once."""

    def __missing__(self, text: str) -> int:
        hashed = self[text] = stable_hash(text)
        return hashed
