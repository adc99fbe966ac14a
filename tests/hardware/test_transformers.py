"""The transformers backend without torch: its line, its text, its parameters, its endings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.hardware.fake_model import FakeModel
from tests.support.waiting import eventually
from vllm_unified import (
    BackendError,
    BadRequestError,
    ChatResult,
    ClientClosedError,
    ConfigurationError,
    ContextLengthError,
    RequestTimeoutError,
    UnsupportedError,
)
from vllm_unified.hardware import HardwareAbstractionLayer
from vllm_unified.hardware.request import InferenceRequest, inference_request
from vllm_unified.hardware.transformers import TransformersBackend
from vllm_unified.hardware.transformers import backend as module
from vllm_unified.hardware.transformers.detokenizer import Detokenizer
from vllm_unified.hardware.transformers.sampling import sampling


@pytest.fixture
async def backend(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TransformersBackend]:
    monkeypatch.setattr(module, "Model", FakeModel)
    monkeypatch.setattr(module, "_missing", list)
    monkeypatch.setattr(FakeModel, "made", 0)
    async with TransformersBackend("some/model", max_batch_size=4) as made:
        yield made


async def model_of(backend: TransformersBackend) -> FakeModel:
    model = await backend.load()
    assert isinstance(model, FakeModel)
    return model


def ask(prompt: Any = "Hello", task: str = "llm", **params: Any) -> InferenceRequest:
    return inference_request(task, prompt, params)


class TestAnswers:
    async def test_a_completion(self, backend: TransformersBackend) -> None:
        result = await backend.infer(ask())
        assert (result.text, result.finish_reason, result.model) == (
            "one two three",
            "stop",
            "some/model",
        )
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (5, 5)
        assert result.metadata.endpoint == "transformers on cpu"

    async def test_a_chat(self, backend: TransformersBackend) -> None:
        result = await backend.infer(ask(task="chat"))
        assert isinstance(result, ChatResult)
        assert result.message == {"role": "assistant", "content": "one two three"}

    async def test_a_stream(self, backend: TransformersBackend) -> None:
        stream = backend.stream(ask())
        assert FakeModel.made == 0
        chunks = [chunk async for chunk in stream]
        assert [chunk.text for chunk in chunks] == ["one", " two", " thr", "ee", ""]
        assert chunks[-1].finish_reason == "stop"
        assert stream.result is not None
        assert stream.result.text == "one two three"

    async def test_several_prompts(self, backend: TransformersBackend) -> None:
        result = await backend.infer(ask(["a", "bc", [8, 8, 8]], max_tokens=2))
        assert result.texts == ["one two"] * 3
        assert [choice.finish_reason for choice in result.choices] == ["length"] * 3
        assert result.usage.prompt_tokens == 6

    @pytest.mark.parametrize(
        ("params", "text", "tokens"),
        [
            ({"max_tokens": 3}, "one two thr", 3),
            ({"stop": "three"}, "one two ", 4),
            ({"stop": ["x", " two"]}, "one", 2),
            ({"ignore_eos": True, "max_tokens": 6}, "one two threeone", 6),
            ({"max_completion_tokens": 1}, "one", 1),
        ],
    )
    async def test_where_it_ends(
        self, backend: TransformersBackend, params: dict[str, Any], text: str, tokens: int
    ) -> None:
        result = await backend.infer(ask(**params))
        assert (result.text, result.usage.completion_tokens) == (text, tokens)

    async def test_a_chat_may_use_the_whole_context(self, backend: TransformersBackend) -> None:
        (await model_of(backend)).answer = [1]
        chat = await backend.infer(ask(task="chat"))
        assert chat.usage.total_tokens == 64
        assert (await backend.infer(ask())).usage.completion_tokens == 16  # as vLLM

    async def test_loaded_once_for_all(self, backend: TransformersBackend) -> None:
        await asyncio.gather(*(backend.infer(ask()) for _ in range(5)))
        assert FakeModel.made == 1


class TestBatches:
    async def test_what_waits_is_answered_together(self, backend: TransformersBackend) -> None:
        model = await model_of(backend)
        model.step.clear()
        first = asyncio.create_task(backend.infer(ask()))
        await eventually(lambda: model.batches == [1])
        others = [
            asyncio.create_task(backend.infer(ask(temperature=heat)))
            for heat in (0.5, 0, 0.5, 0.5, 0.5, 0.5)
        ]
        await eventually(lambda: len(backend._line._jobs) == 6)
        model.step.set()
        assert {(await call).text for call in (first, *others)} == {"one two three"}
        assert model.batches == [1, 4, 1, 1]

    async def test_a_seed_is_alone(self, backend: TransformersBackend) -> None:
        model = await model_of(backend)
        await asyncio.gather(*(backend.infer(ask(seed=1)) for _ in range(3)))
        assert model.batches == [1, 1, 1]


class TestLeaving:
    async def test_a_cancelled_answer_ends_and_the_others_go_on(
        self, backend: TransformersBackend
    ) -> None:
        model = await model_of(backend)
        model.answer = [1]
        endless = asyncio.create_task(backend.infer(ask(max_tokens=59, ignore_eos=True)))
        model.step.clear()
        await eventually(lambda: model.batches == [1])
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        model.step.set()
        assert (await backend.infer(ask(max_tokens=1))).text == "one"

    async def test_a_stream_left_early(self, backend: TransformersBackend) -> None:
        model = await model_of(backend)
        async with HardwareAbstractionLayer() as hal:
            hal.register_backend("llm", backend)
            async with hal.stream_inference("llm", "Hello") as stream:
                assert (await anext(stream)).text == "one"
            assert stream.ending == "cancelled"
        assert (await backend.infer(ask())).text == "one two three"
        assert len(model.batches) == 2

    async def test_too_late(self, backend: TransformersBackend) -> None:
        model = await model_of(backend)
        model.step.clear()
        with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
            await backend.infer(ask(timeout=0.05))
        stream = backend.stream(ask(timeout=0.05))
        with pytest.raises(RequestTimeoutError):
            await anext(stream)
        model.step.set()

    async def test_closing_ends_everything(self, backend: TransformersBackend) -> None:
        model = await model_of(backend)
        model.answer = [1]
        model.step.clear()
        running = asyncio.create_task(backend.infer(ask(max_tokens=50)))
        await eventually(lambda: model.batches == [1])
        waiting = asyncio.create_task(backend.infer(ask()))
        await eventually(lambda: len(backend._line._jobs) == 1)
        closing = asyncio.create_task(backend.close())
        await eventually(lambda: backend._closed)
        model.step.set()
        for call in (running, waiting):
            with pytest.raises(ClientClosedError):
                await call
        await closing
        with pytest.raises(ClientClosedError):
            await backend.infer(ask())
        assert not await backend.health()


class TestErrors:
    @pytest.mark.parametrize(
        ("params", "kind"),
        [
            ({"logprobs": 3}, UnsupportedError),
            ({"n": 2}, UnsupportedError),
            ({"tools": []}, UnsupportedError),
            ({"temprature": 1}, BadRequestError),
            ({"temperature": -1}, BadRequestError),
            ({"top_p": "much"}, BadRequestError),
            ({"max_tokens": 0}, BadRequestError),
            ({"max_tokens": 60}, ContextLengthError),
            ({"stop": [3]}, BadRequestError),
            ({"timeout": "soon"}, BadRequestError),
        ],
    )
    async def test_what_it_cannot_do(
        self, backend: TransformersBackend, params: dict[str, Any], kind: type[Exception]
    ) -> None:
        with pytest.raises(kind):
            await backend.infer(ask(**params))

    @pytest.mark.parametrize("prompt", ["", [], [""], 3])
    async def test_what_is_no_prompt(self, backend: TransformersBackend, prompt: Any) -> None:
        with pytest.raises(BadRequestError):
            await backend.infer(InferenceRequest(task="llm", input=prompt))

    async def test_embeddings(self, backend: TransformersBackend) -> None:
        with pytest.raises(UnsupportedError):
            await backend.infer(ask(task="embedding"))

    async def test_a_model_that_fails(self, backend: TransformersBackend) -> None:
        model = await model_of(backend)
        model.error = MemoryError("no more")
        with pytest.raises(BackendError, match="MemoryError: no more") as caught:
            await backend.infer(ask())
        assert caught.value.is_transient_error
        model.error = None
        assert (await backend.infer(ask())).text == "one two three"

    async def test_a_model_that_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "Model", FakeModel)
        async with TransformersBackend("no-such-model") as backend:
            for _ in range(2):
                with pytest.raises(BackendError, match="is not a local folder"):
                    await backend.infer(ask())

    async def test_without_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_missing", lambda: ["torch"])
        backend = TransformersBackend("some/model")
        unavailable = (await backend.capabilities()).unavailable or ""
        assert "torch is not installed: pip install 'vllm-unified[local]'" in unavailable
        assert not await backend.health()

    def test_a_wrong_size(self) -> None:
        with pytest.raises(ConfigurationError, match="max_batch_size"):
            TransformersBackend(max_batch_size=0)


async def test_what_it_serves(backend: TransformersBackend) -> None:
    assert (await backend.capabilities()).models == {"some/model": None}
    await backend.load()
    known = await backend.capabilities()
    assert (known.models, known.device) == ({"some/model": 64}, "cpu")


class TestText:
    def test_an_unfinished_character_is_held_back(self) -> None:
        texts = {(): "", (1,): "a", (1, 2): "a\ufffd", (1, 2, 3): "a€", (2,): "\ufffd"}
        decode = lambda ids: texts.get(tuple(ids), "€")  # noqa: E731
        detokenizer = Detokenizer(decode, [])
        assert [detokenizer.feed(token) for token in (1, 2, 3)] == ["a", "", "€"]
        assert detokenizer.finish() == ""

    def test_what_is_left_at_the_end_is_shown(self) -> None:
        detokenizer = Detokenizer(lambda ids: "\ufffd" * len(ids), [])
        assert detokenizer.feed(1) == ""
        assert detokenizer.finish() == "\ufffd"

    def test_the_first_token_follows_the_prompt(self) -> None:
        """A tokenizer that drops the space of a first word, as SentencePiece does."""
        decode = lambda ids: " ".join(f"w{token}" for token in ids)  # noqa: E731
        detokenizer = Detokenizer(decode, [1, 2, 3])
        assert [detokenizer.feed(token) for token in (4, 5)] == [" w4", " w5"]


def test_the_models_own_defaults_count() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "bos_token_id": 1}
    found = sampling({"top_p": 0.5, "max_retries": 3}, is_chat=True, defaults=defaults)
    assert (found.temperature, found.top_p, found.max_tokens) == (0.6, 0.5, None)
