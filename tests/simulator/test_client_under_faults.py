"""The client's own fault cases once more, with the simulator in the place of scripted bytes.

The expectations are those of ``tests/test_errors.py``, so the two servers cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.clients import KINDS, Kind, make_client
from tests.test_errors import KEY, STREAMED, WHOLE, check, error_of, shown
from vllm_unified import (
    AsyncVllmUnified,
    AuthenticationError,
    ConnectError,
    ConnectionLostError,
    EngineDeadError,
    RequestTimeoutError,
    VllmError,
)
from vllm_unified.simulator import BackgroundSimulator, Fleet

pytestmark = pytest.mark.usefixtures("no_pauses")

TEXT = {"prompt": "Tell me a story", "max_tokens": 40, "ignore_eos": True}

WHOLE_FAULTS: dict[str, dict[str, Any]] = {
    "busy": {"kind": "busy"},
    "too many": {"kind": "rate_limit", "seconds": 0},
    "engine dead": {"kind": "error_frame"},
    "bad gateway": {"kind": "html", "status": 502},
    "reset before the answer": {"kind": "reset"},
    "reset in the body": {"kind": "reset_after", "after_tokens": 2},
    "closed in the body": {"kind": "close_after", "after_tokens": 2},
    "malformed JSON": {"kind": "malformed_json"},
    "an HTML page": {"kind": "html", "status": 200},
    "no head in time": {"kind": "stall"},
    "no body in time": {"kind": "stall_after", "after_tokens": 2},
}
STREAM_FAULTS: dict[str, dict[str, Any]] = {
    "error frame before text": {"kind": "error_frame"},
    "error frame after text": {"kind": "error_frame", "after_tokens": 3},
    "cut after text": {"kind": "close_after", "after_tokens": 3},
    "reset after text": {"kind": "reset_after", "after_tokens": 3},
    "cut before text": {"kind": "reset_after"},
    "malformed JSON": {"kind": "malformed_json"},
    "stalled": {"kind": "stall_after", "after_tokens": 3},
    "no token in time": {"kind": "stall_after"},
    "a page in place of a stream": {"kind": "html", "status": 200},
    "busy": {"kind": "busy"},
}
REQUESTS: dict[str, dict[str, Any]] = {
    "unknown model": {"model": "nobody"},
    "bad parameter": {"temperature": -1.0},
    "too long": {"prompt": [1] * 3000},
}
# What a healthy answer survives unchanged.
HARMLESS: dict[str, dict[str, Any]] = {
    "cut characters": {"kind": "split_utf8"},
    "one byte per packet": {"kind": "byte_per_packet"},
    "a line of 4 MB": {"kind": "long_line"},
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    value: Kind = request.param
    return value


@pytest.fixture
def server(vllm_fleet: Fleet) -> BackgroundSimulator:
    return vllm_fleet.add(model="m", api_keys=(KEY,), max_model_len=2048)


def generating(**fields: Any) -> Callable[[AsyncVllmUnified], Any]:
    async def generate(vllm: AsyncVllmUnified) -> None:
        await vllm.make_request(None, {"model": "m", **TEXT, **fields}, request_id="req-1")

    return generate


async def streaming(vllm: AsyncVllmUnified) -> None:
    async with vllm.stream_generation(None, TEXT, "m", request_id="req-1") as chunks:
        async for _ in chunks:
            pass


@pytest.mark.parametrize("name", WHOLE_FAULTS)
async def test_a_call_that_fails(kind: Kind, name: str, server: BackgroundSimulator) -> None:
    case = WHOLE[name]
    server.fail_next(times=10, **WHOLE_FAULTS[name])

    error = await error_of(kind, generating(), server.url, **case.settings)

    check(error, case, server.url)
    assert len(server.requests) == case.attempts
    assert KEY not in shown(error)


@pytest.mark.parametrize("name", STREAM_FAULTS)
async def test_a_stream_that_fails(kind: Kind, name: str, server: BackgroundSimulator) -> None:
    case, fault = STREAMED[name], STREAM_FAULTS[name]
    server.fail_next(times=10, **fault)

    error = await error_of(kind, streaming, server.url, **case.settings)

    check(error, case, server.url)
    assert error.partial is not None
    assert bool(error.partial.text) == bool(fault.get("after_tokens"))
    assert len(server.requests) == case.attempts
    assert KEY not in shown(error)


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_that_is_refused(
    kind: Kind, name: str, server: BackgroundSimulator
) -> None:
    case, wrong = WHOLE[name], REQUESTS[name]

    error = await error_of(kind, generating(**wrong), server.url, **case.settings)

    assert (type(error), error.status_code) == (case.kind, case.status)
    assert error.model == wrong.get("model", "m")
    assert len(server.requests) == 1


async def test_a_key_that_is_wrong(kind: Kind, server: BackgroundSimulator) -> None:
    async with make_client(kind, api_url=server.url, api_key="another") as vllm:
        with pytest.raises(AuthenticationError) as caught:
            await vllm.generate("a")
    assert "another" not in shown(caught.value)


@pytest.mark.parametrize("name", HARMLESS)
async def test_what_an_answer_survives(kind: Kind, name: str, server: BackgroundSimulator) -> None:
    fields = {**TEXT, "prompt": "日本語 🐉", "return_token_ids": True}
    async with make_client(kind, api_url=server.url, api_key=KEY) as vllm:
        healthy = await vllm.stream_generation(None, fields, "m").collect()
        server.fail_next(**HARMLESS[name])
        harmed = await vllm.stream_generation(None, fields, "m").collect()
    assert harmed.choices[0].token_ids == healthy.choices[0].token_ids
    assert harmed.text.endswith(healthy.text)


async def test_a_server_that_restarts_is_tried_again(
    kind: Kind, server: BackgroundSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_unified.fleet.fleet.random", lambda: 0.1)
    server.fail_next("restart")
    async with make_client(kind, api_url=server.url, api_key=KEY, max_retries=5) as vllm:
        result = await vllm.generate("a", max_tokens=2)
    assert result.metadata.attempts[0].error is not None
    assert result.metadata.attempts[-1].error is None


async def test_a_connection_that_died_in_the_pool(kind: Kind, server: BackgroundSimulator) -> None:
    server.fail_next("stale_connection")
    async with make_client(kind, api_url=server.url, api_key=KEY) as vllm:
        first = await vllm.generate("a", max_tokens=2)
        second = await vllm.generate("a", max_tokens=2)
    assert first.text == second.text
    assert len(first.metadata.attempts) == 1


async def test_health_lies_and_a_probe_does_not(kind: Kind, server: BackgroundSimulator) -> None:
    async with make_client(kind, api_url=server.url, api_key=KEY) as vllm:
        server.hang()
        assert await vllm.health()
        found = await vllm.health(probe=True, timeout=0.2)
        server.heal()
        assert await vllm.health(probe=True)
    assert isinstance(found.error, RequestTimeoutError)


async def test_an_engine_that_dies_and_a_server_that_goes(
    kind: Kind, server: BackgroundSimulator
) -> None:
    errors: list[VllmError] = []
    async with make_client(kind, api_url=server.url, api_key=KEY, max_retries=0) as vllm:
        for harm in (server.kill_engine, server.kill):
            harm()
            with pytest.raises(VllmError) as caught:
                await vllm.generate("a")
            errors.append(caught.value)
    assert isinstance(errors[0], EngineDeadError)
    # Refused, or lost on a connection of the pool that does not know yet.
    assert isinstance(errors[1], ConnectError | ConnectionLostError)
