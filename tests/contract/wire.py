"""A client that knows nothing: it sends JSON and keeps what comes back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec


class Reply(msgspec.Struct):
    """An answer as it came."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def header_names(self) -> list[str]:
        return [name for name, _ in self.headers]

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def frames(self) -> list[str]:
        """Data of every event of a stream, which must be framed as vLLM frames it."""
        *events, rest = self.text.split("\n\n")
        assert rest == "", f"the stream ends inside an event: {rest!r}"
        assert all(event.startswith("data: ") for event in events), events
        return [event.removeprefix("data: ") for event in events]

    @property
    def chunks(self) -> list[Any]:
        """The frames before [DONE], which must be the last one."""
        *frames, last = self.frames
        assert last == "[DONE]"
        return [json.loads(frame) for frame in frames]


class Target(msgspec.Struct):
    """A server under test."""

    url: str
    model: str
    key: str
    adapter: str
    """Path of a LoRA adapter that it can load."""
    busy_url: str
    """The same server with ``--max-num-queued-reqs 2``."""

    async def send(
        self,
        method: str,
        path: str,
        payload: Any = None,
        *,
        data: bytes | None = None,
        headers: dict[str, str] | None = None,
        url: str | None = None,
        key: bool = True,
    ) -> Reply:
        """One request, its answer read to the end."""
        async with self.open(
            method, path, payload, data=data, headers=headers, url=url, key=key
        ) as response:
            body = await response.read()
            raw = [(name.decode(), value.decode()) for name, value in response.raw_headers]
            return Reply(response.status, raw, body)

    @asynccontextmanager
    async def open(
        self,
        method: str,
        path: str,
        payload: Any = None,
        *,
        data: bytes | None = None,
        headers: dict[str, str] | None = None,
        url: str | None = None,
        key: bool = True,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request whose answer the caller reads; leaving closes the connection."""
        sent = {"authorization": f"Bearer {self.key}"} if key else {}
        if payload is not None:
            data = json.dumps(payload).encode()
        if data is not None:
            sent["content-type"] = "application/json"
        sent |= headers or {}
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
            session.request(
                method, (url or self.url) + path, data=data, headers=sent, allow_redirects=False
            ) as response,
        ):
            yield response

    async def complete(self, **fields: Any) -> Reply:
        """A greedy completion of three tokens, unless the fields say otherwise."""
        body = {"model": self.model, "prompt": "Once upon a time", "max_tokens": 3}
        return await self.send("POST", "/v1/completions", body | {"temperature": 0} | fields)

    async def chat(self, **fields: Any) -> Reply:
        """A greedy chat answer of three tokens, unless the fields say otherwise."""
        messages = [{"role": "user", "content": "Say hi"}]
        body = {"model": self.model, "messages": messages, "max_tokens": 3, "temperature": 0}
        return await self.send("POST", "/v1/chat/completions", body | fields)

    async def metrics(self) -> dict[str, float]:
        """Every sample, by its name and labels as they stand."""
        page = (await self.send("GET", "/metrics")).text
        lines = [line for line in page.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    async def sample(self, name: str, **labels: str) -> float:
        """The sum of the samples of a metric that have these labels; 0 if there are none."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            value
            for sample, value in (await self.metrics()).items()
            if sample.partition("{")[0] == name and all(pair in sample for pair in wanted)
        )
