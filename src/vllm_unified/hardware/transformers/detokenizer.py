"""The text of token ids that come one by one. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# As vLLM (detokenizer_utils.py): enough tokens of the prompt that the first ones of the answer
# are decoded as what follows them.
_PROMPT_TAIL = 6
_UNFINISHED = "\ufffd"


class Detokenizer:
    """Turns tokens into text as they come; an unfinished character is held back.

    What a token adds may depend on the tokens before it, so the difference between two decoded
    texts is taken, over a window that moves on.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-_PROMPT_TAIL:])
        self._prefix = 0
        self._read = len(self._ids)

    def feed(self, token: int) -> str:
        """The text that is complete with this token; ``""`` if none is."""
        self._ids.append(token)
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        if len(text) <= len(known) or text.endswith(_UNFINISHED):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def finish(self) -> str:
        """What was held back, now that nothing will follow."""
        known = self._decode(self._ids[self._prefix : self._read])
        return self._decode(self._ids[self._prefix :])[len(known) :]
