"""The clients that are compared, each as its users use it, behind one small surface.

A class is made in the client's own environment, so it imports the client when it is made.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

CONNECTIONS = 4096
"""No client is held back by its own limit of connections."""
SECONDS = 60.0
MAX_TOKENS = 64


class Client(Protocol):
    """Chats and streams with one user message."""

    async def chat(self, prompt: str) -> str:
        """The content of the answer."""

    def stream(self, prompt: str) -> AsyncIterator[str]:
        """The pieces of the answer."""

    async def close(self) -> None:
        """Close its connections."""


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _body(prompt: str, *, stream: bool = False) -> dict[str, Any]:
    body = {"model": "sim", "messages": _messages(prompt), "max_tokens": MAX_TOKENS}
    return {**body, "stream": True} if stream else body


class Unified:
    """This client, with all that it does by default: queue, limit, breaker, retries, statistics."""

    def __init__(self, ports: list[int]) -> None:
        from vllm_unified import AsyncVllmUnified

        settings: dict[str, Any] = {"model": "sim", "api_key": "key", "timeout": SECONDS}
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        resources = {"endpoints": urls} if len(urls) > 1 else None
        self.client = AsyncVllmUnified(
            resources,
            api_url=urls[0],
            max_concurrent_requests=CONNECTIONS,
            queue_size=200_000,
            **settings,
        )

    async def chat(self, prompt: str) -> str:
        result = await self.client.chat(_messages(prompt), max_tokens=MAX_TOKENS)
        return result.content

    async def stream(self, prompt: str) -> AsyncIterator[str]:
        async with self.client.stream_chat(_messages(prompt), max_tokens=MAX_TOKENS) as chunks:
            async for chunk in chunks:
                yield chunk.text

    async def batch(self, count: int, pack: int | None) -> int:
        """Answers to so many prompts, ``pack`` of them in a request."""
        prompts = [f"Tell me a short story about the number {number}" for number in range(count)]
        return len(await self.client.batch(prompts, max_tokens=MAX_TOKENS, pack=pack))

    async def close(self) -> None:
        await self.client.close()


class OpenAI:
    """openai-python."""

    def __init__(self, ports: list[int], *, aiohttp: bool = False) -> None:
        import openai

        http = openai.DefaultAioHttpClient() if aiohttp else None
        self.client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{ports[0]}/v1",
            api_key="key",
            timeout=SECONDS,
            http_client=http,
        )

    async def chat(self, prompt: str) -> str:
        answer = await self.client.chat.completions.create(**_body(prompt))
        return answer.choices[0].message.content or ""

    async def stream(self, prompt: str) -> AsyncIterator[str]:
        async with await self.client.chat.completions.create(
            **_body(prompt, stream=True)
        ) as chunks:
            async for chunk in chunks:
                yield chunk.choices[0].delta.content or ""

    async def close(self) -> None:
        await self.client.close()


class LiteLLM:
    """LiteLLM: ``acompletion``, or its router with one deployment."""

    def __init__(self, ports: list[int], *, router: bool = False) -> None:
        import litellm

        # It takes 100 equal chunks for a model that is stuck.
        litellm.REPEATED_STREAMING_CHUNK_LIMIT = 10**9
        litellm.telemetry = False
        server = {"api_base": f"http://127.0.0.1:{ports[0]}/v1", "api_key": "key"}
        model = "hosted_vllm/sim"
        self._call: Callable[..., Any]
        if router:
            deployment = {"model_name": "sim", "litellm_params": {"model": model, **server}}
            self._router = litellm.Router(model_list=[deployment], timeout=SECONDS)
            self._call = self._router.acompletion
        else:
            self._call = litellm.acompletion
        self._fixed = {"model": "sim"} if router else {"model": model, "timeout": SECONDS, **server}

    async def chat(self, prompt: str) -> str:
        answer = await self._call(**{**_body(prompt), **self._fixed})
        return answer.choices[0].message.content or ""

    async def stream(self, prompt: str) -> AsyncIterator[str]:
        async for chunk in await self._call(**{**_body(prompt, stream=True), **self._fixed}):
            yield chunk.choices[0].delta.content or ""

    async def close(self) -> None:
        pass


class Aiohttp:
    """aiohttp and orjson, and nothing around them."""

    def __init__(self, ports: list[int]) -> None:
        import aiohttp
        import orjson

        self._url = f"http://127.0.0.1:{ports[0]}/v1/chat/completions"
        self._dumps, self._loads = orjson.dumps, orjson.loads
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Authorization": "Bearer key", "Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=SECONDS),
            read_bufsize=2**18,
        )

    async def chat(self, prompt: str) -> str:
        async with self._session.post(self._url, data=self._dumps(_body(prompt))) as answer:
            content: str = self._loads(await answer.read())["choices"][0]["message"]["content"]
            return content

    async def stream(self, prompt: str) -> AsyncIterator[str]:
        body = self._dumps(_body(prompt, stream=True))
        async with self._session.post(self._url, data=body) as answer:
            async for text in _texts(answer.content.iter_any(), self._loads):
                yield text

    async def close(self) -> None:
        await self._session.close()


class Wreq:
    """wreq, a client in Rust, and orjson."""

    def __init__(self, ports: list[int]) -> None:
        import orjson
        import wreq

        self._url = f"http://127.0.0.1:{ports[0]}/v1/chat/completions"
        self._dumps, self._loads = orjson.dumps, orjson.loads
        self._client = wreq.Client()
        self._headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}

    async def chat(self, prompt: str) -> str:
        body = self._dumps(_body(prompt))
        answer = await self._client.post(self._url, headers=self._headers, body=body)
        content: str = self._loads(await answer.bytes())["choices"][0]["message"]["content"]
        return content

    async def stream(self, prompt: str) -> AsyncIterator[str]:
        body = self._dumps(_body(prompt, stream=True))
        answer = await self._client.post(self._url, headers=self._headers, body=body)
        async with answer.stream() as packets:
            async for text in _texts(packets, self._loads):
                yield text

    async def close(self) -> None:
        pass


async def _texts(packets: Any, loads: Callable[[bytes], Any]) -> AsyncIterator[str]:
    """The texts of the events in the packets."""
    rest = b""
    async for packet in packets:
        *events, rest = (rest + packet).split(b"\n\n")
        for event in events:
            if event != b"data: [DONE]":
                yield loads(event[6:])["choices"][0]["delta"]["content"]


class Floor:
    """A protocol on asyncio over httptools: bytes that are ready, a future for each answer, and
    nothing that makes a client of it, not even the decoding."""

    def __init__(self, ports: list[int]) -> None:
        self._port = ports[0]
        self._idle: list[_FloorConnection] = []
        self._all: list[_FloorConnection] = []

    async def chat(self, prompt: str) -> str:
        connection = self._idle.pop() if self._idle else await self._connect()
        await connection.send(_floor_request(prompt, stream=False))
        self._idle.append(connection)
        return ""

    async def stream(self, prompt: str) -> AsyncIterator[str]:
        connection = self._idle.pop() if self._idle else await self._connect()
        done = connection.send(_floor_request(prompt, stream=True))
        async for body in connection.bodies(done):
            for _ in range(body.count(b'"index"')):
                yield ""
        self._idle.append(connection)

    async def close(self) -> None:
        for connection in self._all:
            connection.transport.close()

    async def _connect(self) -> _FloorConnection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_FloorConnection, "127.0.0.1", self._port)
        self._all.append(connection)
        return connection


_ready: dict[tuple[str, bool], bytes] = {}


def _floor_request(prompt: str, *, stream: bool) -> bytes:
    request = _ready.get((prompt, stream))
    if request is None:
        body = json.dumps(_body(prompt, stream=stream)).replace(": ", ":").encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        _ready[prompt, stream] = request
    return request


class _FloorConnection(asyncio.Protocol):
    def __init__(self) -> None:
        import httptools

        self.transport: Any = None
        self._loop = asyncio.get_running_loop()
        self._body: list[bytes] = []
        self._done: asyncio.Future[None] | None = None
        self._more: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)

    def send(self, request: bytes) -> asyncio.Future[None]:
        self._body = []
        self._done = self._loop.create_future()
        self.transport.write(request)
        return self._done

    async def bodies(self, done: asyncio.Future[None]) -> AsyncIterator[bytes]:
        while self._body or not done.done():
            if not self._body:
                self._more = self._loop.create_future()
                await self._more
            body, self._body = self._body, []
            if body:
                yield b"".join(body)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class Blocking:
    """This client's blocking form. ``stream`` counts the pieces."""

    def __init__(self, port: int) -> None:
        from vllm_unified import VllmUnified

        self.client = VllmUnified(
            api_url=f"http://127.0.0.1:{port}",
            model="sim",
            api_key="key",
            timeout=SECONDS,
            max_concurrent_requests=CONNECTIONS,
        )

    def chat(self, prompt: str) -> str:
        """The content of the answer."""
        return self.client.chat(_messages(prompt), max_tokens=MAX_TOKENS).content

    def stream(self, prompt: str) -> Iterator[str]:
        """The pieces of the answer."""
        with self.client.stream_chat(_messages(prompt), max_tokens=MAX_TOKENS) as chunks:
            for chunk in chunks:
                yield chunk.text

    def close(self) -> None:
        """End its thread."""
        self.client.close()


@dataclass(frozen=True)
class Kind:
    """A client, where it is installed, and how it is run."""

    title: str
    environment: str
    make: Callable[[list[int]], Client]
    loop: str = "uvloop"
    threads: int = 0
    """Of the blocking client; 0: it is not blocking."""
    ports: int = 1


KINDS = {
    "unified": Kind("vllm-unified", "unified", Unified),
    "unified-asyncio": Kind("vllm-unified, asyncio's loop", "unified", Unified, loop="asyncio"),
    "unified-fleet": Kind("vllm-unified, fleet of 16", "unified", Unified, ports=16),
    "blocking-1": Kind("vllm-unified, blocking", "unified", Unified, threads=1),
    "blocking-32": Kind("vllm-unified, blocking, 32 threads", "unified", Unified, threads=32),
    "openai": Kind("openai-python, httpx2", "openai", OpenAI),
    "openai-aiohttp": Kind("openai-python, aiohttp", "openai", partial(OpenAI, aiohttp=True)),
    "litellm": Kind("LiteLLM acompletion", "litellm", LiteLLM),
    "litellm-router": Kind("LiteLLM Router", "litellm", partial(LiteLLM, router=True)),
    "aiohttp": Kind("aiohttp + orjson, bare", "unified", Aiohttp),
    "wreq": Kind("wreq + orjson, bare", "unified", Wreq),
    "floor": Kind("raw protocol (the floor)", "unified", Floor),
}
ENVIRONMENTS = {
    "unified": ["-e", ".[speed]", "aiohttp", "wreq", "orjson", "matplotlib"],
    "openai": ["openai[aiohttp]", "uvloop"],
    "litellm": ["litellm", "uvloop"],
}
"""What pip installs, from the repository's root."""
