"""The process that owns one vLLM: ``python -m vllm_unified.servers.supervisor``.

Its configuration comes on standard input, so that no key is in a process list. Each user of the
server holds a connection to it, a lease. When the last one is gone, whoever closed it, the server
is ended with all its processes, unless it is detached. A vLLM that ends by itself, or hangs, is
started again.

Failures of this chain are covered by another process each: a user that is killed by the kernel,
which closes its lease; the supervisor by the guard of ``process.py``; the guard by the supervisor.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from vllm_unified.servers.control import Control
from vllm_unified.servers.holders import Holders
from vllm_unified.servers.keeper import Keeper
from vllm_unified.servers.lease import ServerEvent
from vllm_unified.servers.locks import FileLock
from vllm_unified.servers.process import become_subreaper
from vllm_unified.servers.records import (
    RecordedState,
    RunningServer,
    alive_lock,
    control_path,
    public_spec,
    remove_record,
    socket_path,
    write_record,
)
from vllm_unified.servers.starter import SupervisorConfig

_POLL = 0.05
_RECORDED: dict[str, RecordedState] = {
    "starting": "starting",
    "ready": "ready",
    "restarting": "restarting",
    "suspended": "suspended",
}


class Supervisor:
    """Runs one vLLM while there are leases, or while it is detached."""

    def __init__(self, config: SupervisorConfig) -> None:
        self.config = config
        self.holders = Holders()
        self.keeper = Keeper(config, self._tell, self.note)
        self._control = Control(self)
        self._alive = FileLock(alive_lock(config.fingerprint))
        self._found = False
        self._started_at = time.time()

    async def run(self) -> None:
        """Serve until the last lease is gone, vLLM is given up, or SIGTERM."""
        await self.holders.adopt(self.config.lease)
        life = asyncio.create_task(self._live())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.holders.unused.set)
        unused = asyncio.create_task(self.holders.unused.wait())
        await asyncio.wait([life, unused], return_when=asyncio.FIRST_COMPLETED)
        unused.cancel()
        self.withdraw()
        life.cancel()
        try:
            final = await _outcome(life)
        finally:
            await self.keeper.stop()
        if final:
            self.holders.tell(final)
        await self.holders.close()

    def note(self) -> None:
        """Write the record, if there is a server that it could tell of."""
        state = _RECORDED.get(self.keeper.last.state)
        if self._found and self.keeper.pid and state:
            write_record(self._record(state))

    def withdraw(self) -> None:
        """Be found by nobody any more: who wants such a server starts one anew."""
        self._found = False
        if self._alive.held:
            remove_record(self.config.fingerprint)

    async def _live(self) -> ServerEvent:
        """From start to end; the event that says how it ended."""
        await self._become_the_only_one()
        async with AsyncExitStack() as stack:
            stack.callback(self.withdraw)
            for path, accept in (
                (control_path(self.config.fingerprint), self._control.accept),
                (socket_path(self.config.fingerprint), self.holders.accept),
            ):
                listener = await asyncio.start_unix_server(accept, path=path)
                stack.callback(listener.close)
                path.chmod(0o600)
            self._found = True
            return await self.keeper.run()

    async def _become_the_only_one(self) -> None:
        """Wait for a predecessor that is still ending its server."""
        waiting = not self._alive.try_acquire()
        if waiting:
            said = "waiting for the server before this one to end"
            self.holders.tell(ServerEvent(state="starting", message=said))
        while waiting:
            await asyncio.sleep(_POLL)
            waiting = not self._alive.try_acquire()
        remove_record(self.config.fingerprint)

    def _tell(self, event: ServerEvent) -> None:
        self.note()
        self.holders.tell(event)
        self._control.tell(event)

    def _record(self, state: RecordedState) -> RunningServer:
        return RunningServer(
            fingerprint=self.config.fingerprint,
            state=state,
            supervisor_pid=os.getpid(),
            pid=self.keeper.pid,
            url=self.keeper.url,
            model=self.config.spec.name,
            engine=self.config.engine.name,
            log_path=str(Path(self.config.log_path)),
            started_at=self._started_at,
            spec=public_spec(self.config.spec),
            detached=self.holders.detached,
            restarts=self.keeper.restarts,
            adapters=self.keeper.adapters,
        )


async def _outcome(life: asyncio.Task[ServerEvent]) -> ServerEvent | None:
    try:
        return await life
    except asyncio.CancelledError:
        return None


def main() -> None:
    """Read the configuration, detach from the launcher, and run."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=SupervisorConfig)
    # The launcher waits for this process, so its child has no parent to become a zombie of.
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    become_subreaper()
    asyncio.run(Supervisor(config).run())


if __name__ == "__main__":
    main()
