"""HardwareAbstractionLayer, with backends that do as they are told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.hardware.backends import Batched, Scripted, Streamed, taken_over
from tests.support.waiting import eventually
from vllm_unified import (
    AuthenticationError,
    BackendError,
    BadRequestError,
    BatchError,
    BreakerConfig,
    ClientClosedError,
    ConfigurationError,
    ConnectError,
    ContextLengthError,
    ModelNotFoundError,
    NoBackendError,
    QueueFullError,
    ServerStartError,
    UnsupportedError,
    VllmError,
)
from vllm_unified.hardware import HardwareAbstractionLayer

HELLO = {"input": "Hello, world!"}
QUICK = BreakerConfig(failure_threshold=2, reset_timeout=0.01, half_open_successful_calls=1)
SLOW = BreakerConfig(failure_threshold=1, reset_timeout=600, half_open_successful_calls=1)


@pytest.fixture
async def hal() -> AsyncIterator[HardwareAbstractionLayer]:
    async with HardwareAbstractionLayer(breaker=QUICK) as layer:
        yield layer


class TestRegistration:
    async def test_a_function_gets_the_requests_dict(self, hal: HardwareAbstractionLayer) -> None:
        seen: list[Any] = []
        hal.register_backend("resize", seen.append, name="plain")
        assert (await hal.run_inference("resize", {"width": 3}, height=4)).output is None
        assert seen == [{"width": 3, "height": 4}]

    async def test_a_blocking_function_does_not_hold_the_loop(
        self, hal: HardwareAbstractionLayer
    ) -> None:
        go_on = threading.Event()
        hal.register_backend("llm", lambda request: go_on.wait(10))
        call = asyncio.create_task(hal.run_inference("llm", HELLO))
        await eventually(lambda: hal.statistics().backends["callable"].in_flight == 1)
        go_on.set()
        assert (await call).output is True

    async def test_asynchronous_functions_and_objects(self, hal: HardwareAbstractionLayer) -> None:
        async def answer(request: dict[str, Any]) -> str:
            return f"<{request['input']}>"

        class Caller:
            async def __call__(self, request: dict[str, Any]) -> str:
                return await answer(request)

        assert hal.register_backend("llm", answer) == "answer"
        assert hal.register_backend("mine", Caller()) == "Caller"
        assert (await hal.run_inference("llm", "a")).text == "<a>"
        assert (await hal.run_inference("mine", "b")).text == "<b>"

    async def test_names(self, hal: HardwareAbstractionLayer) -> None:
        one, other = Scripted("same"), Scripted("same")
        assert hal.register_backend("llm", one) == "same"
        assert hal.register_backend("llm", other) == "same-2"
        assert hal.register_backend("chat", one, priority=7) == "same"
        assert hal.list_backends("chat")[0].tasks == {"llm": 0, "chat": 7}
        with pytest.raises(ConfigurationError, match="another backend"):
            hal.register_backend("llm", Scripted("x"), name="same")
        with pytest.raises(ConfigurationError, match="already"):
            hal.register_backend("llm", one, name="new")

    @pytest.mark.parametrize("value", [None, 3, "http://localhost:8000"])
    async def test_what_is_no_backend(self, hal: HardwareAbstractionLayer, value: Any) -> None:
        with pytest.raises(ConfigurationError, match="is no backend"):
            hal.register_backend("llm", value)

    async def test_a_class_is_none_either(self, hal: HardwareAbstractionLayer) -> None:
        with pytest.raises(ConfigurationError, match="Scripted is a class"):
            hal.register_backend("llm", Scripted)

    async def test_unregistered(self, hal: HardwareAbstractionLayer) -> None:
        backend = Scripted("a")
        hal.register_backend("llm", backend)
        hal.register_backend("chat", backend)
        hal.unregister_backend(backend, "chat")
        with pytest.raises(NoBackendError, match="no backend is registered for 'chat'") as caught:
            await hal.run_inference("chat", "Hello")
        assert "There are backends for: llm." in str(caught.value)
        hal.unregister_backend("a")
        assert hal.list_backends() == []
        with pytest.raises(ConfigurationError, match="not registered"):
            hal.unregister_backend("a")

    async def test_a_closed_layer(self, hal: HardwareAbstractionLayer) -> None:
        hal.register_backend("llm", Scripted("a"))
        await hal.close()
        with pytest.raises(ClientClosedError):
            await hal.run_inference("llm", HELLO)


class TestFailover:
    @pytest.mark.parametrize(
        "error",
        [
            ConnectError("nobody"),
            QueueFullError("full"),
            ModelNotFoundError("unknown"),
            AuthenticationError("no key"),
            UnsupportedError("cannot"),
            ServerStartError("no start"),
            ConnectionResetError("gone"),
            RuntimeError("out of memory"),
        ],
        ids=lambda error: type(error).__name__,
    )
    async def test_what_another_backend_may_do_better(
        self, hal: HardwareAbstractionLayer, error: Exception
    ) -> None:
        first, second = Scripted("first"), Scripted("second")
        first.failing = [error]
        hal.register_backend("llm", first, priority=1)
        hal.register_backend("llm", second)

        result = await hal.run_inference("llm", HELLO)

        assert (result.backend, result.text) == ("second", "second")
        assert result.selection.chosen == "first"
        failed, answered = result.attempts
        assert (failed.backend, answered.backend) == ("first", "second")
        assert error.args[0] in (failed.error or "")
        assert answered.error is None
        figures = hal.statistics()
        assert (figures.success, figures.errors, figures.failovers) == (1, 0, 1)
        assert figures.backends["first"].errors == 1
        assert figures.backends["second"].taken_over == 1

    @pytest.mark.parametrize(
        "error",
        [BadRequestError("wrong"), ConfigurationError("wrong"), ValueError("wrong"), KeyError("x")],
        ids=lambda error: type(error).__name__,
    )
    async def test_the_callers_own_mistakes_stay(
        self, hal: HardwareAbstractionLayer, error: Exception
    ) -> None:
        first, second = Scripted("first"), Scripted("second")
        first.failing = [error] * 3
        hal.register_backend("llm", first, priority=1)
        hal.register_backend("llm", second)

        for _ in range(3):
            with pytest.raises(VllmError) as caught:
                await hal.run_inference("llm", HELLO)

        assert second.requests == []
        assert [attempt.backend for attempt in caught.value.attempts] == ["first"]
        assert not caught.value.is_transient_error
        assert hal.list_backends()[0].state == "closed"
        if not isinstance(error, VllmError):
            assert isinstance(caught.value, BackendError)
            assert caught.value.__cause__ is error

    async def test_when_all_fail(self, hal: HardwareAbstractionLayer) -> None:
        for name in "abc":
            backend = Scripted(name)
            backend.failing = [ConnectError(f"nobody at {name}")]
            hal.register_backend("llm", backend)

        with pytest.raises(ConnectError, match="nobody at c") as caught:
            await hal.run_inference("llm", HELLO)

        assert [attempt.backend for attempt in caught.value.attempts] == ["a", "b", "c"]
        assert any("nobody at a" in note for note in caught.value.__notes__)
        assert hal.statistics().errors == 1

    async def test_a_longer_context_elsewhere(self, hal: HardwareAbstractionLayer) -> None:
        short = Scripted("short", models={"m": 10})
        short.failing = [ContextLengthError("too long"), ContextLengthError("too long")]
        shorter, longer = Scripted("shorter", models={"m": 5}), Scripted("longer", models={"m": 99})
        hal.register_backend("llm", short, priority=9)
        hal.register_backend("llm", shorter, priority=5)
        hal.register_backend("llm", longer)
        assert (await hal.run_inference("llm", "x", model="m")).backend == "longer"
        assert shorter.requests == []
        hal.unregister_backend(longer)
        with pytest.raises(ContextLengthError):
            await hal.run_inference("llm", "x", model="m")

    async def test_nobody_has_the_model(self, hal: HardwareAbstractionLayer) -> None:
        hal.register_backend("llm", Scripted("a", models={"small": None}))
        with pytest.raises(NoBackendError, match="with llama-7b") as caught:
            await hal.run_inference("llm", {**HELLO, "model": "llama-7b"})
        assert "a: not possible: it serves small, not llama-7b" in str(caught.value)


class TestHealth:
    async def test_shut_out_after_failures_and_back_when_well(
        self, hal: HardwareAbstractionLayer
    ) -> None:
        first, second = Scripted("first"), Scripted("second")
        first.failing = [ConnectError("down"), ConnectError("down")]
        first.well = False
        hal.register_backend("llm", first, priority=1)
        hal.register_backend("llm", second)
        for _ in range(2):
            assert (await hal.run_inference("llm", HELLO)).backend == "second"
        assert hal.list_backends()[0].state == "open"
        assert "ConnectError: down" in (hal.list_backends()[0].trouble or "")
        while first.looks < 3:  # it is looked at, and no request has to suffer for it
            assert (await hal.run_inference("llm", HELLO)).backend == "second"
            await asyncio.sleep(0.002)
        assert len(first.requests) == 2
        first.well = True
        await taken_over(hal, "first")
        assert hal.list_backends()[0].trouble is None

    async def test_one_that_cannot_be_looked_at_is_tried_again(
        self, hal: HardwareAbstractionLayer
    ) -> None:
        failing = [OSError("down"), OSError("down")]

        async def flaky(request: Any) -> str:
            if failing:
                raise failing.pop()
            return "back"

        hal.register_backend("llm", flaky, priority=1)
        hal.register_backend("llm", Scripted("second"))
        assert [(await hal.run_inference("llm", HELLO)).text for _ in range(2)] == ["second"] * 2
        await taken_over(hal, "flaky")

    async def test_with_all_shut_out_the_best_is_still_tried(self) -> None:
        async with HardwareAbstractionLayer(breaker=SLOW) as hal:
            only = Scripted("only")
            only.failing = [ConnectError("down")]
            hal.register_backend("llm", only)
            with pytest.raises(ConnectError):
                await hal.run_inference("llm", HELLO)
            assert hal.list_backends()[0].state == "open"
            assert (await hal.run_inference("llm", HELLO)).backend == "only"
            assert hal.list_backends()[0].state == "closed"

    async def test_a_full_one_is_not_shut_out(self, hal: HardwareAbstractionLayer) -> None:
        full, other = Scripted("full"), Scripted("other")
        full.failing = [QueueFullError("full", retry_after=600.0)] * 5
        hal.register_backend("llm", full, priority=1)
        hal.register_backend("llm", other)
        for _ in range(3):
            assert (await hal.run_inference("llm", HELLO)).backend == "other"
        assert hal.list_backends()[0].state == "closed"
        assert len(full.requests) == 1  # and is spared as long as it asked

    async def test_one_whose_abilities_cannot_be_asked(self, hal: HardwareAbstractionLayer) -> None:
        class Mute(Scripted):
            async def capabilities(self) -> Any:
                raise ConnectError("nobody")

        hal.register_backend("llm", Mute("mute"), priority=1)
        hal.register_backend("llm", Scripted("other"))
        assert (await hal.run_inference("llm", HELLO)).backend == "other"

    async def test_an_unavailable_one_says_why(self, hal: HardwareAbstractionLayer) -> None:
        backend = Scripted("big")
        backend.unavailable = "it needs 80 GiB"
        hal.register_backend("llm", backend)
        selection = await hal.select("llm", HELLO)
        assert selection.chosen is None
        assert selection.candidates[0].reasons == ("it needs 80 GiB",)


class TestLeaving:
    async def test_a_cancelled_call_is_cancelled_there(self, hal: HardwareAbstractionLayer) -> None:
        backend = Scripted("slow")
        backend.hold = asyncio.Event()
        hal.register_backend("llm", backend)
        call = asyncio.create_task(hal.run_inference("llm", HELLO))
        await eventually(lambda: len(backend.requests) == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        figures = hal.statistics()
        assert (backend.cancelled, figures.cancelled) == (1, 1)
        assert figures.backends["slow"].in_flight == 0
        assert hal.list_backends()[0].state == "closed"


class TestStreams:
    async def test_from_the_next_one_until_a_piece_has_come(
        self, hal: HardwareAbstractionLayer
    ) -> None:
        first, second = Streamed("first"), Streamed("second")
        first.failing = [ConnectError("down")]
        hal.register_backend("llm", first, priority=1)
        hal.register_backend("llm", second)
        hal.register_backend("llm", Scripted("mute"), priority=9)

        stream = hal.stream_inference("llm", HELLO)
        assert second.requests == []
        texts = [chunk.text async for chunk in stream]

        assert "".join(texts) == stream.text == stream.result.text == "second"
        assert len(texts) == 6
        assert stream.ending == "complete"
        assert [each.backend for each in stream.result.attempts] == ["first", "second"]
        assert hal.statistics().success == 1

    async def test_an_error_after_that_ends_it(self, hal: HardwareAbstractionLayer) -> None:
        backend, other = Streamed("first"), Streamed("second")
        backend.breaks_after = 3
        hal.register_backend("llm", backend, priority=1)
        hal.register_backend("llm", other)
        stream = hal.stream_inference("llm", HELLO)
        with pytest.raises(BackendError, match="it broke") as caught:
            await stream.collect()
        assert caught.value.partial is not None
        assert (caught.value.partial.text, stream.ending) == ("fir", "error")
        assert other.requests == []
        assert backend.closed == 1

    async def test_left_early(self, hal: HardwareAbstractionLayer) -> None:
        backend = Streamed("first")
        hal.register_backend("llm", backend)
        async with hal.stream_inference("llm", HELLO) as stream:
            async for text in stream.texts():
                assert text == "f"
                break
        assert (backend.closed, stream.ending) == (1, "cancelled")
        assert hal.statistics().backends["first"].cancelled == 1
        with pytest.raises(ClientClosedError):
            await anext(stream)


class TestBatches:
    async def test_one_by_one_in_order_with_failover(self, hal: HardwareAbstractionLayer) -> None:
        async def echo(request: dict[str, Any]) -> str:
            return str(request["input"])

        flaky = Scripted("flaky")
        flaky.failing = [ConnectError("down")] * 2
        hal.register_backend("llm", flaky, priority=1)
        hal.register_backend("llm", echo)
        done: list[int] = []
        results = await hal.batch_inference(
            "llm", [f"{number}" for number in range(40)], on_progress=done.append, max_tokens=2
        )
        assert done == list(range(1, 41))
        assert [result.text for result in results] == [str(number) for number in range(40)]
        assert sum(len(result.attempts) for result in results) == 42

    async def test_many_at_once_where_the_backend_can(self, hal: HardwareAbstractionLayer) -> None:
        backend = Batched("all")
        hal.register_backend("llm", backend, priority=1)
        hal.register_backend("llm", Scripted("other"))
        results = await hal.batch_inference("llm", ["a", {"input": "b"}])
        assert [result.text for result in results] == ["all:a", "all:b"]
        backend.failing = [OSError("down")]
        assert len(await hal.batch_inference("llm", ["a", "b"])) == 2
        assert (backend.batches, backend.requests != []) == (2, True)
        assert await hal.batch_inference("llm", []) == []

    async def test_what_failed_is_told(self, hal: HardwareAbstractionLayer) -> None:
        async def picky(request: dict[str, Any]) -> str:
            if request["input"] == "b":
                raise BadRequestError("no b")
            return "fine"

        hal.register_backend("llm", picky)
        with pytest.raises(BatchError, match="no b") as caught:
            await hal.batch_inference("llm", ["a", "b", "c"])
        assert list(caught.value.errors) == [1]


@pytest.mark.parametrize("make", [lambda: ConnectError("down"), lambda: OSError("down")])
async def test_statistics_of_a_backend(
    hal: HardwareAbstractionLayer, make: Callable[[], Exception]
) -> None:
    backend = Scripted("one")
    hal.register_backend("llm", backend)
    await hal.run_inference("llm", HELLO)
    backend.failing = [make()]
    with pytest.raises(VllmError):
        await hal.run_inference("llm", HELLO)
    figures = hal.statistics().backends["one"]
    assert (figures.requests, figures.success, figures.errors) == (2, 1, 1)
    assert figures.duration is not None
    assert figures.duration.count == 1
    assert sum(figures.errors_by_class.values()) == 1
