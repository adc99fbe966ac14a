"""The rest of the surface on a real vLLM: what each method gives, typed."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import pydantic
import pytest
from typing_extensions import TypedDict

from tests.support.clients import KINDS, Kind, make_client
from vllm_unified import AsyncVllmUnified, OutputValidationError, ToolCall, VllmUnified
from vllm_unified.servers import LocalServer

pytestmark = [pytest.mark.live, pytest.mark.timeout(900)]

PROMPT = "The capital of France is"


@pytest.fixture(params=KINDS)
async def vllm(request: pytest.FixtureRequest, url: str) -> AsyncIterator[AsyncVllmUnified]:
    kind: Kind = request.param
    async with make_client(kind, api_url=url, timeout=120) as client:
        yield client


# What a server serves.


async def test_list_models(vllm: AsyncVllmUnified, model: str) -> None:
    [card] = await vllm.list_models()
    assert card.id == model
    assert card.max_model_len == 2048
    assert card.parent is None


@pytest.mark.parametrize("probe", [False, True])
async def test_health(vllm: AsyncVllmUnified, url: str, probe: bool) -> None:
    health = await vllm.health(probe=probe, timeout=30)
    assert health
    assert health.proven == probe
    assert health.endpoint == url


# Tokens.


async def test_a_text_survives_tokens(vllm: AsyncVllmUnified) -> None:
    text = "Drachen, драконы, 龍 🐉\n"
    tokens = await vllm.tokenize(text, return_token_strs=True)
    assert tokens.count == len(tokens.tokens) == len(tokens.token_strs or ())
    assert tokens.max_model_len == 2048
    assert await vllm.detokenize(tokens.tokens) == text


async def test_messages_are_tokenized_under_the_chat_template(vllm: AsyncVllmUnified) -> None:
    tokens = await vllm.tokenize([{"role": "user", "content": "Hello"}])
    text = await vllm.detokenize(tokens.tokens)
    assert "<|im_start|>user\nHello<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")


async def test_token_ids_as_prompt(vllm: AsyncVllmUnified) -> None:
    prompt = (await vllm.tokenize(PROMPT)).tokens
    result = await vllm.generate(prompt, max_tokens=4, temperature=0, return_token_ids=True)
    [choice] = result.choices
    assert choice.prompt_token_ids == prompt
    assert choice.token_ids is not None
    assert len(choice.token_ids) == 4
    assert await vllm.detokenize(choice.token_ids) == result.text
    assert "Paris" in result.text


async def test_token_ids_in_a_stream(vllm: AsyncVllmUnified) -> None:
    stream = vllm.stream(PROMPT, max_tokens=4, temperature=0, return_token_ids=True)
    ids = [chunk.token_ids async for chunk in stream]
    [choice] = stream.result.choices
    assert choice.token_ids == tuple(token for some in ids for token in some or ())
    assert choice.prompt_token_ids == (await vllm.tokenize(PROMPT)).tokens
    assert await vllm.detokenize(choice.token_ids) == stream.text


# Several answers.


async def test_several_samples(vllm: AsyncVllmUnified) -> None:
    result = await vllm.generate(
        "Once upon a time", n=2, max_tokens=12, temperature=1.0, seed=1, ignore_eos=True
    )
    assert [choice.index for choice in result.choices] == [0, 1]
    assert result.texts[0] != result.texts[1]
    assert result.usage.completion_tokens == 24


async def test_several_samples_in_a_stream(vllm: AsyncVllmUnified) -> None:
    stream = vllm.stream_chat("Tell me a story.", n=2, max_tokens=12, temperature=1.0, seed=1)
    texts = {0: "", 1: ""}
    async for chunk in stream:
        texts[chunk.index] += chunk.text
    assert stream.result.texts == [texts[0], texts[1]]
    assert stream.text == texts[0]
    assert [choice.finish_reason for choice in stream.result.choices] == ["length", "length"]


async def test_several_prompts_in_one_request(vllm: AsyncVllmUnified) -> None:
    prompts = [f"The capital of {land} is" for land in ("France", "Italy", "Germany")]
    result = await vllm.generate(prompts, max_tokens=3, temperature=0)
    for city, text in zip(("Paris", "Rome", "Berlin"), result.texts, strict=True):
        assert city in text


# Measures.


async def test_usage_of_a_stream_is_that_of_the_whole_answer(vllm: AsyncVllmUnified) -> None:
    params: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    streamed = await vllm.stream_chat("Hi", **params).collect()
    whole = await vllm.chat("Hi", **params)
    assert streamed.usage == whole.usage
    assert streamed.usage.completion_tokens == 8
    assert streamed.usage.total_tokens == streamed.usage.prompt_tokens + 8


async def test_times_of_a_stream(vllm: AsyncVllmUnified) -> None:
    metadata = (await vllm.stream(PROMPT, max_tokens=8, ignore_eos=True).collect()).metadata
    assert metadata.time_to_first_token is not None
    assert 0 < metadata.time_to_first_token < metadata.duration
    assert len(metadata.attempts) == 1


async def test_logprobs(vllm: AsyncVllmUnified) -> None:
    """Completions and chats say the same in two shapes; the first use takes a while."""
    text = await vllm.generate(PROMPT, max_tokens=3, temperature=0, logprobs=2)
    chat = await vllm.chat("Hi", max_tokens=3, temperature=0, logprobs=True, top_logprobs=2)
    for result in (text, chat):
        [choice] = result.choices
        assert choice.logprobs is not None
        assert "".join(token.token for token in choice.logprobs) == choice.text
        for token in choice.logprobs:
            assert token.logprob is not None
            assert token.logprob == max(token.top.values())
            assert sum(map(math.exp, token.top.values())) <= 1.001


async def test_logprobs_in_a_stream(vllm: AsyncVllmUnified) -> None:
    result = await vllm.stream(PROMPT, max_tokens=3, temperature=0, logprobs=1).collect()
    assert result.choices[0].logprobs is not None
    assert "".join(token.token for token in result.choices[0].logprobs) == result.text


# Structured output.


class AsStruct(msgspec.Struct):
    name: str
    inhabitants: int


@dataclass
class AsDataclass:
    name: str
    inhabitants: int


class AsTypedDict(TypedDict):
    name: str
    inhabitants: int


class AsModel(pydantic.BaseModel):
    name: str
    inhabitants: int


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "inhabitants": {"type": "integer"}},
    "required": ["name", "inhabitants"],
    "additionalProperties": False,
}
KEYS = ("name", "inhabitants")
QUESTION = "Give me the name of the capital of France and the number of its inhabitants, as JSON."
# Without a bound, a model this small likes to write spaces between two keys, or digits, for ever.
ENOUGH: dict[str, Any] = {"max_tokens": 200, "temperature": 0}

every_kind = pytest.mark.parametrize(
    ("kind", "instance"),
    [
        pytest.param(AsStruct, AsStruct, id="struct"),
        pytest.param(AsDataclass, AsDataclass, id="dataclass"),
        pytest.param(AsTypedDict, dict, id="typeddict"),
        pytest.param(AsModel, AsModel, id="pydantic"),
        pytest.param(SCHEMA, dict, id="schema"),
    ],
)


def check_city(parsed: Any, instance: type) -> None:
    assert isinstance(parsed, instance)
    city = parsed if isinstance(parsed, dict) else {name: getattr(parsed, name) for name in KEYS}
    assert isinstance(city["name"], str)
    assert isinstance(city["inhabitants"], int)


@every_kind
async def test_structured_output(url: str, kind: Any, instance: type) -> None:
    async with AsyncVllmUnified(api_url=url, timeout=120) as vllm:
        result = await vllm.chat(QUESTION, response_model=kind, **ENOUGH)
    check_city(result.parsed, instance)


@every_kind
async def test_structured_output_in_a_stream(url: str, kind: Any, instance: type) -> None:
    async with AsyncVllmUnified(api_url=url, timeout=120) as vllm:
        result = await vllm.stream_chat(QUESTION, response_model=kind, **ENOUGH).collect()
    check_city(result.parsed, instance)


async def test_an_answer_that_is_cut_off_is_no_structure(vllm: AsyncVllmUnified) -> None:
    with pytest.raises(OutputValidationError, match="AsStruct") as caught:
        await vllm.chat(QUESTION, response_model=AsStruct, max_tokens=3)
    assert caught.value.text.startswith("{")
    assert "max_tokens" in str(caught.value)


async def test_a_stream_that_is_cut_off_is_no_structure(vllm: AsyncVllmUnified) -> None:
    stream = vllm.stream_chat(QUESTION, response_model=AsStruct, max_tokens=3)
    texts = [text async for text in stream.texts()]
    assert stream.ending == "complete"
    with pytest.raises(OutputValidationError) as caught:
        _ = stream.result
    assert caught.value.text == "".join(texts)


# Tools.

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "strict": True,  # otherwise vLLM takes any JSON for arguments
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}
ASK: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 120, "temperature": 0}


def check_call(calls: tuple[ToolCall, ...]) -> None:
    assert calls
    assert calls[0].id
    assert calls[0].name == "weather"
    assert isinstance(calls[0].parsed_arguments()["city"], str)


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
async def test_a_tool_call(vllm: AsyncVllmUnified, choice: Any) -> None:
    result = await vllm.chat("How is the weather in Paris?", tool_choice=choice, **ASK)
    check_call(result.tool_calls)
    assert result.message["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
async def test_a_tool_call_in_a_stream(vllm: AsyncVllmUnified, choice: Any) -> None:
    stream = vllm.stream_chat("How is the weather in Paris?", tool_choice=choice, **ASK)
    arguments = ""
    async for chunk in stream:
        arguments += "".join(delta.arguments for delta in chunk.tool_calls if delta.index == 0)
    check_call(stream.result.tool_calls)
    assert stream.result.tool_calls[0].arguments == arguments
    assert "city" in json.loads(arguments)


async def test_a_tools_answer_goes_back_in_the_conversation(vllm: AsyncVllmUnified) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "How is the weather in Paris?"}]
    result = await vllm.chat(messages, tool_choice=NAMED, **ASK)
    messages += [
        result.message,
        {"role": "tool", "tool_call_id": result.tool_calls[0].id, "content": "Sunny, 21 degrees."},
    ]
    assert (await vllm.chat(messages, max_tokens=20)).content


# Embeddings.


@pytest.fixture(params=KINDS)
async def embedder(
    request: pytest.FixtureRequest, embedding_server: LocalServer
) -> AsyncIterator[AsyncVllmUnified]:
    kind: Kind = request.param
    async with make_client(kind, api_url=embedding_server.url, proxy="", timeout=120) as client:
        yield client


async def test_an_embedding(embedder: AsyncVllmUnified) -> None:
    result = await embedder.embed("A dragon")
    [vector] = result.embeddings
    assert len(vector) == 576
    assert math.hypot(*vector) == pytest.approx(1, abs=0.01)
    assert result.model == "embedder"
    assert result.usage.prompt_tokens == (await embedder.tokenize("A dragon")).count


async def test_embeddings_come_in_order(embedder: AsyncVllmUnified) -> None:
    texts = ["A dragon", "The stock market fell.", "Il pleut."]
    together = (await embedder.embed(texts)).embeddings
    for text, vector in zip(texts, together, strict=True):
        alone = (await embedder.embed(text)).embeddings[0]
        assert sum(map(float.__mul__, vector, alone)) == pytest.approx(1, abs=0.02)


async def test_embeddings_of_token_ids(embedder: AsyncVllmUnified) -> None:
    tokens = (await embedder.tokenize("A dragon")).tokens
    by_ids = (await embedder.embed([tokens, tokens])).embeddings
    by_text = (await embedder.embed("A dragon")).embeddings[0]
    assert len(by_ids) == 2
    assert by_ids[0] == pytest.approx(by_text, abs=0.02)


# The blocking client where it is used.


def test_many_threads(url: str) -> None:
    barrier = threading.Barrier(8)

    def answer(vllm: VllmUnified, number: int) -> tuple[str, str]:
        barrier.wait(30)
        whole = vllm.generate(f"{number} plus {number} is", max_tokens=8, temperature=0)
        with vllm.stream(f"{number} plus {number} is", max_tokens=8, temperature=0) as stream:
            return whole.text, "".join(stream.texts())

    with VllmUnified(api_url=url, timeout=120) as client, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(partial(answer, client), range(8)))
    assert all(whole and streamed for whole, streamed in answers)
    assert len({whole for whole, _ in answers}) > 1


async def test_a_running_loop(url: str) -> None:
    """As in a notebook's cell."""
    assert asyncio.get_running_loop().is_running()
    with VllmUnified(api_url=url, timeout=120) as vllm:
        assert "Paris" in vllm.chat("What is the capital of France?", temperature=0).content
        with vllm.stream(PROMPT, max_tokens=4) as stream:
            assert "".join(stream.texts())
        assert len(vllm.batch([PROMPT] * 3, max_tokens=2)) == 3
