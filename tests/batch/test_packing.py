"""Several prompts in one request: when, whose answer is whose, and who fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.batch.conftest import echo
from tests.support import answers
from tests.support.clients import KINDS, Kind, make_client
from tests.support.scripted import RESET, Reply, Request, ScriptedServer
from vllm_unified import BadRequestError, BatchAnswer, BatchMetrics, ServerError
from vllm_unified.batch.packing import REST, SIZES, PackSize, most_in_a_pack, own_results
from vllm_unified.batch.requests import RequestMaker
from vllm_unified.results import Choice, GenerationResult, Usage
from vllm_unified.settings import Settings
from vllm_unified.simulator import Fleet


def run(size: PackSize, rate: Callable[[int, float], float], *, until: float) -> list[int]:
    """Sizes, one after the other, where packs of a size are answered at such a rate."""
    now, seen = 0.0, [size.size]
    while now < until:
        now += size.size / rate(size.size, now)
        size.answered(size.size, under_way=64, servers=1, now=now)
        if size.size != seen[-1]:
            seen.append(size.size)
    return seen


class TestSizes:
    def test_they_grow_while_that_pays(self) -> None:
        size = PackSize(32)

        seen = run(size, lambda packed, now: 1000 * packed**0.5, until=30)

        assert size.size == SIZES[-1]
        assert seen == [1, 4, 1, 4, 16, 4, 16, 32, 16, 32]

    def test_they_stay_where_it_does_not(self) -> None:
        size = PackSize(32)

        assert run(size, lambda packed, now: 1000 - packed, until=REST) == [1, 4, 1]

    def test_and_are_looked_at_again_later(self) -> None:
        size = PackSize(32)
        run(size, lambda packed, now: 1000, until=30)

        run(size, lambda packed, now: 1000 * packed, until=REST + 60)

        assert size.size == SIZES[-1]

    def test_a_server_that_only_gets_faster_does_not_count_for_them(self) -> None:
        size = PackSize(32)

        run(size, lambda packed, now: 1000 * 1.2**now, until=12)

        assert size.size == 1

    def test_where_a_request_costs_next_to_nothing_nothing_is_tried(self) -> None:
        assert run(PackSize(32), lambda packed, now: 20 * packed, until=300) == [1]

    def test_no_more_than_may_be(self) -> None:
        size = PackSize(4)
        run(size, lambda packed, now: 1000 * packed, until=30)
        assert size.size == 4
        size.give_up()
        assert (size.size, size.is_off) == (1, True)

    def test_a_fixed_one(self) -> None:
        assert run(PackSize(32, fixed=8), lambda packed, now: 1000, until=30) == [8]
        assert PackSize(4, fixed=8).size == 4

    def test_an_answer_must_not_get_too_large(self) -> None:
        one = {"samples": 1, "logprobs": 0, "limit": 2**26}
        assert most_in_a_pack(tokens=16, **one) == 32
        assert most_in_a_pack(tokens=100_000, **one) == 4
        assert most_in_a_pack(tokens=2**20, **one) == 1

    @pytest.mark.parametrize(
        "params",
        [
            {"return_token_ids": True},
            {"echo": True},
            {"use_beam_search": True},
            {"extra_body": {"a": 1}},
            {"hedge_after": 1.0},
        ],
    )
    def test_what_is_never_joined(self, params: dict[str, Any]) -> None:
        assert RequestMaker(Settings(), params).most_in_a_pack == 1
        assert RequestMaker(Settings(), {}).most_in_a_pack == 32


def test_whose_is_what() -> None:
    def choice(index: int, ids: tuple[int, ...] | None) -> Choice:
        return Choice(index=index, text=str(index), token_ids=ids, prompt_token_ids=(1,) * 3)

    packed = GenerationResult(
        choices=tuple(choice(index, (7,) * (index + 1)) for index in range(4)),
        usage=Usage(prompt_tokens=6, completion_tokens=10, total_tokens=16),
    )

    first, second = own_results(packed, 2) or []

    assert [first.texts, second.texts] == [["0", "1"], ["2", "3"]]
    assert [each.index for each in second.choices] == [0, 1]
    assert second.choices[0].token_ids is None
    assert first.usage == Usage(prompt_tokens=3, completion_tokens=3, total_tokens=6)
    assert second.usage == Usage(prompt_tokens=3, completion_tokens=7, total_tokens=10)
    silent = GenerationResult(choices=(choice(0, (1,)), choice(1, None)), usage=Usage())
    assert own_results(silent, 2) is None


PROMPTS: list[Any] = [f"What is {number} times 7?" for number in range(64)]
PARAMS: dict[str, Any] = {"max_tokens": 6, "n": 2, "temperature": 0.5, "seed": 1}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Fleet() as fleet:
        yield fleet.add(model="sim", max_model_len=200).url


async def answered(
    kind: Kind, url: str, prompts: list[Any], params: dict[str, Any] | None = None, **how: Any
) -> tuple[list[BatchAnswer], BatchMetrics]:
    async with make_client(kind, api_url=url, max_retries=0) as vllm:
        stream = vllm.stream_batch(
            prompts, PARAMS if params is None else params, ordered=True, **how
        )
        async with stream:
            return [answer async for answer in stream], stream.metrics


@pytest.mark.usefixtures("short_pauses")
class TestPacks:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_give_what_single_requests_give(self, kind: Kind, url: str) -> None:
        prompts = [*PROMPTS[:30], [1, 2, 3], [4, 5], {"prompt": "own", "n": 1}, *PROMPTS[30:]]
        packed, figures = await answered(kind, url, prompts, pack=8)
        single, _ = await answered(kind, url, prompts, pack=1)

        for one, other in zip(packed, single, strict=True):
            assert one.result is not None
            assert other.result is not None
            assert one.result.choices == other.result.choices
            assert one.result.usage == other.result.usage
            assert one.result.metadata.endpoint == url
        assert figures.packed >= 60
        assert figures.requests <= 12
        assert figures.succeeded == len(prompts)

    @pytest.mark.parametrize("kind", KINDS)
    async def test_can_be_set_for_a_list_of_texts_too(self, kind: Kind, url: str) -> None:
        async with make_client(kind, api_url=url) as vllm:
            packed = await vllm.process_batch_with_metrics(None, PROMPTS, "sim", PARAMS, pack=8)
            texts = await vllm.batch(PROMPTS, pack=1, model="sim", **PARAMS)

        assert packed.texts == texts
        assert packed.metrics.requests == -(-len(PROMPTS) // 8)

    @pytest.mark.parametrize("kind", KINDS)
    async def test_only_a_poisoned_prompt_fails(self, kind: Kind, url: str) -> None:
        """One in each pack."""
        poisoned = set(range(3, len(PROMPTS), 8))
        prompts = ["long " * 500 if n in poisoned else text for n, text in enumerate(PROMPTS)]

        packed, figures = await answered(kind, url, prompts, pack=8)
        single, _ = await answered(kind, url, PROMPTS, pack=1)

        assert {answer.index for answer in packed if answer.error is not None} == poisoned
        for one, other in zip(packed, single, strict=True):
            if one.index in poisoned:
                assert isinstance(one.error, BadRequestError)
                assert one.tries == 1
            else:
                assert one.text == other.text
        assert (figures.succeeded, figures.failed) == (56, 8)

    @pytest.mark.parametrize("poison", ["500", "reset"])
    async def test_also_one_that_breaks_the_server(
        self, server: ScriptedServer, poison: str
    ) -> None:
        broken = answers.error("500 Internal Server Error", "it broke", kind="InternalServerError")

        def answer(request: Request) -> Reply:
            if b"poison" in request.body:
                return [RESET] if poison == "reset" else [broken]
            return with_ids(request)

        server.respond(answer)
        prompts = ["poison" if number % 8 == 5 else str(number) for number in range(24)]

        found, _ = await answered("async", server.url, prompts, {}, pack=8, patience=0.5)

        for each in found:
            if prompts[each.index] == "poison":
                assert isinstance(each.error, ServerError | ConnectionError)
            else:
                assert each.text == prompts[each.index]

    async def test_a_server_that_does_not_tell_whose_tokens_they_are_gets_no_packs(
        self, server: ScriptedServer
    ) -> None:
        server.respond(echo)

        found, figures = await answered("async", server.url, PROMPTS, {}, pack=8)

        assert [answer.text for answer in found] == PROMPTS
        assert {answer.tries for answer in found} == {1}
        assert figures.packed == 0
        assert figures.completion_tokens == 2 * len(PROMPTS)

    async def test_a_server_that_takes_less_than_a_pack(self) -> None:
        with Fleet() as fleet:
            server = fleet.add(model="sim", max_num_seqs=3, max_num_queued_reqs=3)
            found, _ = await answered("async", server.url, PROMPTS, {"max_tokens": 3}, pack=16)

        assert {answer.error for answer in found} == {None}


def with_ids(request: Request) -> Reply:
    if request.method == "GET":
        return [answers.response()]
    prompt = request.json["prompt"]
    prompts = prompt if isinstance(prompt, list) else [prompt]
    body = answers.completion_body(*prompts)
    for choice in body["choices"]:
        choice |= {"token_ids": [1], "prompt_token_ids": [1, 2]}
    return [answers.response(body)]
