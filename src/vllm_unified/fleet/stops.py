"""Where a text ends at a stop string, whatever pieces it comes in. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Ends a text at a stop string as vLLM does, however it is cut into pieces.

    The string that is complete first wins, and among those the first in the list
    (``check_stop_strings``). Characters that may yet be the beginning of one are held back.
    """

    def __init__(self, stops: Sequence[str], *, keeps_match: bool, before: str) -> None:
        """Go on after a text without a stop string in it.

        Args:
            stops: At least one; none is empty.
            keeps_match: Whether the stop string belongs to the text
                (``include_stop_str_in_output``); then nothing need be held back.
            before: The text so far. Without ``keeps_match`` the last ``max(len) - 1`` characters of
                it are taken as not delivered, as vLLM would not have delivered them.
        """
        self._stops = stops
        self._keeps_match = keeps_match
        self._reach = max(map(len, stops)) - 1
        self._tail = self._last(before)

    def feed(self, text: str) -> tuple[str, str | None]:
        """The text that can be delivered now, and the stop string that ends it, if one does."""
        seen = self._tail + text
        match = self._first_match(seen)
        if match is not None:
            end, _, stop = match
            return seen[len(self._tail) : end] if self._keeps_match else seen[
                : end - len(stop)
            ], stop
        self._tail = self._last(seen)
        return text if self._keeps_match else seen[: len(seen) - len(self._tail)], None

    def finish(self) -> str:
        """What was held back, now that nothing will follow."""
        return "" if self._keeps_match else self._tail

    def _first_match(self, seen: str) -> tuple[int, int, str] | None:
        """The end, the place in the list and the string; what came before has none."""
        matches = []
        for place, stop in enumerate(self._stops):
            start = seen.find(stop)
            if start >= 0:
                matches.append((start + len(stop), place, stop))
        return min(matches, default=None)

    def _last(self, text: str) -> str:
        return text[max(0, len(text) - self._reach) :]
