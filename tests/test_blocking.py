"""The blocking client: threads, loops, forks, interrupts, and its end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support import answers
from tests.support.answers import text_event
from tests.support.scripted import STALL, Reply, Request, ScriptedServer
from tests.support.waiting import until
from vllm_unified import ClientClosedError, ConfigurationError, VllmUnified


def client(server: ScriptedServer, **settings: Any) -> VllmUnified:
    return VllmUnified(api_url=server.url, **{"timeout": 10, "max_retries": 0, **settings})


def repeat(request: Request) -> Reply:
    body = request.json
    if body.get("stream"):
        return answers.texts([*body["prompt"]])
    return [answers.completion(body["prompt"])]


def loop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vllm-unified"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    before = len(loop_threads())
    yield
    if len(loop_threads()) > before:
        gc.collect()
    until(lambda: len(loop_threads()) <= before)


def test_many_threads_at_once(server: ScriptedServer) -> None:
    together = threading.Event()
    server.respond(lambda request: [together, *repeat(request)])

    with client(server) as vllm, ThreadPoolExecutor(32) as pool:
        calls = [pool.submit(vllm.generate, f"prompt {number}") for number in range(32)]
        until(lambda: len(server.requests) == 32)
        together.set()
        texts = [call.result().text for call in calls]

    assert texts == [f"prompt {number}" for number in range(32)]


def test_streams_in_many_threads_at_once(server: ScriptedServer) -> None:
    server.respond(repeat)

    def read(prompt: str) -> str:
        return "".join(chunk.text for chunk in vllm.stream(prompt))

    prompts = [f"prompt {number}" for number in range(32)]
    with client(server) as vllm, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, prompts)) == prompts


async def test_inside_a_running_loop(server: ScriptedServer) -> None:
    """As in a notebook."""
    server.respond(repeat)

    with client(server) as vllm:
        assert vllm.generate("a").text == "a"
        assert [chunk.text for chunk in vllm.stream("ab")] == ["a", "b"]


def test_from_a_callback_of_its_own(server: ScriptedServer) -> None:
    """Waiting there for itself would never end."""
    server.respond(repeat)

    with client(server) as vllm:
        with pytest.raises(ClientClosedError, match="callback"):
            vllm.batch(["a"], on_progress=lambda _: vllm.generate("b"))
        assert vllm.generate("c").text == "c"


def test_closed_from_a_callback_of_its_own(server: ScriptedServer) -> None:
    server.reply(answers.completion("a")).always(STALL)
    vllm = client(server)

    with pytest.raises(ClientClosedError):
        vllm.batch(["a", "b", "c"], on_progress=lambda _: vllm.close())
    with pytest.raises(ClientClosedError):
        vllm.generate("d")


def test_closed_by_another_thread_the_call_ends_at_once(server: ScriptedServer) -> None:
    server.always(STALL)
    vllm = client(server)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(vllm.generate, "a")
        until(lambda: len(server.requests) == 1)
        started = time.monotonic()

        vllm.close()

        with pytest.raises(ClientClosedError, match="closed"):
            call.result(20)
    assert time.monotonic() - started < 10
    until(lambda: server.open_connections == 0)


def test_calls_and_closing_race(server: ScriptedServer) -> None:
    """Whatever the order, every call returns or raises."""
    server.respond(repeat)

    def call(vllm: VllmUnified) -> str:
        try:
            return vllm.generate("a").text
        except ClientClosedError:
            return "closed"

    for _ in range(20):
        vllm = client(server)
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(call, vllm) for _ in range(8)]
            vllm.close()
            assert {done.result(5) for done in calls} <= {"a", "closed"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_it_says_so(server: ScriptedServer) -> None:
    server.respond(repeat)
    with client(server) as vllm:
        vllm.generate("a")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            said = "nothing"
            try:
                vllm.generate("b")
            except ClientClosedError as error:
                said = str(error)
            finally:
                vllm.close()
                os.write(writing, said.encode())
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            assert "before a fork" in pipe.read()
        os.waitpid(child, 0)
        assert vllm.generate("c").text == "c"


def run(code: str, server: ScriptedServer) -> subprocess.Popen[str]:
    head = f"from vllm_unified import VllmUnified\nvllm = VllmUnified(api_url={server.url!r})\n"
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-c", head + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("code", "reply"),
    [
        ("vllm.generate('a')", (STALL,)),
        ("vllm.stream('a').collect()", (STALL,)),
        ("with vllm.stream('a') as chunks: list(chunks)", (answers.sse(text_event("a")), STALL)),
        ("vllm.batch(['a'] * 3)", (STALL,)),
    ],
)
def test_an_interrupt_ends_the_request_on_the_server(
    server: ScriptedServer, code: str, reply: Reply
) -> None:
    server.always(*reply)
    program = run(
        f"""
import sys
try:
    {code}
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.stdin.readline()
""",
        server,
    )
    with program:
        until(lambda: len(server.requests) == code.count("batch") * 2 + 1, seconds=10)

        program.send_signal(signal.SIGINT)

        assert program.stdout is not None
        assert program.stdout.readline() == "interrupted\n"
        # The program is still alive here: it was not its end that closed the connections.
        until(lambda: server.open_connections == 0)
        program.kill()


def test_an_interrupt_before_the_wait_cancels_what_was_begun(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.always(STALL)

    def interrupted(outcome: object) -> None:
        until(lambda: len(server.requests) == 1)
        raise KeyboardInterrupt

    with client(server) as vllm:
        monkeypatch.setattr("vllm_unified.bridge._wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vllm.generate("a")
        until(lambda: server.open_connections == 0)


@pytest.mark.parametrize(
    "code",
    [
        "vllm.generate('a')",
        "pass",
        "stream = vllm.stream('ab'); next(stream)",
        "import gc; gc.disable(); vllm.me = vllm; vllm.generate('a')",
    ],
)
def test_a_program_that_does_not_close_ends_silently(server: ScriptedServer, code: str) -> None:
    server.respond(repeat)

    with run(code, server) as program:
        output, errors = program.communicate(timeout=60)

    assert (program.returncode, output, errors) == (0, "", "")


def test_a_client_that_is_forgotten_ends_its_thread_and_its_connections(
    server: ScriptedServer,
) -> None:
    server.respond(repeat)
    before = len(loop_threads())
    vllm = client(server)
    vllm.generate("a")
    assert len(loop_threads()) == before + 1

    del vllm
    gc.collect()

    until(lambda: len(loop_threads()) == before)
    until(lambda: server.open_connections == 0)


def test_a_stream_keeps_its_client(server: ScriptedServer) -> None:
    server.respond(repeat)

    stream = client(server).stream("ab")
    gc.collect()

    assert [chunk.text for chunk in stream] == ["a", "b"]


def test_a_handler_keeps_its_client(server: ScriptedServer) -> None:
    server.respond(repeat)

    handler = client(server).create_vllm_endpoint_handler(None, "m")
    gc.collect()

    assert handler("a").text == "a"


def test_a_stream_that_is_forgotten_is_ended(server: ScriptedServer) -> None:
    server.always(answers.sse(text_event("a")), STALL)
    with client(server) as vllm:
        streams = [vllm.stream("x")]
        next(streams[0])

        with pytest.warns(ResourceWarning, match="left without being closed"):
            streams.clear()

        until(lambda: server.open_connections == 0)


def test_a_client_that_cannot_be_made_leaves_no_thread() -> None:
    before = len(loop_threads())

    with pytest.raises(ConfigurationError):
        VllmUnified(api_url="nonsense")

    assert len(loop_threads()) == before


def test_a_closed_client_can_be_collected(server: ScriptedServer) -> None:
    server.respond(repeat)
    vllm = client(server)
    vllm.generate("a")
    vllm.close()
    gone = weakref.ref(vllm)

    del vllm
    gc.collect()

    assert gone() is None


def test_the_collector_does_not_wait_for_a_clients_end(server: ScriptedServer) -> None:
    """It can run in any thread, and would hold up that thread's own event loop."""
    server.respond(repeat)
    ending = threading.Event()

    vllm = client(server)
    vllm.generate("a")
    close = vllm._client.close

    async def close_slowly() -> None:
        await asyncio.to_thread(ending.wait, 10)
        await close()

    vllm._thread.farewell = close_slowly
    (thread,) = loop_threads()

    del vllm
    gc.collect()
    assert thread.is_alive()

    ending.set()
    until(lambda: not thread.is_alive())


def test_a_client_that_is_never_closed_is_closed_at_exit(server: ScriptedServer) -> None:
    server.respond(repeat)
    program = f"""
from vllm_unified import VllmUnified
vllm = VllmUnified(api_url={server.url!r})
vllm.generate("a")
closed = vllm._client.close
async def close():
    await closed()
    print("closed")
vllm._thread.farewell = close
"""
    said = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert (said.stdout, said.stderr) == ("closed\n", "")


def test_chunks_that_came_together_are_read_together(server: ScriptedServer) -> None:
    """Crossing into the other thread costs more than a chunk."""
    server.always(b"".join(answers.texts([str(number % 10) for number in range(100)])))

    with client(server) as vllm, vllm.stream("x") as stream:
        assert len([chunk.text for chunk in stream]) == 100


def test_its_repr(server: ScriptedServer) -> None:
    with client(server, model="m", api_key="geheim") as vllm:
        assert repr(vllm) == f"<VllmUnified {server.url} m>"
        assert "not started" in repr(vllm.stream("a"))


def test_two_clients_do_not_share_a_loop(server: ScriptedServer) -> None:
    server.respond(repeat)

    with client(server) as one, client(server) as other:
        # A callback of the one may use the other.
        texts: list[str] = []
        one.batch(["a"], on_progress=lambda _: texts.append(other.generate("b").text))

    assert texts == ["b"]


def test_it_can_be_used_from_asyncios_threads(server: ScriptedServer) -> None:
    server.respond(repeat)

    async def main() -> list[str]:
        with client(server) as vllm:
            calls = [asyncio.to_thread(vllm.generate, text) for text in "abc"]
            return [result.text for result in await asyncio.gather(*calls)]

    assert asyncio.run(main()) == ["a", "b", "c"]
