"""What connections are behind: two small protocols, so that another HTTP library takes one file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Response(Protocol):
    """An answer whose head has come."""

    @property
    def status(self) -> int:
        """HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers; names in any case."""

    async def packet(self) -> bytes:
        """The next bytes of the body, as they come; ``b""`` at its end.

        Raises:
            ConnectionLostError: the connection broke before the end.
        """

    async def read(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            ConnectionLostError: the connection broke before the end.
            ResponseTooLargeError: it is larger than ``limit`` bytes.
        """

    def close(self) -> None:
        """Give the connection back if the body was read to its end; cut it otherwise, so that
        the server stops working. May be called twice."""


class Transport(Protocol):
    """Sends requests over connections that it keeps."""

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> Response:
        """Send a request, and wait for the head of its answer. Cancelling cuts the connection.

        Raises:
            ConnectError: nothing was sent.
            ConnectionLostError: the connection broke after the request was sent.
            ProtocolError: the answer is not HTTP.
        """

    async def close(self) -> None:
        """Close all connections."""
