"""One start of vLLM: from the command to the first token, or to the reason why there is none."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vllm_unified.servers import logs
from vllm_unified.servers.engines import Engine
from vllm_unified.servers.lease import ServerEvent
from vllm_unified.servers.probe import Contact
from vllm_unified.servers.process import VllmProcess
from vllm_unified.servers.restarts import Pacing
from vllm_unified.servers.spec import ServerSpec, command, environment

_POLL = 0.1
_PORT_TRIES = 5


class SupervisorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor gets on its standard input."""

    spec: ServerSpec
    """Resolved: the model is a folder or a repository's id."""
    engine: Engine
    fingerprint: str
    log_path: str
    lease: int
    """The first lease: an inherited connection's file descriptor."""
    start_timeout: float
    """Seconds until the server must be ready."""
    stop_grace: float = 4.0
    """Seconds between SIGTERM and SIGKILL."""
    pacing: Pacing = Pacing()


class StartFailedError(Exception):
    """vLLM did not become ready; ``event`` says why."""

    def __init__(self, event: ServerEvent) -> None:
        super().__init__(event.message)
        self.event = event


class Starter:
    """Starts vLLM, again at the port where it was before, and reads what its log says."""

    def __init__(
        self,
        config: SupervisorConfig,
        say: Callable[[str], object],
        spawned: Callable[[VllmProcess, str], object],
    ) -> None:
        """
        Args:
            config: What to start.
            say: Gets how far the start is.
            spawned: Gets each process, and the address that it will listen at.
        """
        self._config = config
        self._spec = config.spec
        self._log = Path(config.log_path)
        self._say = say
        self._spawned = spawned
        self._begin = 0
        self._port = config.spec.port

    @property
    def contact(self) -> Contact:
        """The server that was started last."""
        assert self._port is not None
        return Contact(
            host=self._spec.host,
            port=self._port,
            model=self._spec.name,
            api_key=self._spec.api_key,
        )

    async def start(self) -> VllmProcess:
        """A vLLM that has generated a token.

        Raises:
            StartFailedError: it has not; it was ended.
        """
        logs.cut(self._log)
        tries = 1 if self._spec.port else _PORT_TRIES
        while True:
            tries -= 1
            self._port = self._port or free_port(self._spec.host)
            try:
                return await self._start_on(self._port)
            except StartFailedError as failure:
                if not tries or not logs.is_port_taken(failure.event.message):
                    raise
            self._port = None
            self._say("the port was taken meanwhile: trying another")

    def why_it_ended(self, code: int) -> str:
        """What a process that was ready ended with, in words."""
        cause = logs.failure_cause(logs.since(self._log, self._begin))
        said = f"ended by itself (exit code {code})"
        return f"{said}: {cause}" if cause else said

    async def _start_on(self, port: int) -> VllmProcess:
        self._begin = self._log.stat().st_size if self._log.exists() else 0
        try:
            process = await VllmProcess.spawn(
                command(self._spec, self._config.engine, port),
                env=environment(self._spec, self._config.engine, os.environ),
                log=self._log,
            )
        except OSError as error:
            python = self._config.engine.python
            raise self._failed(f"cannot run {python}: {error.strerror}") from error
        self._spawned(process, server_url(self._spec.host, port))
        ready = asyncio.create_task(self._until_ready())
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait(
                [ready, ended],
                timeout=self._config.start_timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not ended.done() and ready.done():
                ready.result()
                return process
        except (PermissionError, ValueError) as error:
            raise self._failed(str(error)) from error
        finally:
            await cancel(ready, ended)
        event = self._why(process)
        await process.stop(self._config.stop_grace)
        raise event

    async def _until_ready(self) -> None:
        contact, begin = self.contact, self._begin
        while not await contact.generates():
            begin = self._report_progress(begin)
            await asyncio.sleep(_POLL)

    def _report_progress(self, begin: int) -> int:
        """Tell the milestones in the log since ``begin``; where to go on."""
        with self._log.open("rb") as file:
            file.seek(begin)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.decode("utf-8", "replace").splitlines():
            if said := logs.progress_of(line):
                self._say(said)
        return begin + len(whole)

    def _why(self, process: VllmProcess) -> StartFailedError:
        if process.running:
            seconds = self._config.start_timeout
            return self._failed(
                f"not ready within {seconds:g} s", hint="Give it more time with start_timeout."
            )
        text = logs.since(self._log, self._begin)
        cause = logs.failure_cause(text) or _last_words(text)
        return self._failed(cause, hint=logs.failure_hint(cause))

    def _failed(self, message: str, hint: str | None = None) -> StartFailedError:
        return StartFailedError(
            ServerEvent(
                state="failed",
                message=message,
                log=logs.tail(self._log),
                log_path=str(self._log),
                hint=hint,
            )
        )


def free_port(host: str) -> int:
    """A TCP port of ``host`` that nobody listens on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def server_url(host: str, port: int) -> str:
    """The address for a client on this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _last_words(text: str) -> str:
    said = [line for line in text.splitlines() if line.strip()]
    return said[-1] if said else "vLLM ended without a word"
