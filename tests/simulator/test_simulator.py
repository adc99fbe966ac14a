"""The object: many in one process, its record, its control API, sockets, and the plugin."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import aiohttp
import pytest

from tests.simulator.raw import exchange, request
from tests.simulator.tls import server_context
from vllm_unified import simulator
from vllm_unified.simulator import (
    Fault,
    Fleet,
    Simulator,
    parse_fault,
)

pytest_plugins = ["pytester"]


async def test_three_hundred_in_one_process() -> None:
    servers = [Simulator(model=f"model-{number}") for number in range(300)]
    await asyncio.gather(*[server.start() for server in servers])
    try:
        async with aiohttp.ClientSession() as session:

            async def ask(server: Simulator) -> tuple[str, str]:
                body = {"prompt": "Hi", "max_tokens": 2, "ignore_eos": True}
                async with session.post(f"{server.url}/v1/completions", json=body) as reply:
                    answer = await reply.json()
                    return answer["model"], answer["choices"][0]["finish_reason"]

            answers = await asyncio.gather(*[ask(server) for server in servers])
        assert answers == [(f"model-{number}", "length") for number in range(300)]
        assert len({server.url for server in servers}) == 300
    finally:
        await asyncio.gather(*[server.stop() for server in servers])


async def test_requests_are_recorded() -> None:
    async with Simulator() as server:
        await exchange(server.url, request({"prompt": "Hi", "max_tokens": 1}, close=True))
        (recorded,) = server.requests
        assert (recorded.method, recorded.path, recorded.status) == ("POST", "/v1/completions", 200)
        assert recorded.json == {"prompt": "Hi", "max_tokens": 1}
        assert recorded.headers["host"] == "test"
        assert not recorded.disconnected
        assert repr(recorded) == "<POST /v1/completions: 200>"
        assert "1 requests" in repr(server)


async def test_faults_are_switched_over_http() -> None:
    async with Simulator() as server, aiohttp.ClientSession() as session:
        url = f"{server.url}/simulator/faults"
        fault = {"kind": "busy", "times": None, "header": "x-tenant: a"}
        async with session.post(url, json=fault) as reply:
            assert (await reply.json())["faults"][0]["kind"] == "busy"
        body = {"prompt": "Hi", "max_tokens": 1}
        for tenant, status in (("a", 503), ("b", 200), ("a", 503)):
            headers = {"x-tenant": tenant}
            async with session.post(
                f"{server.url}/v1/completions", json=body, headers=headers
            ) as reply:
                assert reply.status == status
        async with session.delete(url) as reply:
            assert await reply.json() == {"faults": []}
        async with session.post(url, json={"kind": "nonsense"}) as reply:
            assert reply.status == 400
        assert len(server.requests) == 3


async def test_faults_choose_their_requests() -> None:
    async with Simulator(served_model_names=("a", "b")) as server, aiohttp.ClientSession() as http:

        async def status(model: str) -> int:
            body = {"model": model, "prompt": "Hi", "max_tokens": 1}
            async with http.post(f"{server.url}/v1/completions", json=body) as reply:
                return reply.status

        server.fail_next("busy", times=2, model="b")
        assert [await status(model) for model in "abbb"] == [200, 503, 503, 200]
        server.faults.add(Fault(kind="busy", times=None, probability=0.5))
        statuses = [await status("a") for _ in range(60)]
        assert 10 < statuses.count(503) < 50
        server.heal()
        assert await status("a") == 200


def test_a_fault_can_be_written_in_one_word() -> None:
    assert parse_fault("reset") == Fault(kind="reset", times=None)
    expected = Fault(kind="stall_after", times=3, after_tokens=5, probability=0.5)
    assert parse_fault("stall_after:after_tokens=5,times=3,probability=0.5") == expected
    with pytest.raises(ValueError, match="kinds are refuse, reset"):
        parse_fault("explode")
    with pytest.raises(ValueError, match="not name=value"):
        parse_fault("reset:now")


async def test_a_bad_option_is_refused() -> None:
    with pytest.raises(TypeError):
        Simulator(modell="x")
    with pytest.raises(ValueError, match="raise num_blocks"):
        Simulator(num_blocks=1)
    async with Simulator() as server:
        with pytest.raises(ValueError, match="unknown field"):
            server.fail_next("reset", after=3)
        with pytest.raises(ValueError, match="times must be at least 1"):
            server.fail_next("reset", times=0)


async def test_idle_connections_are_closed() -> None:
    async with Simulator(keep_alive=0.1) as server:
        received, end = await exchange(server.url, request({"prompt": "Hi", "max_tokens": 1}))
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert end == "closed"
        assert server.connections == 0


async def test_garbage_is_refused() -> None:
    async with Simulator() as server:
        received, end = await exchange(server.url, b"what is this?\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 400 Bad Request")
        assert end == "closed"


async def test_a_body_may_come_in_chunks_and_a_target_in_pieces() -> None:
    async with Simulator() as server:
        body = b'{"prompt": "Hi", "max_tokens": 1}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        head += b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        received, _ = await exchange(
            server.url, head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        )
        assert received.startswith(b"HTTP/1.1 200 OK")


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    connector = aiohttp.UnixConnector(path)
    async with (
        Simulator(uds=path),
        aiohttp.ClientSession(connector=connector) as session,
        session.get("http://localhost/v1/models") as reply,
    ):
        assert (await reply.json())["data"][0]["id"] == "sim"


async def test_tls(tmp_path: Path) -> None:
    served, trusted = server_context(tmp_path)
    async with Simulator(tls=served) as server, aiohttp.ClientSession() as session:
        assert server.url.startswith("https://127.0.0.1:")
        url = server.url.replace("127.0.0.1", "localhost")
        async with session.get(f"{url}/v1/models", ssl=trusted) as reply:
            assert reply.status == 200
        server.fail_next("reset")
        body = {"prompt": "Hi"}
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.post(f"{url}/v1/completions", json=body, ssl=trusted)


async def test_fixed_answers_keep_the_shape_of_real_ones() -> None:
    async with Simulator(fixed_answer=True) as server, aiohttp.ClientSession() as session:
        url = f"{server.url}/v1/completions"
        for _ in range(2):
            async with session.post(url, json={"prompt": "Hi"}) as reply:
                assert (await reply.json())["choices"][0]["text"] == " Hello"
        async with session.post(url, json={"prompt": "Hi", "stream": True}) as reply:
            events = (await reply.read()).split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        assert len(events) == 102


def test_a_fleet_serves_blocking_code() -> None:
    with Fleet() as fleet:
        servers = [fleet.add(model=f"m{number}") for number in range(3)]
        for server in servers:
            with urllib.request.urlopen(f"{server.url}/v1/models", timeout=30) as reply:
                assert server.config.model.encode() in reply.read()
        servers[0].kill()
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"{servers[0].url}/health", timeout=30)
        servers[0].start()
        with urllib.request.urlopen(f"{servers[0].url}/health", timeout=30) as reply:
            assert reply.status == 200


@pytest.mark.processes
def test_the_plugin_gives_fixtures(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import urllib.request
        import pytest

        @pytest.mark.vllm_simulator(model="mine")
        def test_one(vllm_simulator):
            with urllib.request.urlopen(vllm_simulator.url + "/v1/models") as reply:
                assert b'"id":"mine"' in reply.read()
            assert vllm_simulator.requests[0].path == "/v1/models"

        def test_many(vllm_fleet):
            servers = [vllm_fleet.add() for _ in range(3)]
            assert len({server.url for server in servers}) == 3
        """
    )
    result = pytester.runpytest_subprocess("-q")
    result.assert_outcomes(passed=2)


def test_importing_the_library_loads_no_simulator() -> None:
    code = (
        "import sys, vllm_unified;"
        "print([m for m in sys.modules if 'simulator' in m or m == 'pytest'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_plugin_loads_no_server() -> None:
    code = (
        "import sys; sys.modules['httptools'] = None;"
        "import vllm_unified.simulator.pytest_plugin;"
        "from vllm_unified.simulator import SimulatorConfig;"
        "print(SimulatorConfig().model)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "sim"


def test_every_public_name_exists() -> None:
    for name in simulator.__all__:
        assert getattr(simulator, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        simulator.nothing  # noqa: B018


def test_run_serves_until_it_is_interrupted() -> None:
    code = (
        "from vllm_unified.simulator import SimulatorConfig, parse_fault, run;"
        "raise SystemExit(run(SimulatorConfig(model='cli'), faults=[parse_fault('busy')]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        name, _, url = process.stdout.readline().strip().partition(" at ")
        assert name == "cli"
        with urllib.request.urlopen(f"{url}/health", timeout=30) as reply:
            assert reply.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()
