"""Every method of the surface, in scenarios that run on both clients."""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support import answers
from tests.support.answers import text_event
from tests.support.clients import KINDS, Kind, make_client
from tests.support.scripted import CLOSE, STALL, Reply, Request, ScriptedServer
from tests.support.waiting import eventually
from vllm_unified import (
    AsyncVllmUnified,
    BadRequestError,
    BatchError,
    BatchStoppedError,
    ChatResult,
    ClientClosedError,
    ConfigurationError,
    GenerationResult,
    Health,
    OutputValidationError,
    OverloadedError,
    QueueFullError,
    RequestTimeoutError,
    StreamTruncatedError,
    VllmError,
    VllmUnified,
)

pytestmark = pytest.mark.usefixtures("no_pauses")

MESSAGES = [{"role": "user", "content": "Hello"}]
ROOT = Path(__file__).parent.parent


class City(msgspec.Struct):
    name: str


def echo(request: Request) -> Reply:
    """A server whose model repeats what it is told."""
    body = request.json
    if "messages" in body:
        said = body["messages"][-1]["content"]
        if body.get("stream"):
            frames = [answers.delta_event({"content": piece}) for piece in (said[:2], said[2:])]
            end = answers.delta_event({}, finish_reason="stop")
            return answers.events(answers.ROLE_EVENT, *frames, end)
        return [answers.chat(said)]
    prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    if isinstance(prompts[0], int):
        prompts = [str(prompts)]
    if body.get("stream"):
        return answers.texts([*prompts[0]])
    return [answers.completion(*map(str, prompts))]


@pytest.fixture(params=KINDS)
async def vllm(
    request: pytest.FixtureRequest, server: ScriptedServer
) -> AsyncIterator[AsyncVllmUnified]:
    server.respond(echo)
    async with make_client(
        request.param, api_url=server.url, model="base", timeout=30, max_retries=0
    ) as vllm:
        yield vllm


@pytest.fixture
def sent(server: ScriptedServer) -> Callable[[], Any]:
    """The body of the last request."""
    return lambda: server.requests[-1].json


class TestRequests:
    @pytest.mark.parametrize(
        ("data", "text"),
        [
            ("Hello", "Hello"),
            ([1, 2, 3], "[1, 2, 3]"),
            (["a", "b"], "a"),
            ({"prompt": "Hello", "max_tokens": 5}, "Hello"),
            (MESSAGES, "Hello"),
            ({"messages": MESSAGES, "max_tokens": 5}, "Hello"),
        ],
    )
    async def test_every_form_of_data(
        self, vllm: AsyncVllmUnified, server: ScriptedServer, data: Any, text: str
    ) -> None:
        result = await vllm.make_request(server.url, data)

        assert result.text == text
        assert result.finish_reason == "stop"
        assert result.metadata.endpoint == server.url
        assert len(result.metadata.attempts) == 1
        assert result.metadata.attempts[0].error is None

    async def test_messages_come_back_as_a_chat(self, vllm: AsyncVllmUnified) -> None:
        assert isinstance(await vllm.make_request(None, MESSAGES), ChatResult)
        assert type(await vllm.make_request(None, "Hello")) is GenerationResult

    async def test_several_prompts(self, vllm: AsyncVllmUnified) -> None:
        assert (await vllm.generate(["a", "b"])).texts == ["a", "b"]

    async def test_a_url_may_be_that_of_any_api(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        for suffix in ("", "/", "/v1", "/v1/", "/v1/completions", "/v1/chat/completions"):
            await vllm.make_request(server.url + suffix, "Hello")

        assert {request.target for request in server.requests} == {"/v1/completions"}

    async def test_keywords_win_over_options_and_those_over_data(
        self, vllm: AsyncVllmUnified, sent: Callable[[], Any]
    ) -> None:
        data = {"prompt": "a", "seed": 1, "top_p": 0.1, "top_k": 1}

        await vllm.make_request(None, data, None, {"top_p": 0.2, "top_k": 2}, top_k=3)

        assert sent() == {"prompt": "a", "seed": 1, "top_p": 0.2, "top_k": 3, "model": "base"}

    @pytest.mark.parametrize(
        ("argument", "options", "data", "model"),
        [
            ("x", {"model": "y"}, "a", "x"),
            (None, {"model": "y"}, {"prompt": "a", "model": "z"}, "y"),
            (None, None, {"prompt": "a", "model": "z"}, "z"),
            (None, {"model": None}, "a", "base"),
        ],
    )
    async def test_which_model(
        self,
        vllm: AsyncVllmUnified,
        sent: Callable[[], Any],
        argument: str | None,
        options: dict[str, Any] | None,
        data: Any,
        model: str,
    ) -> None:
        await vllm.make_request(None, data, argument, options)

        assert sent()["model"] == model

    async def test_settings_of_a_call_are_not_sent(
        self, vllm: AsyncVllmUnified, sent: Callable[[], Any]
    ) -> None:
        await vllm.generate(
            "a",
            timeout=3,
            first_token_timeout=3,
            idle_timeout=3,
            total_timeout=3,
            max_retries=1,
            headers={"x-a": "1"},
            extra_body={"my_field": 1},
        )

        assert sent() == {"prompt": "a", "model": "base", "my_field": 1}

    async def test_settings_of_a_call_are_in_force(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        server.reply(answers.BUSY_ANSWER)

        result = await vllm.make_request(None, "a", None, {"max_retries": 1})

        assert len(result.metadata.attempts) == 2

    @pytest.mark.parametrize(
        "call",
        [
            lambda vllm: vllm.generate("a", max_token=5),
            lambda vllm: vllm.generate(None),
            lambda vllm: vllm.chat([]),
            lambda vllm: vllm.make_request(None, "a", None, [("a", 1)]),
            lambda vllm: vllm.generate("a", timeout="soon"),
            lambda vllm: vllm.make_request("ftp://a", "a"),
            lambda vllm: vllm.make_request(5, "a"),
            lambda vllm: vllm.generate("a", temperature=float("nan")),
            lambda vllm: vllm.stream("a", max_token=5).collect(),
            lambda vllm: vllm.stream_chat("a", headers={"a\n": "b"}).collect(),
            lambda vllm: vllm.batch("one prompt"),
            lambda vllm: vllm.tokenize([{"content": 1}]),
            lambda vllm: vllm.detokenize("text"),
            lambda vllm: vllm.embed([]),
        ],
    )
    async def test_what_is_wrong_is_said_before_anything_is_sent(
        self, vllm: AsyncVllmUnified, server: ScriptedServer, call: Callable[[Any], Any]
    ) -> None:
        async def run() -> None:
            await call(vllm)

        with pytest.raises((BadRequestError, ConfigurationError)):
            await run()

        assert server.requests == []

    async def test_the_line_is_bounded(self, server: ScriptedServer) -> None:
        together = threading.Event()
        server.always(together, answers.completion("a"))
        for kind in KINDS:
            async with make_client(
                kind, api_url=server.url, max_concurrent_requests=2, queue_size=1
            ) as vllm:
                before = len(server.requests)
                together.clear()
                calls = [asyncio.create_task(vllm.generate("a")) for _ in range(4)]
                await eventually(
                    lambda calls=calls: sum(call.done() for call in calls) == 1  # type: ignore[misc]
                )
                await eventually(
                    lambda before=before: len(server.requests) == before + 2  # type: ignore[misc]
                )
                together.set()
                results = await asyncio.gather(*calls, return_exceptions=True)

            assert [type(result) for result in results].count(QueueFullError) == 1
            assert len(server.requests) == before + 3


class TestChat:
    async def test_a_string_is_a_message(
        self, vllm: AsyncVllmUnified, sent: Callable[[], Any]
    ) -> None:
        result = await vllm.chat("Hello", {"model": "m"}, max_tokens=5)

        assert result.content == "Hello"
        assert sent() == {"model": "m", "max_tokens": 5, "messages": MESSAGES}

    async def test_another_server(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        with ScriptedServer() as other:
            other.respond(echo)
            await vllm.chat("Hello", {"endpoint_url": other.url})
            await vllm.chat("Hello", endpoint_url=other.url + "/v1")

            assert len(other.requests) == 2
        assert server.requests == []

    async def test_a_structure(self, vllm: AsyncVllmUnified, sent: Callable[[], Any]) -> None:
        result = await vllm.chat('{"name": "Paris"}', response_model=City)

        assert result.parsed == City("Paris")
        assert sent()["response_format"]["type"] == "json_schema"

    async def test_a_structure_that_is_wrong(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        with pytest.raises(OutputValidationError) as caught:
            await vllm.chat("Paris", response_model=City)

        assert caught.value.text == "Paris"
        assert caught.value.endpoint == server.url
        assert len(caught.value.attempts) == 1

    async def test_the_next_turn(self, vllm: AsyncVllmUnified, sent: Callable[[], Any]) -> None:
        first = await vllm.chat("Hello")

        await vllm.chat([*MESSAGES, first.message, {"role": "user", "content": "More"}])

        assert [message["role"] for message in sent()["messages"]] == ["user", "assistant", "user"]


class TestStreams:
    async def test_a_completion(self, vllm: AsyncVllmUnified, sent: Callable[[], Any]) -> None:
        async with vllm.stream("abc", max_tokens=5) as stream:
            texts = [chunk.text async for chunk in stream]

        assert texts == ["a", "b", "c"]
        assert (stream.ending, stream.text) == ("complete", "abc")
        assert stream.usage is not None
        assert type(stream.result) is GenerationResult
        assert sent()["stream"] is True

    async def test_at_a_server_with_a_model_and_parameters(
        self, vllm: AsyncVllmUnified, server: ScriptedServer, sent: Callable[[], Any]
    ) -> None:
        stream = vllm.stream_generation(server.url, "abc", "m", {"top_k": 1, "seed": 1}, seed=2)

        assert (await stream.collect()).text == "abc"
        assert (sent()["model"], sent()["top_k"], sent()["seed"]) == ("m", 1, 2)

    async def test_messages(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        result = await vllm.stream_generation(server.url, MESSAGES).collect()

        assert isinstance(result, ChatResult)
        assert result.content == "Hello"

    async def test_a_chat(self, vllm: AsyncVllmUnified) -> None:
        stream = vllm.stream_chat("Hello")

        assert [text async for text in stream.texts()] == ["He", "llo"]
        assert stream.result.content == "Hello"

    async def test_a_chat_with_a_structure(self, vllm: AsyncVllmUnified) -> None:
        result = await vllm.stream_chat('{"name": "Paris"}', response_model=City).collect()

        assert result.parsed == City("Paris")

    async def test_chunks_come_as_they_are_sent(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        more = threading.Event()
        end = answers.chunked(text_event("b", finish_reason="stop") + answers.DONE) + answers.END
        server.always(answers.sse(text_event("a")), more, end)

        async with vllm.stream("x") as stream:
            first = await anext(stream)
            assert (first.text, stream.ending) == ("a", None)
            more.set()
            assert (await anext(stream)).text == "b"

    async def test_left_early_the_server_stops(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        server.always(answers.sse(text_event("a")), STALL)

        async with vllm.stream("x") as stream:
            async for _ in stream:
                break

        await eventually(lambda: server.open_connections == 0)
        assert stream.ending == "cancelled"

    async def test_what_came_is_delivered_before_the_error(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        server.always(answers.sse(text_event("a"), text_event("b")), CLOSE)
        texts = []

        async def read() -> None:
            async for chunk in vllm.stream("x"):
                texts.append(chunk.text)

        with pytest.raises(StreamTruncatedError):
            await read()

        assert texts == ["a", "b"]

    async def test_nothing_is_sent_before_it_is_asked_for(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        stream = vllm.stream("abc")
        await stream.close()

        assert server.connections == 0


class TestBatches:
    async def test_answers_are_in_order_whatever_comes_first(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        gates = {str(number): threading.Event() for number in range(8)}
        server.respond(lambda request: [gates[request.json["prompt"]], *echo(request)])

        running = asyncio.ensure_future(vllm.batch(list(gates)))
        await eventually(lambda: len(server.requests) == 8)
        for gate in reversed(gates.values()):
            gate.set()

        assert await running == list(gates)

    async def test_a_model_and_parameters_for_all_and_for_one(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        prompts: list[Any] = [
            "a",
            {"prompt": "b", "seed": 2, "model": "other"},
            {"messages": MESSAGES},
        ]

        texts = await vllm.process_batch(server.url, prompts, "m", {"seed": 1, "top_k": 1}, top_k=3)

        assert texts == ["a", "b", "Hello"]
        bodies = {
            json.dumps(body.get("prompt")): body for body in (r.json for r in server.requests)
        }
        assert (bodies['"a"']["model"], bodies['"a"']["seed"], bodies['"a"']["top_k"]) == (
            "m",
            1,
            3,
        )
        assert (bodies['"b"']["model"], bodies['"b"']["seed"]) == ("other", 2)

    async def test_progress(self, vllm: AsyncVllmUnified) -> None:
        done: list[int] = []

        await vllm.batch(["a", "b", "c"], on_progress=done.append)

        assert done == [1, 2, 3]

    async def test_prompts_may_be_made_as_they_are_needed(self, vllm: AsyncVllmUnified) -> None:
        assert await vllm.batch(str(number) for number in range(40)) == [
            str(number) for number in range(40)
        ]

    async def test_no_prompts(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        assert await vllm.batch([]) == []
        assert server.requests == []

    async def test_wrong_prompts_leave_the_answers_of_the_others(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        refusal = answers.error("400 Bad Request", "too hot")
        server.respond(lambda r: [refusal] if r.json["prompt"] in "bd" else echo(r))

        with pytest.raises(BatchError, match="2 of 5 prompts failed; the first is prompt 1") as e:
            await vllm.batch(list("abcde"))

        assert e.value.results == ["a", None, "c", None, "e"]
        assert {index: type(error) for index, error in e.value.errors.items()} == {
            1: BadRequestError,
            3: BadRequestError,
        }
        assert e.value.__cause__ is e.value.errors[1]

    async def test_a_server_that_only_refuses_is_given_up(self, server: ScriptedServer) -> None:
        server.always(answers.BUSY_ANSWER)
        for kind in KINDS:
            async with make_client(
                kind, api_url=server.url, max_retries=0, max_concurrent_requests=2
            ) as vllm:
                with pytest.raises(BatchError, match="given up after 0 answers") as caught:
                    await vllm.batch(["a"] * 50, patience=0.3)

            assert caught.value.results == [None] * 50
            assert caught.value.is_transient_error
            assert {type(error) for error in caught.value.errors.values()} == {OverloadedError}
            assert len(caught.value.errors) < 10  # the others were not sent
            assert isinstance(caught.value.__cause__, BatchStoppedError)

    async def test_as_many_at_once_as_the_settings_say(self, server: ScriptedServer) -> None:
        gate = threading.Event()
        server.respond(lambda request: [gate, *echo(request)])
        for kind in KINDS:
            gate.clear()
            before = len(server.requests)
            async with make_client(kind, api_url=server.url, max_concurrent_requests=3) as vllm:
                running = asyncio.ensure_future(vllm.batch(list("abcdef")))
                await eventually(
                    lambda before=before: len(server.requests) == before + 3  # type: ignore[misc]
                )
                gate.set()
                assert await running == list("abcdef")

    @pytest.mark.parametrize("where", ["prompts", "progress"])
    async def test_the_callers_own_exception_comes_out_as_it_is(
        self, vllm: AsyncVllmUnified, where: str
    ) -> None:
        def prompts() -> Any:
            yield "a"
            if where == "prompts":
                raise KeyError("mine")

        def progress(done: int) -> None:
            if where == "progress":
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            await vllm.batch(prompts(), on_progress=progress)


class TestHandlers:
    async def test_a_handler(
        self, vllm: AsyncVllmUnified, server: ScriptedServer, sent: Callable[[], Any]
    ) -> None:
        handler = vllm.create_vllm_endpoint_handler(server.url, "m")

        result = await handler("Hello", max_tokens=5)

        assert result.text == "Hello"
        assert sent() == {"prompt": "Hello", "model": "m", "max_tokens": 5}

    @pytest.mark.parametrize(
        ("data", "more", "seed", "model"),
        [
            ("a", {}, 1, "m"),
            ("a", {"seed": 2, "model": "n"}, 2, "n"),
            ({"prompt": "a", "seed": 3, "model": "o"}, {}, 3, "o"),
            ({"prompt": "a", "seed": 3}, {"seed": 2}, 2, "m"),
        ],
    )
    async def test_a_handler_with_parameters(
        self,
        vllm: AsyncVllmUnified,
        sent: Callable[[], Any],
        data: Any,
        more: dict[str, Any],
        seed: int,
        model: str,
    ) -> None:
        handler = vllm.create_vllm_endpoint_handler_with_params(None, "m", {"seed": 1, "top_k": 4})

        await handler(data, **more)

        assert sent() == {"prompt": "a", "model": model, "seed": seed, "top_k": 4}

    async def test_a_handler_keeps_its_own_parameters(self, vllm: AsyncVllmUnified) -> None:
        params = {"seed": 1}
        handler = vllm.create_vllm_endpoint_handler_with_params(None, "m", params)
        params["max_token"] = 5

        await handler("a")


def test_a_handlers_repr_has_no_values() -> None:
    handler = AsyncVllmUnified().create_vllm_endpoint_handler_with_params(
        None, "m", {"headers": {"authorization": "geheim"}}
    )

    assert repr(handler) == "<EndpointHandler m, headers>"


class TestOtherCalls:
    async def test_models(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        server.always(answers.response({"data": [{"id": "base"}, {"id": "sql", "parent": "base"}]}))

        models = await vllm.list_models()

        assert [model.id for model in models] == ["base", "sql"]
        assert [model.id for model in await vllm.list_models(server.url)] == ["base", "sql"]
        assert (server.requests[0].method, server.requests[0].target) == ("GET", "/v1/models")

    async def test_tokens(
        self, vllm: AsyncVllmUnified, server: ScriptedServer, sent: Callable[[], Any]
    ) -> None:
        body = {"count": 2, "max_model_len": 9, "tokens": [1, 2], "token_strs": None}
        server.always(answers.response(body))

        tokens = await vllm.tokenize("ab", add_special_tokens=False, timeout=3)

        assert tokens.tokens == (1, 2)
        assert sent() == {"prompt": "ab", "model": "base", "add_special_tokens": False}
        await vllm.tokenize(MESSAGES, model="m", endpoint_url=server.url)
        assert sent() == {"messages": MESSAGES, "model": "m"}

    async def test_text_of_tokens(
        self, vllm: AsyncVllmUnified, server: ScriptedServer, sent: Callable[[], Any]
    ) -> None:
        server.always(answers.response({"prompt": "ab"}))

        assert await vllm.detokenize([1, 2]) == "ab"
        assert sent() == {"tokens": [1, 2], "model": "base"}

    async def test_embeddings(
        self, vllm: AsyncVllmUnified, server: ScriptedServer, sent: Callable[[], Any]
    ) -> None:
        data = [{"index": 0, "embedding": [0.5, 1.0]}]
        server.always(answers.response({"model": "e", "data": data, "usage": answers.usage()}))

        result = await vllm.embed("ab", model="e", dimensions=2, timeout=3)

        assert result.embeddings == ((0.5, 1.0),)
        assert result.metadata.endpoint == server.url
        assert sent() == {
            "input": "ab",
            "model": "e",
            "encoding_format": "float",
            "dimensions": 2,
        }


class TestHealth:
    async def test_well(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        server.always(answers.response(b""))

        health = await vllm.health()

        assert health
        assert isinstance(health, Health)
        assert (health.endpoint, health.proven, health.error) == (server.url, False, None)
        assert server.requests[0].target == "/health"

    async def test_proven(
        self, vllm: AsyncVllmUnified, server: ScriptedServer, sent: Callable[[], Any]
    ) -> None:
        server.reply(answers.response(b"")).always(answers.completion("a"))

        health = await vllm.health(probe=True)

        assert health.healthy
        assert health.proven
        assert (sent()["max_tokens"], sent()["model"]) == (1, "base")

    async def test_an_engine_that_hangs_behind_a_server_that_is_well(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        server.reply(answers.response(b"")).always(STALL)

        health = await vllm.health(probe=True, timeout=0.1)

        assert not health
        assert isinstance(health.error, RequestTimeoutError)
        assert health.duration < 4

    @pytest.mark.parametrize(
        "reply", [(answers.response(status="503 Service Unavailable"),), (CLOSE,), (STALL,)]
    )
    async def test_not_well(
        self, vllm: AsyncVllmUnified, server: ScriptedServer, reply: Reply
    ) -> None:
        server.always(*reply)

        health = await vllm.health(server.url, timeout=0.5)

        assert not health
        assert isinstance(health.error, VllmError)
        assert len(server.requests) == 1


class TestEndpoints:
    async def test_one_of_its_own(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        endpoint = vllm.create_endpoint(
            {"id": "gpu", "url": server.url, "apiKey": "key", "model": "m"}, max_retries=1
        )

        result = await vllm.make_request_with_endpoint(endpoint, "Hello", options={"seed": 1})
        chat = await vllm.chat_with_endpoint(endpoint, "Hello")
        stream = await vllm.stream_with_endpoint(endpoint, "Hello", params={"seed": 1}).collect()

        assert (result.text, chat.content, stream.text) == ("Hello", "Hello", "Hello")
        assert {request.headers["authorization"] for request in server.requests} == {"Bearer key"}
        assert {request.json["model"] for request in server.requests} == {"m"}

    async def test_it_is_a_place_for_every_call(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        endpoint = vllm.create_endpoint(server.url, model="m")
        handler = vllm.create_vllm_endpoint_handler(endpoint)

        assert (await vllm.make_request(endpoint, "a")).text == "a"
        assert (await vllm.chat("a", endpoint_url=endpoint)).content == "a"
        assert await vllm.process_batch(endpoint, ["a", "b"]) == ["a", "b"]
        assert (await handler("a")).text == "a"
        assert {request.json["model"] for request in server.requests} == {"m"}

    async def test_by_its_id(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        vllm.create_endpoint({"id": "gpu", "url": server.url}, model="m")

        assert (await vllm.make_request("gpu", "a")).text == "a"
        assert server.requests[0].json["model"] == "m"

    async def test_whether_it_generates(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        server.reply(answers.response(b""))
        endpoint = vllm.create_endpoint(server.url)

        health = await vllm.test_endpoint(endpoint, timeout=3)

        assert health.proven
        assert [request.target for request in server.requests] == ["/health", "/v1/completions"]

    async def test_a_look_shuts_out_and_lets_in(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        endpoint = vllm.create_endpoint(server.url)
        server.reply(CLOSE)
        assert not await vllm.check_endpoint(endpoint, timeout=3)
        assert vllm.list_endpoints()[0].state == "open"

        server.reply(answers.response(b""))
        server.reply(answers.completion("a"))
        server.always(answers.response({"data": [{"id": "x"}]}))
        assert (await vllm.check_endpoint(endpoint, timeout=3)).proven

        (status,) = vllm.list_endpoints()
        assert (status.state, status.error, status.models) == ("closed", None, ("x",))

    async def test_how_all_of_them_do(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        vllm.create_endpoint({"id": "gpu", "url": "http://gpu"}, max_concurrent_requests=7)
        await vllm.generate("a")

        gpu, plain = vllm.list_endpoints()

        assert (gpu.id, gpu.url, gpu.capacity) == ("gpu", "http://gpu", 7)
        assert (plain.url, plain.state, plain.stats.success) == (server.url, "closed", 1)

    async def test_one_that_is_removed(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        endpoint = vllm.create_endpoint(server.url)

        assert await vllm.remove_endpoint(endpoint, timeout=3)

        assert vllm.list_endpoints() == []
        with pytest.raises(ConfigurationError, match="was removed"):
            await vllm.make_request(endpoint, "a")

    @pytest.mark.parametrize("kind", KINDS)
    async def test_one_of_another_client(
        self, vllm: AsyncVllmUnified, server: ScriptedServer, kind: Kind
    ) -> None:
        async with make_client(kind) as other:
            endpoint = other.create_endpoint(server.url)

            with pytest.raises(ConfigurationError, match="another client"):
                await vllm.make_request(endpoint, "a")

        assert server.requests == []


class TestStatistics:
    async def test_of_one_and_of_all(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        endpoint = vllm.create_endpoint(server.url)
        await vllm.make_request(endpoint, "a", "m")
        await vllm.generate("a")

        one, all_of_them = vllm.get_stats(endpoint), vllm.get_stats()

        assert (one.success, one.completion_tokens) == (1, 2)
        assert vllm.get_stats(server.url).success == 1
        assert all_of_them.overall.requests == 2
        assert set(all_of_them.models) == {"m", "base"}
        assert "vllm_unified_requests_total" in all_of_them.to_prometheus()

    async def test_from_zero_again(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        endpoint = vllm.create_endpoint(server.url)
        await vllm.make_request(endpoint, "a")
        await vllm.generate("a")

        vllm.reset_stats(endpoint)
        assert (vllm.get_stats(endpoint).requests, vllm.get_stats().overall.requests) == (0, 1)
        vllm.reset_stats()
        assert vllm.get_stats().overall.requests == 0


class TestLoadBalancers:
    async def test_every_call(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        async with vllm.create_load_balancer({"one": server.url, "two": server.url}) as balancer:
            assert (await balancer.generate("a")).text == "a"
            assert (await balancer.chat("a", response_model=None)).content == "a"
            assert (await balancer.stream("abc").collect()).text == "abc"
            assert (await balancer.stream_chat("abc").collect()).content == "abc"
            assert await balancer.batch(["a", "b"]) == ["a", "b"]
            assert (await vllm.make_request_with_load_balancer(balancer, "a", "m")).text == "a"
            assert (await vllm.make_request(balancer, "a")).text == "a"
            assert [endpoint.id for endpoint in balancer.endpoints] == ["one", "two"]

    async def test_a_retry_goes_to_another_server(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        with ScriptedServer() as broken:
            balancer = vllm.create_load_balancer(
                [broken.url, server.url],
                {"strategy": lambda candidates, route: candidates[0]},
                max_retries=1,
            )

            result = await balancer.generate("a")

            tried = [attempt.endpoint for attempt in result.metadata.attempts]
            assert tried == [broken.url, server.url]

    async def test_members_come_and_go(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        with ScriptedServer() as other:
            other.respond(echo)
            balancer = vllm.create_load_balancer([other.url])
            member = balancer.add_endpoint({"id": "gpu", "url": server.url})
            balancer.remove_endpoint(balancer.endpoints[0])

            assert (await balancer.generate("a")).text == "a"
            assert balancer.endpoints == (member,)
            assert other.requests == []
        assert len(vllm.list_endpoints()) == 2

    async def test_a_closed_one(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        async with vllm.create_load_balancer([server.url]) as balancer:
            pass

        with pytest.raises(ClientClosedError):
            await balancer.generate("a")
        assert (await vllm.generate("a")).text == "a"

    async def test_health_is_that_of_the_best(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        server.always(answers.response(b""))
        with ScriptedServer() as broken:
            balancer = vllm.create_load_balancer([broken.url, server.url])

            health = await vllm.health(balancer)

        assert (health.healthy, health.endpoint) == (True, server.url)

    async def test_the_health_of_nobody(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        balancer = vllm.create_load_balancer([server.url])
        balancer.remove_endpoint(balancer.endpoints[0])

        with pytest.raises(ConfigurationError, match="no endpoint"):
            await vllm.health(balancer)

    @pytest.mark.parametrize("kind", KINDS)
    async def test_as_the_default(self, server: ScriptedServer, kind: Kind) -> None:
        server.respond(echo)
        resources = {"endpoints": {"gpu": server.url}, "strategy": "round_robin"}

        async with make_client(kind, resources=resources) as vllm:
            assert (await vllm.generate("a")).text == "a"
            assert [status.id for status in vllm.list_endpoints()] == ["gpu"]


class TestEvents:
    async def test_on_once_and_off(self, vllm: AsyncVllmUnified) -> None:
        every: list[Any] = []
        first: list[Any] = []
        never: list[Any] = []
        vllm.on("request_end", every.append)
        vllm.once("request_end", first.append)
        vllm.on("request_end", never.append)
        vllm.off("request_end", never.append)

        for _ in range(2):
            await vllm.generate("a")

        assert (len(every), len(first), len(never)) == (2, 1, 0)
        assert [event.model for event in every] == ["base", "base"]
        vllm.off("request_end")
        await vllm.generate("a")
        assert len(every) == 2

    async def test_one_that_there_is_not(self, vllm: AsyncVllmUnified) -> None:
        with pytest.raises(ConfigurationError, match="no event"):
            vllm.on("request_begin", print)


class TestClosing:
    async def test_a_closed_client_says_so(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        await vllm.generate("a")

        await vllm.close()
        await vllm.close()

        for call in (vllm.generate, vllm.chat, vllm.tokenize, vllm.embed):
            with pytest.raises(ClientClosedError, match="closed"):
                await call("a")
        await eventually(lambda: server.open_connections == 0)

    async def test_a_stream_of_a_closed_client_does_not_hang(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        server.always(answers.sse(text_event("a")), STALL)
        stream = vllm.stream("x")
        await anext(stream)

        await vllm.close()

        with pytest.raises(VllmError):
            await asyncio.wait_for(anext(stream), 20)
        await stream.close()
        await eventually(lambda: server.open_connections == 0)

    async def test_closing_ends_the_calls_under_way(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        server.always(STALL)
        call = asyncio.ensure_future(vllm.generate("a"))
        await eventually(lambda: len(server.requests) == 1)

        await vllm.close()

        with pytest.raises(VllmError):
            await asyncio.wait_for(call, 20)


def public(kind: type) -> dict[str, Any]:
    return {
        name: getattr(kind, name)
        for name in dir(kind)
        if not name.startswith("_") or name == "__init__"
    }


def test_both_have_the_same_names() -> None:
    assert public(AsyncVllmUnified).keys() == public(VllmUnified).keys()


def blocking_form(annotation: str) -> str:
    for one, other in (
        ("GenerationStream[", "BlockingStream["),
        ("Awaitable[GenerationResult]", "GenerationResult"),
        ("LoadBalancer", "BlockingLoadBalancer"),
        ("BatchStream", "BlockingBatchStream"),
    ):
        annotation = annotation.replace(one, other)
    return annotation


@pytest.mark.parametrize("name", public(AsyncVllmUnified))
def test_both_have_the_same_signatures_and_words(name: str) -> None:
    one, other = public(AsyncVllmUnified)[name], public(VllmUnified)[name]
    if isinstance(one, property):
        one, other = one.fget, other.fget
    expected, found = inspect.signature(one), inspect.signature(other)

    assert expected.parameters == found.parameters
    assert blocking_form(str(expected.return_annotation)) == str(found.return_annotation)
    assert inspect.iscoroutinefunction(other) is False
    if name != "close":
        assert inspect.getdoc(one) == inspect.getdoc(other)


def test_the_blocking_client_is_generated_from_the_other() -> None:
    script = ROOT / "scripts" / "generate_blocking.py"

    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
