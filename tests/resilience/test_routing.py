"""What a strategy that knows of prefix caches is for: conversations return to theirs."""

from __future__ import annotations

import asyncio
import random
import re
from functools import cache
from urllib.request import urlopen

import msgspec
import pytest

from vllm_unified import AsyncVllmUnified, LoadBalancer
from vllm_unified.simulator import Fleet, SimulatorConfig, Timing
from vllm_unified.simulator.vocabulary import WORDS

pytestmark = pytest.mark.resilience

SERVERS, CONVERSATIONS, TURNS = 8, 24, 8
QUESTION, ANSWER = 100, 20
BLOCK = 16
TOKENS = TURNS * (QUESTION + ANSWER + 10)
"""Of a whole conversation, with what the chat template adds."""
CONFIG = SimulatorConfig(
    block_size=BLOCK,
    num_blocks=CONVERSATIONS // 4 * TOKENS // BLOCK,
    max_model_len=TOKENS,
    timing=Timing(per_prompt_token=0.0002),
)
"""Its cache holds a quarter of the conversations. A prompt of them takes a tenth of a second."""

AWARE = pytest.mark.parametrize("strategy", ["prefix_aware", "session"])


class Found(msgspec.Struct, frozen=True):
    """What became of all conversations."""

    hits: float
    """Prompt tokens that were in a cache."""
    computed: float
    """Prompt tokens that were not."""
    first_token: float
    """Mean seconds."""
    requests: list[int]
    """By server."""


class Conversation:
    def __init__(self, number: int, system: str) -> None:
        self.name = str(number)
        self.turns = 0
        self._random = random.Random(number)
        self._messages = [{"role": "system", "content": system}] if system else []

    async def take_turn(self, balancer: LoadBalancer) -> None:
        question = " ".join(self._random.choices(WORDS, k=QUESTION))
        self._messages.append({"role": "user", "content": question})
        answer = await balancer.stream_chat(
            self._messages, session_id=self.name, max_tokens=ANSWER, ignore_eos=True
        ).collect()
        self._messages.append(answer.message)
        self.turns += 1


async def converse(balancer: LoadBalancer, *, at_once: int, system: str) -> None:
    """All turns of all conversations, in random order."""
    order = random.Random(0)
    idle = [Conversation(number, system) for number in range(CONVERSATIONS)]

    async def take_turns() -> None:
        while idle:
            conversation = idle.pop(order.randrange(len(idle)))
            await conversation.take_turn(balancer)
            if conversation.turns < TURNS:
                idle.append(conversation)

    await asyncio.gather(*(take_turns() for _ in range(at_once)))


async def through_a_client(
    urls: list[str], strategy: str, *, at_once: int, system: str
) -> tuple[float, list[int]]:
    """Mean seconds to the first token, and the requests that each server got."""
    # Sessions are spread by the ids, which are by default addresses, and these differ every time.
    members = {f"gpu{number}": url for number, url in enumerate(urls)}
    async with AsyncVllmUnified(timeout=60) as vllm:
        balancer = vllm.create_load_balancer(members, strategy=strategy)
        await converse(balancer, at_once=at_once, system=system)
        stats = vllm.get_stats()
        first_token = stats.overall.time_to_first_token
        assert first_token is not None
        return first_token.mean, [stats.endpoints[each.id].requests for each in balancer.endpoints]


def run(config: SimulatorConfig, strategy: str, *, at_once: int = 8, system: str = "") -> Found:
    """All conversations, on new servers."""
    with Fleet() as fleet:
        for _ in range(SERVERS):
            fleet.add(config)
        first_token, requests = asyncio.run(
            through_a_client(fleet.urls, strategy, at_once=at_once, system=system)
        )
        queries = sum(metric(url, "vllm:prefix_cache_queries_total") for url in fleet.urls)
        hits = sum(metric(url, "vllm:prefix_cache_hits_total") for url in fleet.urls)
    return Found(hits=hits, computed=queries - hits, first_token=first_token, requests=requests)


def metric(url: str, name: str) -> float:
    with urlopen(f"{url}/metrics") as answer:
        found = re.search(rf"^{name}\{{.*\}} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


@cache
def conversations(strategy: str) -> Found:
    return run(CONFIG, strategy)


@AWARE
def test_most_of_a_conversation_is_found_in_a_cache(strategy: str) -> None:
    found = conversations(strategy)

    assert found.hits > 0.6 * (found.hits + found.computed)


@AWARE
def test_less_than_half_of_what_round_robin_has_computed_is_computed(strategy: str) -> None:
    assert conversations(strategy).computed < conversations("round_robin").computed / 2


@AWARE
def test_the_first_token_comes_in_less_than_half_the_time_of_round_robin(strategy: str) -> None:
    aware, unaware = conversations(strategy), conversations("round_robin")

    assert aware.first_token < unaware.first_token / 2


@pytest.mark.parametrize("at_once", [1, 8])
def test_a_system_prompt_that_all_share_leaves_no_server_with_twice_its_share(at_once: int) -> None:
    system = " ".join(random.Random(-1).choices(WORDS, k=500))
    roomy = msgspec.structs.replace(
        CONFIG, max_model_len=TOKENS + 600, num_blocks=4 * CONFIG.num_blocks, timing=Timing()
    )

    found = run(roomy, "prefix_aware", at_once=at_once, system=system)

    assert max(found.requests) <= 2 * CONVERSATIONS * TURNS / SERVERS
