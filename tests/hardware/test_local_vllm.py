"""The local vLLM as a backend, with a fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

import msgspec
import pytest

from tests.hardware.test_plan import machine
from tests.servers.conftest import Fakes
from tests.support.waiting import eventually
from vllm_unified import ClientClosedError, ConfigurationError, NoBackendError, ServerStartError
from vllm_unified.hardware import Capabilities, HardwareAbstractionLayer, LocalVllm
from vllm_unified.servers import running_servers

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="servers run on Linux")


async def test_started_by_the_first_request_once_for_all(fakes: Fakes) -> None:
    async with LocalVllm(spec=fakes.spec(delay=0.2)) as local, HardwareAbstractionLayer() as hal:
        hal.register_backend("llm", local)
        selection = await hal.select("llm", {"input": "1 + 1 =", "model": "fake"})
        assert selection.chosen == "local-vllm"
        assert "serves fake" in selection.candidates[0].reasons
        assert fakes.pids() == []  # to know what it would serve, it need not run

        answers = await asyncio.gather(*(hal.run_inference("llm", "1 + 1 =") for _ in range(5)))

        assert {answer.text for answer in answers} == {" 2"}
        assert len(fakes.pids()) == local.starts == 1
        assert local.server is not None
        assert local.server.url in repr(local)
    assert not fakes.alive()


async def test_stopped_when_unused_and_started_again(fakes: Fakes) -> None:
    async with LocalVllm(spec=fakes.spec(), idle_timeout=0.05) as local:
        hal = HardwareAbstractionLayer()
        hal.register_backend("llm", local)
        assert (await hal.run_inference("llm", "1 + 1 =")).text == " 2"
        await eventually(lambda: local.server is None and not fakes.alive())
        assert (await hal.run_inference("llm", "1 + 1 =")).text == " 2"
        assert local.starts == 2
        await hal.close()


async def test_a_request_keeps_it_running(fakes: Fakes) -> None:
    async with LocalVllm(spec=fakes.spec(), idle_timeout=0.01) as local:
        hal = HardwareAbstractionLayer()
        hal.register_backend("llm", local)
        for _ in range(3):
            assert (await hal.run_inference("llm", "1 + 1 =")).text == " 2"
        assert local.server is None or local.server.pid in fakes.alive()
        await hal.close()


async def test_a_server_that_is_gone_is_started_again(fakes: Fakes) -> None:
    async with LocalVllm(spec=fakes.spec(), timeout=5) as local:
        hal = HardwareAbstractionLayer()
        hal.register_backend("llm", local)
        await hal.run_inference("llm", "1 + 1 =")
        (running,) = running_servers()
        os.kill(running.supervisor_pid, signal.SIGKILL)
        await eventually(lambda: not fakes.alive())
        with contextlib.suppress(Exception):
            await hal.run_inference("llm", "1 + 1 =")
        assert (await hal.run_inference("llm", "1 + 1 =")).text == " 2"
        assert local.starts == 2
        await hal.close()


async def test_one_that_does_not_start_leaves_it_to_others(fakes: Fakes) -> None:
    async def other(request: object) -> str:
        return "other"

    async with LocalVllm(spec=fakes.spec("fail")) as local:
        hal = HardwareAbstractionLayer()
        hal.register_backend("llm", local, priority=1)
        with pytest.raises(ServerStartError, match="no such weights"):
            await hal.run_inference("llm", "1 + 1 =")
        hal.register_backend("llm", other)
        assert (await hal.run_inference("llm", "1 + 1 =")).backend == "other"
        assert not await local.health()  # nobody waits for another start that fails, for a while
        await hal.close()


async def test_leaving_does_not_end_the_start_for_others(fakes: Fakes) -> None:
    async with LocalVllm(spec=fakes.spec(delay=0.3)) as local:
        hal = HardwareAbstractionLayer()
        hal.register_backend("llm", local)
        first = asyncio.create_task(hal.run_inference("llm", "1 + 1 ="))
        second = asyncio.create_task(hal.run_inference("llm", "1 + 1 ="))
        await eventually(lambda: len(fakes.pids()) == 1)
        first.cancel()
        assert (await second).text == " 2"
        assert local.starts == 1
        await hal.close()


async def test_closed(fakes: Fakes) -> None:
    local = LocalVllm(spec=fakes.spec(delay=0.3))
    hal = HardwareAbstractionLayer()
    hal.register_backend("llm", local)
    call = asyncio.create_task(hal.run_inference("llm", "1 + 1 ="))
    await eventually(lambda: len(fakes.pids()) == 1)
    await local.close()
    with pytest.raises(ClientClosedError):
        await call
    await eventually(lambda: not fakes.alive())
    with pytest.raises(ClientClosedError):
        await hal.run_inference("llm", "1 + 1 =")
    await hal.close()


class TestItsSize:
    async def test_is_planned_for_the_machine(self) -> None:
        local = LocalVllm("bundled", hardware=machine())
        spec = await local.spec()
        assert (spec.dtype, spec.kv_cache_gib, spec.max_model_len) == ("bfloat16", 1.0, 2048)
        assert (await local.capabilities()) == Capabilities(
            models={"SmolLM2-135M-Instruct": 2048}, device="cpu"
        )

    async def test_on_a_gpu(self) -> None:
        local = LocalVllm("bundled", hardware=machine(1))
        spec = await local.spec()
        assert spec.kv_cache_gib is None
        assert (await local.capabilities()).device == "cuda"

    async def test_what_does_not_fit_is_not_chosen(self) -> None:
        tight = msgspec.structs.replace(machine(), memory_available=2**30)
        local = LocalVllm("bundled", hardware=tight)
        with pytest.raises(ConfigurationError, match="does not fit"):
            await local.spec()
        hal = HardwareAbstractionLayer()
        hal.register_backend("llm", local)
        with pytest.raises(NoBackendError, match="no backend can take") as caught:
            await hal.run_inference("llm", "Hello")
        assert "it does not fit" in str(caught.value)
        await hal.close()


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_a_wrong_idle_timeout(seconds: float) -> None:
    with pytest.raises(ConfigurationError, match="idle_timeout"):
        LocalVllm(idle_timeout=seconds)
