"""Scheduling, caching, continuation and timing, as a client sees them."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
import pytest

from vllm_unified.simulator import Simulator, Timing


async def post(server: Simulator, path: str, body: Any, **headers: str) -> Any:
    async with (
        aiohttp.ClientSession() as session,
        session.post(server.url + path, json=body, headers=headers) as reply,
    ):
        return await reply.json()


async def complete(server: Simulator, **fields: Any) -> Any:
    return await post(server, "/v1/completions", {"prompt": "Hi", "temperature": 0, **fields})


async def metric(server: Simulator, name: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as reply:
        lines = (await reply.text()).splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


@pytest.mark.parametrize("cut", range(1, 40, 3))
async def test_an_answer_goes_on_exactly_from_its_token_ids(cut: int) -> None:
    async with Simulator() as server, Simulator() as other:
        fields = {"max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
        full = (await complete(server, **fields))["choices"][0]
        prompt = full["prompt_token_ids"] + full["token_ids"][:cut]
        rest = await complete(other, **{**fields, "prompt": prompt, "max_tokens": 40 - cut})
        assert full["token_ids"][cut:] == rest["choices"][0]["token_ids"]


async def test_a_chat_goes_on_as_a_completion() -> None:
    async with Simulator() as server:
        body = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
        body |= {"max_tokens": 30, "temperature": 0, "return_token_ids": True}
        chat = await post(server, "/v1/chat/completions", body)
        tokens = chat["choices"][0]["token_ids"]
        fields = {"prompt": chat["prompt_token_ids"] + tokens[:10], "max_tokens": 20}
        rest = await complete(server, **fields, ignore_eos=True, return_token_ids=True)
        assert rest["choices"][0]["token_ids"] == tokens[10:]


async def test_texts_contain_characters_of_several_tokens_and_end() -> None:
    async with Simulator() as server:
        text = (await complete(server, max_tokens=400, ignore_eos=True))["choices"][0]["text"]
        assert any(ord(character) > 0xFFFF for character in text)
        assert "\ufffd" not in text
        endings = {
            (await complete(server, prompt=f"Prompt {n}", max_tokens=300))["choices"][0][
                "finish_reason"
            ]
            for n in range(10)
        }
        assert endings >= {"stop"}


async def test_samples_differ_and_repeat() -> None:
    async with Simulator() as server:
        fields = {"n": 3, "temperature": 1.0, "max_tokens": 12, "seed": 5, "ignore_eos": True}
        one, two = await complete(server, **fields), await complete(server, **fields)
        texts = [choice["text"] for choice in one["choices"]]
        assert len(set(texts)) == 3
        assert texts == [choice["text"] for choice in two["choices"]]
        other = await complete(server, **{**fields, "seed": 6})
        assert texts[0] != other["choices"][0]["text"]


@pytest.mark.parametrize(("policy", "first"), [("fcfs", "slow"), ("priority", "urgent")])
async def test_the_queue_runs_in_the_order_of_its_policy(policy: Any, first: str) -> None:
    async with Simulator(max_num_seqs=1, scheduling_policy=policy) as server:
        await post(server, "/pause?mode=keep", None)
        order: list[str] = []

        async def ask(name: str, priority: int) -> None:
            await complete(server, max_tokens=2, priority=priority)
            order.append(name)

        tasks = [asyncio.create_task(ask("slow", 5))]
        await queued(server, 1)
        tasks.append(asyncio.create_task(ask("urgent", -5)))
        await queued(server, 2)
        await post(server, "/resume", None)
        await asyncio.gather(*tasks)
        assert order[0] == first


async def queued(server: Simulator, count: int) -> None:
    async with asyncio.timeout(30):
        # The page is all there is to watch.
        while await metric(server, "vllm:num_requests_waiting") != count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_the_priority_header_beats_the_body() -> None:
    async with Simulator(max_num_seqs=1, scheduling_policy="priority") as server:
        body = {"prompt": "Hi", "priority": 5}
        server.hang()
        task = asyncio.create_task(
            post(server, "/v1/completions", body, **{"X-Vllm-Priority": "-7"})
        )
        await queued(server, 1)
        assert next(iter(server.service.engine._all)).job.priority == -7
        server.heal()
        await task


async def test_a_known_prefix_is_faster_and_counted() -> None:
    timing = Timing(per_prompt_token=0.0005)
    async with Simulator(timing=timing, block_size=16) as server:
        prompt = list(range(300, 700))
        cold = await elapsed(complete(server, prompt=prompt, max_tokens=1))
        warm = [await elapsed(complete(server, prompt=prompt, max_tokens=1)) for _ in range(3)]
        assert min(warm) < cold / 3  # whatever else the machine does
        assert await metric(server, "vllm:prefix_cache_hits_total") == 3 * 384
        assert await metric(server, "vllm:prefix_cache_queries_total") == 4 * 400


async def test_another_salt_or_no_caching_finds_nothing() -> None:
    for caching, fields in ((False, {}), (True, {"cache_salt": "mine"})):
        async with Simulator(enable_prefix_caching=caching) as server:
            prompt = list(range(300, 400))
            await complete(server, prompt=prompt, max_tokens=1)
            await complete(server, prompt=prompt, max_tokens=1, **fields)
            assert await metric(server, "vllm:prefix_cache_hits_total") == 0


async def test_a_full_cache_preempts_and_all_finish() -> None:
    options: dict[str, Any] = {"block_size": 4, "num_blocks": 32, "max_model_len": 128}
    async with Simulator(**options, timing=Timing(inter_token_latency=0.0005)) as server:
        fields = {"max_tokens": 60, "ignore_eos": True}
        answers = await asyncio.gather(
            *[complete(server, prompt=[300 + n], **fields) for n in range(4)]
        )
        assert all(answer["usage"]["completion_tokens"] == 60 for answer in answers)
        assert await metric(server, "vllm:num_preemptions_total") > 0
        assert await metric(server, "vllm:kv_cache_usage_perc") == 0
        alone = await complete(server, prompt=[300], **fields)
        assert alone["choices"][0]["text"] == answers[0]["choices"][0]["text"]


async def test_a_full_batch_is_slower_for_each() -> None:
    timing = Timing(inter_token_latency=0.004, load_factor=4.0)
    async with Simulator(timing=timing, max_num_seqs=8) as server:
        fields = {"max_tokens": 10, "ignore_eos": True}
        alone = await elapsed(complete(server, **fields))
        crowd = await elapsed(asyncio.gather(*[complete(server, **fields) for _ in range(8)]))
        assert crowd > 2 * alone


async def elapsed(work: Any) -> float:
    start = time.monotonic()
    await work
    return time.monotonic() - start


async def test_the_second_admission_check_refuses_inside_a_stream() -> None:
    async with Simulator(max_num_queued_reqs=3) as server:
        server.hang()
        body = {"prompt": ["a", "b", "c", "d"], "stream": True}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{server.url}/v1/completions", json=body) as reply,
        ):
            assert reply.status == 200
            first = (await reply.content.readuntil(b"\n\n")).removeprefix(b"data: ")
        assert json.loads(first)["error"]["code"] == 503
        assert server.service.engine.unfinished == 0


async def test_a_token_backlog_refuses_too() -> None:
    async with Simulator(max_num_queued_tokens=10) as server:
        server.hang()
        held = asyncio.create_task(complete(server, prompt=[5] * 20))
        await queued(server, 1)
        refused = await complete(server)
        assert refused["error"]["message"].startswith("The engine has reached its prefill token")
        held.cancel()


async def test_abort_by_id_ends_the_stream_with_abort() -> None:
    async with Simulator(timing=Timing(inter_token_latency=0.01)) as server:
        fields = {"max_tokens": 1000, "ignore_eos": True, "request_id": "mine"}
        task = asyncio.create_task(complete(server, **fields))
        async with asyncio.timeout(30):
            while await metric(server, "vllm:num_requests_running") != 1:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        reply = await post(server, "/abort_requests", {"request_ids": ["cmpl-mine"]})
        assert reply == {"status": "aborted", "aborted": 1}
        assert (await task)["choices"][0]["finish_reason"] == "abort"


async def test_more_adapters_than_slots_wait_for_each_other() -> None:
    timing = Timing(inter_token_latency=0.002)
    async with Simulator(enable_lora=True, max_loras=1, timing=timing) as server:
        for name in ("one", "two"):
            server.service.models.load(name, f"models/{name}", in_place=False)
        answers = await asyncio.gather(
            *[complete(server, model=name, max_tokens=5) for name in ("one", "two")]
        )
        texts = {answer["choices"][0]["text"] for answer in answers}
        assert len(texts) == 2, "an adapter changes what the model says"
