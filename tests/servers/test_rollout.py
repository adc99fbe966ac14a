"""A server is replaced under load by one with other weights; with a fake engine.

The fake's weights are folders: what a server of one says, and whether it starts, is written there.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.models.test_quantization import compressed
from tests.models.test_weights import write_tensors
from tests.servers.conftest import Fakes
from tests.support.waiting import eventually, until
from vllm_unified import (
    AsyncVllmUnified,
    QuantizationError,
    StepProgress,
    VllmError,
    VllmUnified,
)
from vllm_unified.errors import ModelNotFoundError
from vllm_unified.servers import LocalServer, ServerSpec, running_servers

PROGRAM = """
import asyncio, sys
from vllm_unified import AsyncVllmUnified

async def main():
    url, checkpoint = sys.argv[1:]
    def tell(told):
        if told.step == "start":
            print("starting", flush=True)
    async with AsyncVllmUnified(api_url=url) as vllm:
        await vllm.set_quantization(url, enabled=True, checkpoint=checkpoint, progress=tell)

asyncio.run(main())
"""


class Models:
    """The plain model of the fakes, and quantized ones."""

    def __init__(self, fakes: Fakes) -> None:
        self.fakes = fakes
        (fakes.model / "config.json").write_text("{}")
        write_tensors(fakes.model / "model.safetensors", a=4000)
        script = Path(__file__).with_name("fake_quantized.py")
        python = fakes.engine / "bin" / "python"
        python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" -S "{script}" "$@"\n')

    def quantized(self, name: str = "awq", *, bits: int = 4, **nature: Any) -> str:
        """A checkpoint; ``nature`` is for its ``fake.json``."""
        folder = self.fakes.root / name
        folder.mkdir()
        config = {"quantization_config": compressed(bits, activations=8 if bits == 8 else None)}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "fake.json").write_text(json.dumps(nature))
        write_tensors(folder / "model.safetensors", a=1000)
        return str(folder)

    def mend(self, checkpoint: str) -> None:
        """Have its servers start at once, and well."""
        Path(checkpoint, "fake.json").write_text("{}")


class Load:
    """Requests without a pause, and those that failed."""

    def __init__(self) -> None:
        self.count = 0
        self.failed: list[VllmError] = []
        self.models: set[str] = set()
        """Folders of the weights that answered, in the fake's answers."""

    async def run(self, client: AsyncVllmUnified, url: str) -> None:
        while True:
            try:
                prompt = "slow" if self.count % 10 == 0 else "fast"
                answer = await client.make_request(url, prompt, max_tokens=1, max_retries=0)
                self.models.add(answer.raw["model"])
            except VllmError as error:
                self.failed.append(error)
            self.count += 1
            await asyncio.sleep(0.005)


@asynccontextmanager
async def loaded(client: AsyncVllmUnified, url: str) -> AsyncIterator[Load]:
    """Load as long as the block runs; it goes on for some requests after."""
    load = Load()
    tasks = [asyncio.create_task(load.run(client, url)) for _ in range(3)]
    try:
        yield load
        before = load.count
        await eventually(lambda: load.count > before + 30)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def models(fakes: Fakes) -> Models:
    return Models(fakes)


@asynccontextmanager
async def local(spec: ServerSpec) -> AsyncIterator[tuple[AsyncVllmUnified, str]]:
    """A client with a server of its own, and its address."""
    async with await AsyncVllmUnified.local(spec=spec, progress=lambda _: None) as client:
        assert client.server is not None
        yield client, client.server.url


def own_port() -> int:
    """A free one that the system gives to nobody: those are above 32767."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def the_only_server() -> Any:
    [server] = running_servers()
    return server


async def test_another_server_takes_its_place_and_no_request_fails(
    fakes: Fakes, models: Models
) -> None:
    checkpoint = models.quantized()
    told: list[StepProgress] = []
    async with local(fakes.spec()) as (client, url), loaded(client, url) as load:
        config = {"enabled": True, "method": "awq", "bits": 4, "checkpoint": checkpoint}
        result = await client.set_quantization(url, "fake", config, progress=told.append)
        assert client.server is not None
        assert client.server.url == result.url == the_only_server().url
    assert load.failed == []
    assert load.models == {str(fakes.model), checkpoint}
    assert result.changed
    assert result.placement == "beside"
    assert result.url != url
    assert result.quantization == {
        "enabled": True,
        "method": "awq",
        "bits": 4,
        "checkpoint": checkpoint,
    }
    assert (result.before.weights_bytes, result.after.weights_bytes) == (4000, 1000)
    assert result.agreement == 1.0
    assert result.before.perplexity == result.after.perplexity == pytest.approx(2.718, abs=0.001)
    assert [step.name for step in result.steps] == ["check", "measure", "start", "prove", "switch"]
    assert [each.step for each in told if each.done] == [step.name for step in result.steps]
    assert not fakes.alive()


async def test_to_another_and_back_again(fakes: Fakes, models: Models) -> None:
    first, second = models.quantized(), models.quantized("w8a8", bits=8)
    async with local(fakes.spec()) as (client, url), loaded(client, url) as load:
        await client.set_quantization(url, enabled=True, checkpoint=first)
        again = await client.set_quantization(url, enabled=True, method="awq")
        assert not again.changed
        assert again.quantization["checkpoint"] == first
        await client.set_quantization(url, enabled=True, method="w8a8", checkpoint=second)
        result = await client.set_quantization(url, enabled=False)
        assert result.quantization["enabled"] is False
        assert the_only_server().spec.model == str(fakes.model)
        assert "UNQUANTIZED_MODEL" not in the_only_server().spec.env
        nothing = await client.set_quantization(url, enabled=False)
        assert not nothing.changed
    assert load.failed == []
    assert load.models == {str(fakes.model), first, second}


def test_the_blocking_client_does_the_same(fakes: Fakes, models: Models) -> None:
    checkpoint = models.quantized()
    with VllmUnified.local(spec=fakes.spec(), progress=lambda _: None) as client:
        assert client.server is not None
        url = client.server.url
        result = client.set_quantization(url, "fake", {"enabled": True, "checkpoint": checkpoint})
        assert result.changed
        assert client.make_request(url, "hello", max_tokens=1).raw["model"] == checkpoint


async def test_other_holders_move_along(fakes: Fakes, models: Models) -> None:
    spec = fakes.spec()
    async with local(spec) as (mine, url), local(spec) as (other, _), loaded(other, url) as load:
        result = await mine.set_quantization(url, enabled=True, checkpoint=models.quantized())
        await eventually(lambda: other.server is not None and other.server.url == result.url)
        await mine.close()
        assert the_only_server().url == result.url
    assert load.failed == []
    assert not fakes.alive()


async def test_a_server_that_does_not_start(fakes: Fakes, models: Models) -> None:
    checkpoint = models.quantized(mode="fail")
    async with local(fakes.spec()) as (client, url), loaded(client, url) as load:
        with pytest.raises(QuantizationError, match="no such kernel") as caught:
            await client.set_quantization(url, enabled=True, checkpoint=checkpoint)
        assert caught.value.step == "start"
        assert "no such kernel" in caught.value.log
        assert f"The server at {url} serves as before" in str(caught.value)
        assert the_only_server().url == url
    assert load.failed == []
    assert load.models == {str(fakes.model)}


@pytest.mark.parametrize(
    ("nature", "words"),
    [
        ({"logprob": -9.0}, "perplexity is 2.98e"),
        ({"logprob": None}, "perplexity is inf"),
        ({"mode": "mute"}, "no kernel for this shape"),
    ],
)
async def test_a_server_that_is_not_as_good(
    fakes: Fakes, models: Models, nature: dict[str, Any], words: str
) -> None:
    checkpoint = models.quantized(**nature)
    async with local(fakes.spec()) as (client, url), loaded(client, url) as load:
        with pytest.raises(QuantizationError) as caught:
            await client.set_quantization(url, enabled=True, checkpoint=checkpoint)
        assert words in caught.value.message
        assert caught.value.step == "prove"
        assert the_only_server().url == url
    assert load.failed == []


async def test_how_much_worse_it_may_be_is_the_callers_choice(fakes: Fakes, models: Models) -> None:
    checkpoint = models.quantized(logprob=-2.0)
    async with local(fakes.spec()) as (client, url):
        result = await client.set_quantization(
            url, enabled=True, checkpoint=checkpoint, max_perplexity_ratio=3
        )
    assert result.changed


async def test_in_place_where_the_port_was_chosen(fakes: Fakes, models: Models) -> None:
    spec = fakes.spec(port=own_port())
    async with local(spec) as (client, url), loaded(client, url) as load:
        result = await client.set_quantization(
            url, enabled=True, checkpoint=models.quantized(delay=0.3)
        )
        assert the_only_server().spec.model.endswith("awq")
    assert (result.placement, result.url) == ("in_place", url)
    assert "suspend" in [step.name for step in result.steps]
    assert load.failed == []
    assert not fakes.alive()


async def test_in_place_and_it_fails(fakes: Fakes, models: Models) -> None:
    spec = fakes.spec(port=own_port())
    async with local(spec) as (client, url), loaded(client, url) as load:
        with pytest.raises(QuantizationError, match="no such kernel") as caught:
            await client.set_quantization(
                url, enabled=True, checkpoint=models.quantized(mode="fail")
            )
        assert "is started again as it was" in str(caught.value)
        assert (the_only_server().url, the_only_server().state) == (url, "ready")
    assert load.failed == []
    assert load.models == {str(fakes.model)}


async def test_in_place_because_it_was_asked_for(fakes: Fakes, models: Models) -> None:
    async with local(fakes.spec()) as (client, url), loaded(client, url) as load:
        result = await client.set_quantization(
            url, enabled=True, checkpoint=models.quantized(), in_place=True
        )
    assert result.placement == "in_place"
    assert load.failed == []


async def test_a_detached_server_has_a_detached_successor(fakes: Fakes, models: Models) -> None:
    server = await LocalServer.start(fakes.spec(api_key="sk-secret"), detached=True)
    await server.stop()
    async with AsyncVllmUnified(api_url=server.url, api_key="sk-secret") as client:
        result = await client.set_quantization(enabled=True, checkpoint=models.quantized())
        answer = await client.generate("hello", max_tokens=1)
        assert answer.raw["model"].endswith("awq")
    assert the_only_server().url == result.url
    assert the_only_server().detached
    await (await LocalServer.attach(result.url)).end()


async def test_adapters_are_loaded_anew(fakes: Fakes, models: Models) -> None:
    adapter = fakes.root / "adapter"
    adapter.mkdir()
    async with local(fakes.spec(enable_lora=True)) as (client, url):
        await client.load_lora_adapter(
            url, adapter_name="poet", adapter_path=str(adapter), check=False
        )
        assert client.server is not None
        await client.server.note_adapters()
        await client.set_quantization(url, enabled=True, checkpoint=models.quantized())
        assert [each.name for each in await client.list_lora_adapters(url)] == ["poet"]


async def test_two_changes_at_once_are_refused(fakes: Fakes, models: Models) -> None:
    checkpoint = models.quantized(delay=4)
    async with local(fakes.spec()) as (client, url):
        change = client.set_quantization(url, enabled=True, checkpoint=checkpoint)
        first = asyncio.create_task(change)
        await eventually(lambda: len(running_servers()) == 2)
        with pytest.raises(QuantizationError, match="being changed by somebody else"):
            await client.set_quantization(url, enabled=True, checkpoint=checkpoint)
        assert (await first).changed


@pytest.mark.parametrize("in_place", [False, True])
async def test_a_cancelled_change_leaves_the_old_server(
    fakes: Fakes, models: Models, in_place: bool
) -> None:
    checkpoint = models.quantized(delay=5)
    async with local(fakes.spec()) as (client, url), loaded(client, url) as load:
        change = asyncio.create_task(
            client.set_quantization(url, enabled=True, checkpoint=checkpoint, in_place=in_place)
        )
        await eventually(lambda: len(running_servers()) == 2)
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        await eventually(lambda: len(running_servers()) == 1)
        assert the_only_server().spec.model == str(fakes.model)
    assert load.failed == []


async def test_a_change_that_is_cancelled_while_requests_end(fakes: Fakes, models: Models) -> None:
    checkpoint = models.quantized()
    async with local(fakes.spec()) as (client, url):
        assert client.server is not None
        await fakes.tell(client.server, "busy", running=1)
        change = asyncio.create_task(
            client.set_quantization(url, enabled=True, checkpoint=checkpoint, in_place=True)
        )
        fleet = client._directory.route(url)
        await eventually(lambda: fleet.endpoints[0].held)
        waiting = asyncio.create_task(client.make_request(url, "hello", max_tokens=1))
        await eventually(lambda: fleet.waiting == 1)
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        assert (await waiting).raw["model"] == str(fakes.model)
        assert the_only_server().state == "ready"


@pytest.fixture
def program() -> Iterator[Callable[[str, str], subprocess.Popen[str]]]:
    """Starts programs that change a server, and ends them with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(url: str, checkpoint: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, url, checkpoint]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


async def test_a_program_that_is_killed_in_the_middle(
    fakes: Fakes, models: Models, program: Callable[[str, str], subprocess.Popen[str]]
) -> None:
    checkpoint = models.quantized(delay=2)
    async with local(fakes.spec()) as (client, url), loaded(client, url) as load:
        process = program(url, checkpoint)
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "starting\n"
        await eventually(lambda: len(running_servers()) == 2)
        process.send_signal(signal.SIGKILL)
        await eventually(lambda: len(running_servers()) == 1)
        assert the_only_server().url == url
        models.mend(checkpoint)
        result = await client.set_quantization(url, enabled=True, checkpoint=checkpoint)
        assert result.changed
    assert load.failed == []
    until(lambda: not fakes.alive())


async def test_a_checkpoint_that_is_not_there(fakes: Fakes, models: Models) -> None:
    async with local(fakes.spec()) as (client, url):
        with pytest.raises(QuantizationError, match="there is no checkpoint /nowhere") as caught:
            await client.set_quantization(url, enabled=True, method="awq", checkpoint="/nowhere")
        assert caught.value.step == "check"
        assert len(fakes.pids()) == 1


async def test_another_model_than_is_meant(fakes: Fakes, models: Models) -> None:
    async with local(fakes.spec()) as (client, url):
        with pytest.raises(ModelNotFoundError, match="serves fake, not other"):
            await client.set_quantization(url, "other", enabled=False)
