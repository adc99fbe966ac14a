"""Every way in which a real vLLM fails a request."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.live.conftest import KEY, MAX_IN_FLIGHT
from tests.live.observing import post, requests_at, seconds_until_requests
from tests.support.clients import KINDS, Kind, make_client
from tests.support.vllm import running
from tests.support.waiting import eventually, until
from vllm_unified import (
    AsyncVllmUnified,
    AuthenticationError,
    BadRequestError,
    CircuitOpenError,
    ConnectError,
    ConnectionLostError,
    ContextLengthError,
    EngineDeadError,
    GenerationAbortedError,
    GenerationResult,
    GenerationStream,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    RequestTimeoutError,
    StreamStalledError,
    VllmError,
)
from vllm_unified.servers import LocalServer, ServerSpec
from vllm_unified.servers.guard import session_members
from vllm_unified.settings import Settings
from vllm_unified.wire.http import HttpTransport
from vllm_unified.wire.transport import Response

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]

LONG: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True}
BURSTS = 5
"""How often one is tried: which streams arrive together is up to the machine."""


@pytest.fixture(params=KINDS)
async def vllm(request: pytest.FixtureRequest, url: str) -> AsyncIterator[AsyncVllmUnified]:
    kind: Kind = request.param
    async with make_client(kind, api_url=url, timeout=60, max_retries=0) as client:
        yield client


def check_details(error: VllmError, url: str, *, model: str | None = None) -> None:
    """The error says where, what and how often; and the key nowhere."""
    assert error.endpoint == url
    assert error.model == model
    assert error.request_id
    assert error.attempts[-1].endpoint == url
    assert type(error).__name__ in (error.attempts[-1].error or "")
    assert error.attempts[-1].status_code == error.status_code
    assert url in str(error)
    assert error.hint or isinstance(error, BadRequestError)  # there the server says it
    shown = [str(error), repr(error), repr(vars(error)), *traceback.format_exception(error)]
    assert KEY not in "".join(shown)


# Requests that the server refuses.


async def test_an_unknown_model(vllm: AsyncVllmUnified, url: str) -> None:
    with pytest.raises(ModelNotFoundError, match="`nope` does not exist") as caught:
        await vllm.chat("Hi", model="nope")
    assert caught.value.status_code == 404
    assert "list_models" in str(caught.value)
    check_details(caught.value, url, model="nope")


@pytest.mark.parametrize("key", ["sk-wrong", ""])
async def test_a_key_that_is_wrong_or_missing(key: str, url: str) -> None:
    async with AsyncVllmUnified(api_url=url, api_key=key) as vllm:
        with pytest.raises(AuthenticationError, match="Unauthorized") as caught:
            await vllm.generate("Hi", max_tokens=1)
    assert caught.value.status_code == 401
    assert "VLLM_API_KEY" in str(caught.value)
    assert "sk-wrong" not in "".join(traceback.format_exception(caught.value))
    check_details(caught.value, url)


async def test_a_parameter_out_of_its_range(vllm: AsyncVllmUnified, url: str) -> None:
    with pytest.raises(BadRequestError, match=r"temperature.*-1") as caught:
        await vllm.generate("Hi", temperature=-1.0)
    assert caught.value.status_code == 400
    assert not caught.value.is_transient_error
    check_details(caught.value, url)


async def test_a_prompt_longer_than_the_context(vllm: AsyncVllmUnified, url: str) -> None:
    with pytest.raises(ContextLengthError, match="2048") as caught:
        await vllm.generate("dragon " * 3000, max_tokens=1)
    assert caught.value.status_code == 400
    assert "--max-model-len" in str(caught.value)
    check_details(caught.value, url)


async def test_a_stream_that_is_refused_says_so_before_it_begins(
    vllm: AsyncVllmUnified, url: str
) -> None:
    stream = vllm.stream("dragon " * 3000, max_tokens=1)
    with pytest.raises(ContextLengthError) as caught:
        await stream.collect()
    assert stream.ending == "error"
    check_details(caught.value, url)


async def test_what_the_engine_refuses_inside_a_200(vllm: AsyncVllmUnified, url: str) -> None:
    """vLLM checks token ids in its engine, after a stream's headers are sent."""
    stream = vllm.stream("Hi", allowed_token_ids=[10_000_000], max_tokens=1)
    with pytest.raises(BadRequestError) as caught:
        await stream.collect()
    assert caught.value.status_code == 400
    check_details(caught.value, url)


async def test_a_path_that_this_server_has_not(vllm: AsyncVllmUnified, url: str) -> None:
    with pytest.raises(NotFoundError, match="POST /v1/embeddings") as caught:
        await vllm.embed("Hi")
    assert caught.value.status_code == 404
    assert "cannot do this" in str(caught.value)
    check_details(caught.value, url)


# Servers that are full.


class Statuses(HttpTransport):
    """The transport, with a list of the statuses that came."""

    def __init__(self) -> None:
        super().__init__(Settings())
        self.seen: list[int] = []

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> Response:
        response = await super().open(method, url, headers=headers, body=body)
        self.seen.append(response.status)
        return response


@pytest.fixture
async def full_server(url: str) -> AsyncIterator[GenerationStream[GenerationResult]]:
    """A stream of as many answers as the server takes; when it is closed, there is room."""
    async with AsyncVllmUnified(api_url=url, timeout=60) as vllm:
        async with vllm.stream("Once upon a time", n=MAX_IN_FLIGHT, **LONG) as stream:
            yield stream
        await seconds_until_requests(url, 0, within=10)


@pytest.mark.usefixtures("full_server")
async def test_a_full_server_refuses_with_a_status(vllm: AsyncVllmUnified, url: str) -> None:
    for refused in (vllm.generate("Hi"), vllm.stream_chat("Hi").collect()):
        with pytest.raises(OverloadedError, match="currently busy") as caught:
            await refused
        assert caught.value.status_code == 503
        assert caught.value.is_transient_error
        assert "add a server" in str(caught.value)
        check_details(caught.value, url)


async def test_a_burst_is_refused_inside_a_200(url: str) -> None:
    """Streams that pass the first check together fail at the second, in an error frame."""
    for _ in range(BURSTS):
        transport = Statuses()
        async with AsyncVllmUnified(
            {"transport": transport}, api_url=url, timeout=120, max_retries=0
        ) as vllm:
            streams = [vllm.stream("Hi", max_tokens=40, ignore_eos=True) for _ in range(120)]
            outcomes = await asyncio.gather(
                *(stream.collect() for stream in streams), return_exceptions=True
            )
        refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
        answered = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert len(refused) + len(answered) == 120
        for error in refused:
            check_details(error, url)
        if len(answered) < transport.seen.count(200):
            return
    pytest.fail("none was refused inside a 200")


async def test_a_refused_request_is_tried_again_until_there_is_room(
    url: str, full_server: GenerationStream[GenerationResult]
) -> None:
    transport = Statuses()
    async with AsyncVllmUnified(
        {"transport": transport}, api_url=url, timeout=60, max_retries=10
    ) as vllm:
        request = asyncio.create_task(vllm.generate("Hi", max_tokens=1))
        await eventually(lambda: 503 in transport.seen)
        await full_server.close()
        attempts = (await request).metadata.attempts
    assert attempts[0].status_code == 503
    assert attempts[-1].error is None


# Servers that are not there, or do not move.


async def failure_of(stream: GenerationStream[Any], *, after_five: Callable[[], None]) -> VllmError:
    """Read until the stream fails; its error has just what was delivered."""
    texts = []

    async def read() -> None:
        async with stream:
            async for text in stream.texts():
                texts.append(text)
                if len(texts) == 5:
                    await asyncio.to_thread(after_five)

    error = await error_of(read())
    assert error.partial is not None
    assert error.partial.ending == stream.ending
    assert error.partial.text == "".join(texts) == stream.text
    return error


async def error_of(call: Awaitable[object]) -> VllmError:
    with pytest.raises(VllmError) as caught:
        await call
    return caught.value


async def test_nothing_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with AsyncVllmUnified(api_url=url, api_key=KEY, proxy="", max_retries=1) as vllm:
            with pytest.raises(ConnectError, match="refused") as caught:
                await vllm.generate("Hi")
    assert len(caught.value.attempts) == 2
    assert "vllm-unified serve" in str(caught.value)
    check_details(caught.value, url)


@pytest.fixture(params=["pause?mode=keep", "sleep?level=1&mode=keep"])
def halt(request: pytest.FixtureRequest, url: str) -> Iterator[str]:
    """The call that halts the engine; afterwards it goes on."""
    yield f"{url}/{request.param}"
    post(f"{url}/{'resume' if 'pause' in request.param else 'wake_up'}")
    until(lambda: requests_at(url) == 0, 10)


async def test_an_engine_that_is_halted_only_looks_healthy(
    halt: str, vllm: AsyncVllmUnified, url: str
) -> None:
    post(halt)
    assert await vllm.health()
    health = await vllm.health(probe=True, timeout=1)
    assert not health
    assert isinstance(health.error, RequestTimeoutError)
    with pytest.raises(RequestTimeoutError, match=r"no answer within 0\.5 s") as caught:
        await vllm.generate("Hi", timeout=0.5)
    check_details(caught.value, url)
    with pytest.raises(RequestTimeoutError, match="no token within") as caught:
        await vllm.stream("Hi", first_token_timeout=0.5).collect()
    check_details(caught.value, url)


async def test_an_engine_that_is_halted_stalls_a_stream(
    halt: str, vllm: AsyncVllmUnified, url: str
) -> None:
    stream = vllm.stream("Once upon a time", idle_timeout=1, **LONG)
    error = await failure_of(stream, after_five=lambda: post(halt))
    assert isinstance(error, StreamStalledError)
    assert stream.ending == "stalled"
    assert "nothing came for 1 s" in str(error)
    check_details(error, url)


async def test_the_server_aborts_a_generation(vllm: AsyncVllmUnified, url: str) -> None:
    stream = vllm.stream("Once upon a time", **LONG)
    try:
        error = await failure_of(stream, after_five=lambda: post(f"{url}/pause?mode=abort"))
    finally:
        post(f"{url}/resume")
    assert isinstance(error, GenerationAbortedError)
    assert stream.ending == "error"
    assert error.is_transient_error
    check_details(error, url)


# A server that dies.


@pytest.fixture
def victim() -> Iterator[LocalServer]:
    """A server that nobody else uses."""
    with running(ServerSpec(served_model_name="victim", api_key=KEY, max_restarts=0)) as server:
        yield server


def kill_engine(server: LocalServer) -> None:
    def title(pid: int) -> bytes:
        return Path(f"/proc/{pid}/cmdline").read_bytes()

    [core] = [pid for pid in session_members(server.pid) if b"EngineCore" in title(pid)]
    os.kill(core, signal.SIGKILL)


async def test_the_engine_dies_in_mid_stream(victim: LocalServer) -> None:
    async with AsyncVllmUnified(api_url=victim.url, api_key=KEY, proxy="", max_retries=0) as vllm:
        stream = vllm.stream("Once upon a time", model="victim", **LONG)
        error = await failure_of(stream, after_five=lambda: kill_engine(victim))
        assert isinstance(error, EngineDeadError)
        assert stream.ending == "error"
        assert error.status_code == 500
        assert "restarted" in str(error)
        check_details(error, victim.url, model="victim")

        # The server answers for as long as its watchdog takes, then it is gone.
        after: VllmError | None = None
        async with asyncio.timeout(30):
            while not isinstance(after, ConnectError):
                after = await error_of(vllm.generate("Hi", model="victim", timeout=5))
                assert isinstance(
                    after, EngineDeadError | ConnectionLostError | ConnectError | CircuitOpenError
                )
                if not isinstance(after, CircuitOpenError):  # that was never sent
                    check_details(after, victim.url, model="victim")
