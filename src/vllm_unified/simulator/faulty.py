"""Faults on the wire: an exchange that breaks the answer it is asked to send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vllm_unified.simulator.errors import engine_dead
from vllm_unified.simulator.faults import Fault
from vllm_unified.simulator.http import Exchange, Header, Request

HTML_PAGE = (
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n"
    b"<center><h1>502 Bad Gateway</h1></center>\r\n<hr><center>nginx/1.22.1</center>\r\n"
    b"</body>\r\n</html>\r\n"
)
"""What a proxy in front of a dead server sends."""
_APART = 0.002
"""Seconds between the two halves of a character, enough for a client to read the first."""
_WITHIN_ANSWER = ("reset_after", "close_after", "stall_after", "error_frame", "die")


class Cut(Exception):
    """The fault ended the answer; there is nothing more to send."""


class FaultyExchange(Exchange):
    """Sends an answer as its fault would have it."""

    def __init__(self, exchange: Exchange, request: Request, fault: Fault) -> None:
        super().__init__(exchange.connection, request, close=exchange.closing)
        self._fault = fault
        self._tokens = 0
        self._spoilt = False
        self._stalled = False
        self.on_die: Callable[[], None] = lambda: None
        """Kills the engine; the server sets it."""

    async def respond(self, status: int, body: bytes = b"", headers: Sequence[Header] = ()) -> None:
        """Send a whole answer, broken."""
        fault = self._fault
        if fault.kind in ("reset_after", "close_after", "stall_after"):
            await self._half(status, body, headers)
        elif fault.kind == "wrong_length":
            await self._wrong_length(status, body, headers)
        elif fault.kind == "error_frame":
            error = engine_dead()
            encoded = error.frame().removeprefix(b"data: ").strip()
            await super().respond(error.status, encoded, [("content-type", "application/json")])
        else:
            await super().respond(status, self._spoil(body), headers)

    async def event(self, data: bytes, tokens: int = 0) -> None:
        """Send an event; once enough tokens were delivered, the fault strikes."""
        fault = self._fault
        if fault.kind in _WITHIN_ANSWER and self._tokens >= fault.after_tokens and tokens:
            await self._strike()
        if fault.kind == "wrong_length":
            size = max(len(data) + fault.offset, 0)
            await self.raw(b"%x\r\n%b\r\n" % (size, data))
            self.close()
            raise Cut
        first = not self._spoilt and tokens > 0
        await super().event(self._spoil(data) if first else data, tokens)
        self._spoilt = self._spoilt or first
        self._tokens += tokens

    async def raw(self, data: bytes) -> None:
        """Send bytes, in as many packets as the fault wants."""
        kind = self._fault.kind
        if kind == "byte_per_packet":
            for index in range(len(data)):
                await self._packet(data[index : index + 1])
        elif kind == "split_utf8" and (cut := _inside_character(data)):
            await self._packet(data[:cut])
            await asyncio.sleep(_APART)
            await self._packet(data[cut:])
        else:
            await super().raw(data)

    async def _packet(self, data: bytes) -> None:
        await super().raw(data)
        # The event loop may join what is written in one turn, so every packet has its own.
        await asyncio.sleep(0)

    async def _strike(self) -> None:
        kind = self._fault.kind
        if kind == "reset_after":
            await asyncio.sleep(0)
            self.reset()
            raise Cut
        if kind == "close_after":
            self.close()
            raise Cut
        if kind == "error_frame":
            await super().event(engine_dead().frame())
            await super().event(b"data: [DONE]\n\n")
            await self.end()
            raise Cut
        if self._stalled:
            return
        self._stalled = True
        if kind == "stall_after":
            await stall(self._fault.seconds)
        elif kind == "die":
            self.on_die()
            raise engine_dead()

    async def _half(self, status: int, body: bytes, headers: Sequence[Header]) -> None:
        head = self._head(status, [("content-length", str(len(body))), *headers])
        half = len(body) // 2
        await self.raw(head + body[:half])
        if self._fault.kind == "stall_after":
            await stall(self._fault.seconds)
            await self.raw(body[half:])
            self._finish()
            return
        await self._strike()

    async def _wrong_length(self, status: int, body: bytes, headers: Sequence[Header]) -> None:
        length = max(len(body) + self._fault.offset, 0)
        await self.raw(self._head(status, [("content-length", str(length)), *headers]) + body)
        self.close()

    def _spoil(self, data: bytes) -> bytes:
        if self._fault.kind == "malformed_json":
            stripped = data.rstrip(b"\n")
            return stripped[: len(stripped) // 2] + data[len(stripped) :]
        if self._fault.kind == "long_line":
            stripped = data.rstrip(b"\n")
            if not stripped.endswith(b"}"):
                return data
            padding = b',"padding":"' + b"x" * self._fault.size + b'"}'
            return stripped[:-1] + padding + data[len(stripped) :]
        return data


async def stall(seconds: float | None) -> None:
    """Do nothing for seconds, or until the client has had enough."""
    if seconds is None:
        await asyncio.get_running_loop().create_future()
    else:
        await asyncio.sleep(seconds)


def _inside_character(data: bytes) -> int:
    """A place inside the first multi-byte character, or 0 if there is none."""
    for index, byte in enumerate(data):
        if byte >= 0xC0:
            return index + 1
    return 0
