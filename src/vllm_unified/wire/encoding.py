"""Bodies that come compressed although nobody asked for it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from vllm_unified.errors import ProtocolError, ResponseTooLargeError
from vllm_unified.wire.transport import Response

_PIECE_BYTES = 2**16
"""What is made of a packet at a time: a small one may hold gigabytes."""
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


def decompressed(response: Response) -> Response:
    """The same answer, with a body that can be read as it is.

    Raises:
        ProtocolError: it is compressed in a way that is not known here.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return response
    if encoding not in _WINDOW_BITS:
        response.close()
        raise ProtocolError(f"the answer is compressed with {encoding[:40]!r}, unasked")
    return _Decompressed(response, _WINDOW_BITS[encoding])


class _Decompressed:
    """An answer whose body is decompressed as it is read."""

    def __init__(self, response: Response, window_bits: int) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._decompressor = zlib.decompressobj(window_bits)

    async def packet(self) -> bytes:
        while True:
            packet = self._decompressor.unconsumed_tail or await self._response.packet()
            piece = self._decompress(packet)
            if piece or not packet:
                return piece

    async def read(self, limit: int) -> bytes:
        parts, size = [], 0
        while packet := await self.packet():
            size += len(packet)
            if size > limit:
                self.close()
                raise ResponseTooLargeError(f"the answer is larger than {limit} bytes")
            parts.append(packet)
        return b"".join(parts)

    def close(self) -> None:
        self._response.close()

    def _decompress(self, packet: bytes) -> bytes:
        try:
            if not packet and not self._decompressor.eof:
                raise zlib.error("incomplete")
            return self._decompressor.decompress(packet, _PIECE_BYTES)
        except zlib.error as error:
            self.close()
            raise ProtocolError("the answer is compressed, and not as it says") from error
