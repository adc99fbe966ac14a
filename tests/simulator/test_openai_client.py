"""OpenAI's own client cannot tell the simulator from a server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
from openai.types.chat import ChatCompletionToolParam, ChatCompletionUserMessageParam

from vllm_unified.simulator import Simulator

HELLO: ChatCompletionUserMessageParam = {"role": "user", "content": "Hello"}


@pytest.fixture
async def server() -> AsyncIterator[Simulator]:
    async with Simulator(
        tasks=("generate", "embed"),
        api_keys=("secret",),
        tool_call_parser=True,
        enable_auto_tool_choice=True,
    ) as simulator:
        yield simulator


@pytest.fixture
async def client(server: Simulator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="secret", max_retries=0
    ) as openai_client:
        yield openai_client


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="sim", messages=[HELLO], max_tokens=5, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    messages = [HELLO]
    whole = await client.chat.completions.create(
        model="sim",
        messages=messages,
        max_tokens=5,
        temperature=0,
    )
    stream = await client.chat.completions.create(
        model="sim",
        messages=messages,
        max_tokens=5,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


async def test_a_required_tool_is_called(client: openai.AsyncOpenAI) -> None:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    }
    tool: ChatCompletionToolParam = {
        "type": "function",
        "function": {"name": "weather", "parameters": schema},
    }
    answer = await client.chat.completions.create(
        model="sim",
        messages=[{"role": "user", "content": "Rain?"}],
        tools=[tool],
        tool_choice="required",
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert (calls[0].function.name, calls[0].function.arguments) == ("weather", '{"city": "text"}')


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="sim", prompt=["One", "Two"], max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]
    stream = await client.completions.create(model="sim", prompt="One", max_tokens=4, stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == answer.choices[0].text


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["sim"]


async def test_embeddings(client: openai.AsyncOpenAI) -> None:
    # The client asks for base64 and decodes it when no format is named.
    packed = await client.embeddings.create(model="sim", input=["Hello", "Bye"])
    plain = await client.embeddings.create(model="sim", input="Hello", encoding_format="float")
    assert [item.index for item in packed.data] == [0, 1]
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert sum(value * value for value in plain.data[0].embedding) == pytest.approx(1.0)


async def test_errors(server: Simulator, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `nope` does not exist"):
        await client.completions.create(model="nope", prompt="Hi")
    with pytest.raises(openai.BadRequestError, match="temperature must be in"):
        await client.completions.create(model="sim", prompt="Hi", temperature=9)
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    server.fail_next("error_500")
    with pytest.raises(openai.InternalServerError):
        await client.completions.create(model="sim", prompt="Hi")
    server.fail_next("rate_limit")
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="sim", prompt="Hi")
    server.fail_next("reset")
    with pytest.raises(openai.APIConnectionError):
        await client.completions.create(model="sim", prompt="Hi")
    server.fail_next("error_frame", after_tokens=1)
    stream = await client.completions.create(model="sim", prompt="Hi", stream=True)
    with pytest.raises(openai.APIError, match="EngineCore encountered an issue"):
        [chunk async for chunk in stream]
