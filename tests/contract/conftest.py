"""The servers that the contract is held against: the simulator, and a real vLLM."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest

from tests.contract.wire import Target
from tests.support.adapters import write_adapter
from tests.support.vllm import all_running
from vllm_unified.servers import BUNDLED_NAME, ServerSpec
from vllm_unified.servers.cache import models_dir
from vllm_unified.simulator import Simulator, SimulatorConfig, Timing

MODEL = "contract"
KEY = "contract-key"
CONFIG = SimulatorConfig(
    model="models/contract",
    served_model_names=(MODEL,),
    max_model_len=2048,
    block_size=128,
    num_blocks=364,
    api_keys=(KEY,),
    enable_lora=True,
    max_loras=2,
)
"""As the real server is started."""
SPEC = ServerSpec(
    served_model_name=MODEL,
    max_model_len=2048,
    api_key=KEY,
    dev_mode=True,
    enable_lora=True,
    max_loras=2,
    max_lora_rank=8,
)
BUSY_SPEC = msgspec.structs.replace(SPEC, extra_args=("--max-num-queued-reqs", "2"))


@pytest.fixture(scope="package")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """The real vLLM, and beside it one that refuses a third request."""
    with all_running(SPEC, BUSY_SPEC) as (server, busy):
        folder = tmp_path_factory.mktemp("contract") / "adapter"
        adapter = write_adapter(folder, models_dir() / BUNDLED_NAME)
        yield Target(server.url, MODEL, KEY, str(adapter), busy.url)


_LIVE = (pytest.mark.live, pytest.mark.timeout(900))


@pytest.fixture(params=["simulator", pytest.param("vllm", marks=_LIVE)])
def real(request: pytest.FixtureRequest) -> Target | None:
    """The real server, where it is its turn. No coroutine: starting it runs a loop of its own."""
    return request.getfixturevalue("vllm") if request.param == "vllm" else None


@pytest.fixture
async def target(real: Target | None) -> AsyncIterator[Target]:
    """A server to hold against the contract."""
    if real is not None:
        yield real
        return
    slow = Timing(time_to_first_token=0.001, inter_token_latency=0.002)
    async with (
        Simulator(CONFIG, timing=slow) as server,
        Simulator(CONFIG, timing=slow, max_num_queued_reqs=2) as busy,
    ):
        yield Target(server.url, MODEL, KEY, "models/adapter", busy.url)
