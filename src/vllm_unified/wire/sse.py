"""Server-sent events: bytes in, events out.

Follows the event stream format of the HTML standard (section 9.2.6, "Interpreting an event
stream"), on bytes: text is never split into lines, so U+2028 and its kin are ordinary characters,
and a character cut between two packets is whole again in the event.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from vllm_unified.errors import ResponseTooLargeError

_BOM = b"\xef\xbb\xbf"
_COLON = 0x3A


class ServerSentEvent(msgspec.Struct, frozen=True, gc=False):
    """One event: its data with lines joined by ``\\n``, and its type."""

    data: bytes
    event: str = "message"


class SSEDecoder:
    """Decodes one stream. Feed it packets as they come, however they are cut.

    Time is linear in the bytes fed, also for one long line in many small packets. An event that
    the stream's end leaves incomplete is dropped, as the standard says.
    """

    def __init__(self, *, max_event_bytes: int) -> None:
        """``max_event_bytes`` bounds one line, and the data of one event."""
        self._max_event_bytes = max_event_bytes
        self._line = bytearray()
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._event = "message"
        self._at_start = True
        self._after_cr = False

    def feed(self, packet: bytes) -> Iterator[ServerSentEvent]:
        """The events that this packet completes; to be iterated to the end.

        Raises:
            ResponseTooLargeError: a line or an event exceeds ``max_event_bytes``. The events before
                it have come by then.
        """
        if self._after_cr and packet:
            self._after_cr = False
            if packet[0] == 0x0A:
                packet = packet[1:]
        if not packet:
            return
        # bytes.splitlines() splits on \n, \r and \r\n only; str.splitlines() would not do.
        lines = packet.splitlines()
        self._after_cr = packet[-1] == 0x0D
        rest = b"" if packet[-1] in b"\r\n" else lines.pop()
        if lines and self._line:
            self._line += lines[0]
            lines[0] = bytes(self._line)
            self._line.clear()
        for line in lines:
            event = self._take_line(line)
            if event is not None:
                yield event
        if rest:
            self._line += rest
            self._check_size(len(self._line))

    def _take_line(self, line: bytes) -> ServerSentEvent | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        if line.startswith(b"data:"):
            self._add_data(line[6:] if line[5:6] == b" " else line[5:])
        elif line[0] != _COLON:
            self._take_field(line)
        return None

    def _take_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._add_data(b"")
        elif name == b"event":
            self._event = value.removeprefix(b" ").decode("utf-8", "replace")

    def _add_data(self, value: bytes) -> None:
        self._data_bytes += len(value) + 1  # the line end, so that empty lines count too
        self._check_size(self._data_bytes)
        self._data.append(value)

    def _dispatch(self) -> ServerSentEvent | None:
        kind, self._event = self._event or "message", "message"
        if not self._data:
            return None
        data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data.clear()
        self._data_bytes = 0
        return ServerSentEvent(data, kind)

    def _check_size(self, size: int) -> None:
        if size > self._max_event_bytes:
            raise ResponseTooLargeError(
                f"one event of the stream is larger than {self._max_event_bytes} bytes"
            )
