"""Answers as they come, on both clients: order, memory, errors, leaving early."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest

from tests.batch.conftest import echo
from tests.support import answers
from tests.support.clients import KINDS, Kind, make_client
from tests.support.scripted import RESET, STALL, Reply, Request, ScriptedServer
from tests.support.waiting import eventually, until
from vllm_unified import (
    AsyncVllmUnified,
    BadRequestError,
    BatchAnswer,
    BatchError,
    BatchStoppedError,
    ChatResult,
    CircuitOpenError,
    ClientClosedError,
    ConnectionLostError,
    ModelNotFoundError,
    OutputValidationError,
    VllmUnified,
)

pytestmark = pytest.mark.usefixtures("short_pauses")

MESSAGES = [{"role": "user", "content": "Hello"}]


class Gates:
    """A server that answers a prompt when its gate is opened."""

    def __init__(self, server: ScriptedServer, *prompts: str) -> None:
        self.gates = {prompt: threading.Event() for prompt in prompts}
        server.respond(self._answer)

    def _answer(self, request: Request) -> Reply:
        gate = self.gates.get(request.json["prompt"])
        return echo(request) if gate is None else [gate, *echo(request)]

    def open(self, *prompts: str) -> None:
        for prompt in prompts or self.gates:
            self.gates[prompt].set()


async def all_of(stream: Any) -> list[BatchAnswer]:
    async with stream:
        return [answer async for answer in stream]


async def take(stream: Any, texts: list[str | None]) -> None:
    async with stream:
        async for answer in stream:
            texts.append(answer.text)


class TestOrder:
    async def test_answers_come_as_they_are_ready(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        gates = Gates(server, "a", "b", "c")
        async with vllm.stream_batch(["a", "b", "c"]) as answers_:
            first = asyncio.ensure_future(anext(answers_))
            gates.open("b")
            assert (await first).index == 1
            gates.open("c")
            assert (await anext(answers_)).text == "c"
            gates.open("a")
            last = await anext(answers_)
            assert (last.index, last.text, last.error, last.tries) == (0, "a", None, 1)
            assert [answer async for answer in answers_] == []

    async def test_or_in_the_order_of_the_prompts(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        gates = Gates(server, "a")
        async with vllm.stream_batch(["a", "b", "c"], ordered=True) as answers_:
            first = asyncio.ensure_future(anext(answers_))
            await eventually(lambda: len(server.requests) == 3)
            assert not first.done()
            gates.open()
            assert (await first).index == 0
            assert [answer.index async for answer in answers_] == [1, 2]

    async def test_urgent_ones_are_sent_first(self, server: ScriptedServer) -> None:
        server.respond(echo)
        prompts: list[Any] = ["a", "b", {"prompt": "c", "priority": "high"}]
        for kind in KINDS:
            server.requests.clear()
            async with make_client(kind, api_url=server.url, max_concurrent_requests=1) as vllm:
                assert await vllm.batch(prompts) == ["a", "b", "c"]
            assert [request.json["prompt"] for request in server.requests] == ["c", "a", "b"]


class TestResults:
    async def test_every_form_of_prompt(self, vllm: AsyncVllmUnified) -> None:
        prompts: list[Any] = ["a", [1, 2], MESSAGES, {"prompt": "b"}, {"messages": MESSAGES}]

        found = await all_of(vllm.stream_batch(prompts, ordered=True))

        assert [answer.text for answer in found] == ["a", "[1, 2]", "Hello", "b", "Hello"]
        assert isinstance(found[2].result, ChatResult)

    async def test_each_has_a_result_of_its_own(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        (answer,) = await all_of(vllm.stream_batch(["a"]))

        assert answer.result is not None
        assert answer.result.usage.completion_tokens == 2
        assert answer.result.metadata.endpoint == server.url
        assert answer.result.metadata.duration > 0

    async def test_structured_output(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        class City(msgspec.Struct):
            name: str

        good = [{"role": "user", "content": '{"name": "Paris"}'}]

        found = await all_of(vllm.stream_batch([good, MESSAGES], response_model=City, ordered=True))

        assert isinstance(found[0].result, ChatResult)
        assert found[0].result.parsed == City("Paris")
        assert isinstance(found[1].error, OutputValidationError)
        assert found[1].tries == 1

    async def test_metrics(self, vllm: AsyncVllmUnified, server: ScriptedServer) -> None:
        refusal = answers.error("400 Bad Request", "too hot")
        server.respond(lambda r: [refusal] if r.json["prompt"] == "b" else echo(r))

        done = await vllm.process_batch_with_metrics(None, list("abc"), on_error="return")

        assert [done.texts[0], done.texts[2]] == ["a", "c"]
        assert isinstance(done.texts[1], BadRequestError)
        metrics = done.metrics
        assert (metrics.prompts, metrics.succeeded, metrics.failed) == (3, 2, 1)
        assert (metrics.prompt_tokens, metrics.completion_tokens) == (10, 4)
        assert (metrics.requests, metrics.retries) == (3, 0)
        assert metrics.latency is not None
        assert 0 < metrics.latency.max <= metrics.duration
        assert metrics.tokens_per_second == pytest.approx(4 / metrics.duration)


class TestReading:
    async def test_no_further_than_is_needed(self, server: ScriptedServer) -> None:
        """A consumer that takes nothing holds the reading and the sending back."""
        server.respond(echo)
        for kind in KINDS:
            read = 0

            def prompts() -> Iterator[str]:
                nonlocal read
                for number in range(100_000):
                    read += 1
                    yield str(number)

            async with (
                make_client(kind, api_url=server.url, max_concurrent_requests=4) as vllm,
                vllm.stream_batch(prompts()) as stream,
            ):
                taken = [(await anext(stream)).index for _ in range(10)]
                before = -1
                while read != before:  # until nothing more is read
                    before = read
                    for _ in range(50):
                        await asyncio.sleep(0.002)
                assert read < 1000
                assert len(set(taken)) == 10

    async def test_in_order_a_slow_answer_holds_it_back(self, server: ScriptedServer) -> None:
        gates = Gates(server, "0")
        async with make_client("async", api_url=server.url, max_concurrent_requests=8) as vllm:
            stream = vllm.stream_batch(map(str, range(100_000)), ordered=True, pack=1)
            async with stream:
                first = asyncio.ensure_future(anext(stream))
                before = -1
                while stream.metrics.prompts != before:
                    before = stream.metrics.prompts
                    for _ in range(50):
                        await asyncio.sleep(0.002)
                assert before <= 1024 + 8
                gates.open()
                assert (await first).index == 0
                indices = [(await anext(stream)).index for _ in range(3000)]
                assert indices == list(range(1, 3001))

    async def test_an_asynchronous_generator(self, vllm: AsyncVllmUnified) -> None:
        async def prompts() -> AsyncIterator[str]:
            for letter in "abc":
                await asyncio.sleep(0)
                yield letter

        assert await vllm.batch(prompts()) == ["a", "b", "c"]

    async def test_one_that_waits_for_the_answers(self, vllm: AsyncVllmUnified) -> None:
        """The next prompt depends on the last answer, which must not be held back for it."""
        answered = asyncio.Queue[str]()

        async def prompts() -> AsyncIterator[str]:
            yield "a"
            while len(text := await asyncio.wait_for(answered.get(), 10)) < 4:
                yield text + "a"

        if not isinstance(vllm, AsyncVllmUnified):
            pytest.skip("a queue of this thread's loop")
        texts = []
        async with vllm.stream_batch(prompts()) as stream:
            async for answer in stream:
                assert answer.text is not None
                texts.append(answer.text)
                answered.put_nowait(answer.text)
        assert texts == ["a", "aa", "aaa", "aaaa"]

    @pytest.mark.parametrize("is_async", [False, True])
    async def test_one_that_raises_loses_no_answer(
        self, vllm: AsyncVllmUnified, is_async: bool
    ) -> None:
        def prompts() -> Iterator[str]:
            yield from "abc"
            raise KeyError("mine")

        async def later() -> AsyncIterator[str]:
            for prompt in prompts():
                yield prompt

        texts: list[str | None] = []
        stream = vllm.stream_batch(later() if is_async else prompts())
        with pytest.raises(KeyError, match="mine"):
            await take(stream, texts)
        assert sorted(map(str, texts)) == ["a", "b", "c"]

    async def test_no_prompts_and_equal_prompts(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        assert await all_of(vllm.stream_batch([])) == []
        assert server.requests == []
        assert await vllm.batch(["a"] * 5) == ["a"] * 5
        assert len(server.requests) == 5

    def test_the_blocking_client_reads_in_the_callers_thread(self, server: ScriptedServer) -> None:
        """So prompts may come of code that blocks, or of the client itself."""
        server.respond(echo)
        threads = set()
        with VllmUnified(api_url=server.url) as vllm:

            def prompts() -> Iterator[str]:
                for letter in "abc":
                    threads.add(threading.get_ident())
                    yield vllm.generate(letter).text * 2

            assert vllm.batch(prompts()) == ["aa", "bb", "cc"]
            with vllm.stream_batch(prompts(), ordered=True) as stream:
                assert [answer.text for answer in stream] == ["aa", "bb", "cc"]

        assert threads == {threading.get_ident()}


class TestErrors:
    async def test_they_never_end_the_batch(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        unknown = answers.error("404 Not Found", answers.UNKNOWN_MODEL, param="model")
        server.respond(lambda r: [unknown] if r.json["model"] == "nope" else echo(r))
        prompts: list[Any] = [
            "a",
            5,
            {"prompt": "b", "model": "nope"},
            {"prompt": "c", "max_token": 5},
            {"max_tokens": 5},
            "d",
        ]

        texts = await vllm.batch(prompts, on_error="return")

        assert [type(text) for text in texts] == [
            str,
            BadRequestError,
            ModelNotFoundError,
            BadRequestError,
            BadRequestError,
            str,
        ]
        assert len(server.requests) == 3

    async def test_the_first_is_unknown_and_the_rest_goes_on(self, server: ScriptedServer) -> None:
        unknown = answers.error("404 Not Found", answers.UNKNOWN_MODEL, param="model")
        server.respond(lambda r: [unknown] if r.json.get("model") == "nope" else echo(r))
        for kind in KINDS:
            async with make_client(kind, api_url=server.url, max_concurrent_requests=1) as vllm:
                prompts: list[Any] = [{"prompt": "a", "model": "nope"}, "b"]
                assert (await vllm.batch(prompts, on_error="return"))[1] == "b"

    async def test_a_passing_one_is_tried_again(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        server.reply(RESET).reply(answers.BUSY_ANSWER).respond(echo)

        found = await all_of(vllm.stream_batch(list("abc"), ordered=True))

        assert [answer.text for answer in found] == ["a", "b", "c"]
        assert sum(answer.tries for answer in found) == 5

    async def test_one_that_only_fails_has_its_error_in_the_end(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        broken = answers.error("500 Internal Server Error", "it broke", kind="InternalServerError")
        server.respond(lambda r: [broken] if r.json["prompt"] == "b" else echo(r))

        with pytest.raises(BatchError, match="1 of 3 prompts failed; the first is prompt 1: it br"):
            await vllm.batch(list("abc"))

        assert len(server.requests) == 2 + 4

    async def test_the_last_one_is_told_from_an_outage(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        """Nothing else succeeds any more, as there is nothing else: the servers are asked."""
        server.respond(lambda r: [RESET] if b'"prompt":"b"' in r.body else echo(r))

        texts = await vllm.batch(list("abc"), on_error="return", patience=0.5)

        assert [texts[0], texts[2]] == ["a", "c"]
        assert isinstance(texts[1], ConnectionLostError)

    async def test_a_key_that_is_wrong_is_said_at_once(
        self, vllm: AsyncVllmUnified, server: ScriptedServer
    ) -> None:
        server.always(answers.error("401 Unauthorized", "Unauthorized"))

        with pytest.raises(BatchError, match=r"given up after 0 answers.*does not accept the key"):
            await vllm.batch(["a"] * 1000, patience=600)

        assert len(server.requests) <= 300

    async def test_a_batch_that_is_given_up_has_delivered_its_answers(
        self, server: ScriptedServer
    ) -> None:
        for kind in KINDS:
            server.respond(lambda r: echo(r) if r.body and r.json["prompt"] in "abc" else [RESET])
            async with make_client(
                kind, api_url=server.url, max_retries=0, max_concurrent_requests=2
            ) as vllm:
                texts: list[str | None] = []
                stream = vllm.stream_batch(iter("abcdefghij"), patience=0.3)
                with pytest.raises(BatchStoppedError, match="given up after 3 answers") as caught:
                    await take(stream, texts)
            assert sorted(map(str, texts)) == ["a", "b", "c"]
            assert caught.value.pending
            assert min(caught.value.pending) == 3
            assert caught.value.is_transient_error
            assert isinstance(caught.value.__cause__, ConnectionLostError | CircuitOpenError)

    async def test_a_server_that_is_not_there(self) -> None:
        for kind in KINDS:
            async with make_client(kind, api_url="http://127.0.0.1:9", max_retries=0) as vllm:
                with pytest.raises(BatchError, match="given up") as caught:
                    await vllm.batch(["a", "b"], patience=0.2)
            assert caught.value.results == [None, None]
            assert set(caught.value.errors) == {0, 1}


class TestLeaving:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_early_ends_what_is_under_way(self, server: ScriptedServer, kind: Kind) -> None:
        server.respond(lambda r: echo(r) if r.json["prompt"] == "0" else [STALL])
        before = asyncio.all_tasks()
        async with make_client(kind, api_url=server.url) as vllm:
            async with vllm.stream_batch(map(str, range(20))) as stream:
                async for answer in stream:
                    assert answer.text == "0"
                    break
            await eventually(lambda: server.open_connections <= 1)  # one is kept
            assert [status.in_flight for status in vllm.list_endpoints()] == [0]
            assert asyncio.all_tasks() == before
            with pytest.raises(ClientClosedError):
                await anext(stream)

    async def test_a_cancelled_batch_leaves_nothing(self, server: ScriptedServer) -> None:
        server.always(STALL)
        async with AsyncVllmUnified(api_url=server.url) as vllm:
            before = asyncio.all_tasks()
            running = asyncio.ensure_future(vllm.batch(["a"] * 20))
            await eventually(lambda: len(server.requests) == 20)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert asyncio.all_tasks() == before
            assert vllm.list_endpoints()[0].in_flight == 0
            await eventually(lambda: server.open_connections == 0)

    @pytest.mark.parametrize("kind", KINDS)
    async def test_a_client_that_is_closed_ends_it(
        self, server: ScriptedServer, kind: Kind
    ) -> None:
        server.always(STALL)
        vllm = make_client(kind, api_url=server.url)
        running = asyncio.ensure_future(vllm.batch(["a"] * 5))
        await eventually(lambda: len(server.requests) == 5)
        await vllm.close()
        with pytest.raises((ClientClosedError, BatchError)):
            await running

    async def test_a_forgotten_one_warns_and_ends(self, server: ScriptedServer) -> None:
        server.respond(lambda r: echo(r) if r.json["prompt"] == "0" else [STALL])
        async with AsyncVllmUnified(api_url=server.url) as vllm:
            before = asyncio.all_tasks()
            stream = vllm.stream_batch(map(str, range(5)))
            assert (await anext(stream)).text == "0"
            with pytest.warns(ResourceWarning, match="was left without being closed"):
                del stream
            await eventually(lambda: asyncio.all_tasks() == before)
            assert vllm.list_endpoints()[0].in_flight == 0

    def test_an_interrupt_in_the_callers_generator(self, server: ScriptedServer) -> None:
        server.respond(lambda r: [STALL])

        def prompts() -> Iterator[str]:
            yield "a"
            until(lambda: len(server.requests) == 1)
            raise KeyboardInterrupt

        with VllmUnified(api_url=server.url) as vllm:
            with pytest.raises(KeyboardInterrupt):
                vllm.batch(prompts())
            until(lambda: server.open_connections == 0)
            assert vllm.list_endpoints()[0].in_flight == 0
