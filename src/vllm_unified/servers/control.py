"""The supervisor's side of ``commands.py``: who tells it something, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Protocol

import msgspec

from vllm_unified.errors import ServerError
from vllm_unified.servers import commands
from vllm_unified.servers.commands import AnyCommand, Description, Reply, ServerStatus
from vllm_unified.servers.guard import session_members
from vllm_unified.servers.holders import Holders
from vllm_unified.servers.keeper import Keeper
from vllm_unified.servers.lease import ServerEvent
from vllm_unified.servers.starter import SupervisorConfig

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

_commands = msgspec.json.Decoder(AnyCommand)


class Household(Protocol):
    """What a supervisor has that commands are about."""

    config: SupervisorConfig
    holders: Holders
    keeper: Keeper

    def note(self) -> None:
        """Write down what has changed."""

    def withdraw(self) -> None:
        """Be found by nobody any more."""


class RefusedError(Exception):
    """A command is not obeyed; the reply says why."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.error)
        self.reply = reply


class Control:
    """Answers commands, each connection in its own time."""

    def __init__(self, house: Household) -> None:
        self._house = house
        self._serving: set[asyncio.Task[None]] = set()
        self._listening: set[asyncio.StreamWriter] = set()
        self._suspender: asyncio.StreamWriter | None = None

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A new connection."""
        serving = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Obey a connection until it ends; a server that it has suspended is then resumed."""
        try:
            while line := await reader.readline():
                try:
                    command = _commands.decode(line)
                    reply = await self._answer(command, writer)
                except RefusedError as refusal:
                    reply = refusal.reply
                except (ServerError, msgspec.DecodeError) as error:
                    reply = Reply(error=str(error))
                _send(writer, reply)
                await writer.drain()
        except (OSError, ValueError):
            pass  # it has gone, or sends no lines
        finally:
            writer.close()
            if self._suspender is writer and self._house.keeper.ordered == "suspend":
                self._house.keeper.order("run")

    def tell(self, event: ServerEvent) -> None:
        """Pass on how far a start is to those who wait for one."""
        for writer in self._listening:
            if event.message:
                _send(writer, Reply(progress=event.message))

    async def _answer(self, command: AnyCommand, writer: asyncio.StreamWriter) -> Reply:
        house = self._house
        match command:
            case commands.Describe():
                return Reply(done=True, server=self._description())
            case commands.Report():
                return Reply(done=True, status=self._status())
            case commands.Detach():
                house.holders.detached = True
                house.note()
                return Reply(done=True)
            case commands.NoteAdapters():
                await house.keeper.note_adapters()
                return Reply(done=True, status=self._status())
            case commands.Restart():
                if house.keeper.last.state == "suspended":
                    raise RefusedError(Reply(error="the server is suspended"))
                return await self._run(writer)
            case commands.Resume():
                if house.keeper.last.state == "ready":
                    return Reply(done=True, server=self._description())
                return await self._run(writer)
            case commands.Suspend():
                return await self._suspend(command, writer)
            case commands.HandOver():
                await self._hand_over(command, writer)
            case commands.End():
                house.keeper.order("end", by=f"stopped by {command.by}")
        await asyncio.Event().wait()  # the end of this process is the answer
        raise AssertionError

    async def _run(self, writer: asyncio.StreamWriter) -> Reply:
        """Start vLLM anew; what it serves when it is ready."""
        keeper = self._house.keeper
        before = keeper.lives
        keeper.order("run")
        self._listening.add(writer)
        try:
            await keeper.until(lambda: keeper.lives > before or keeper.ordered != "run")
        finally:
            self._listening.discard(writer)
        if keeper.over:
            raise RefusedError(
                Reply(
                    error=keeper.over.message,
                    start_failed=True,
                    hint=keeper.over.hint,
                    log=keeper.over.log,
                )
            )
        if keeper.lives == before:
            raise RefusedError(Reply(error="the server was suspended or ended meanwhile"))
        return Reply(done=True, server=self._description())

    async def _suspend(self, command: commands.Suspend, writer: asyncio.StreamWriter) -> Reply:
        keeper = self._house.keeper
        if keeper.ordered == "suspend":
            raise RefusedError(Reply(error="the server is suspended already"))
        keeper.order("suspend", drain=command.drain_timeout)
        self._suspender = writer
        await keeper.until(lambda: keeper.last.state == "suspended" or keeper.ordered != "suspend")
        if keeper.last.state != "suspended":
            raise RefusedError(Reply(error="the server was resumed or ended meanwhile"))
        return Reply(done=True)

    async def _hand_over(self, command: commands.HandOver, writer: asyncio.StreamWriter) -> None:
        house, keeper = self._house, self._house.keeper
        successor = await commands.describe(command.successor)
        if successor.state != "ready":
            raise RefusedError(Reply(error=f"the successor is not ready, it is {successor.state}"))
        if successor.fingerprint == house.config.fingerprint:
            raise RefusedError(Reply(error="a server cannot be its own successor"))
        if house.holders.detached:
            await commands.ask(command.successor, commands.Detach())
        house.withdraw()
        house.holders.send_away(
            ServerEvent(
                state="moved",
                message=f"moved to {successor.url}",
                fingerprint=successor.fingerprint,
                url=successor.url,
                pid=successor.pid,
                model=successor.model,
                log_path=successor.log_path,
            )
        )
        _send(writer, Reply(progress=f"its holders go to {successor.url}"))
        if keeper.last.state != "suspended":
            await house.holders.gone(house.config.pacing.reaction)
        keeper.order("end", drain=command.drain_timeout, by=f"moved to {successor.url}")

    def _description(self) -> Description:
        config, keeper = self._house.config, self._house.keeper
        return Description(
            fingerprint=config.fingerprint,
            spec=config.spec,
            engine=config.engine,
            state=keeper.last.state,
            url=keeper.url,
            pid=keeper.pid,
            model=config.spec.name,
            log_path=config.log_path,
        )

    def _status(self) -> ServerStatus:
        house, keeper = self._house, self._house.keeper
        return ServerStatus(
            state=keeper.last.state,
            url=keeper.url,
            model=house.config.spec.name,
            pid=keeper.pid,
            supervisor_pid=os.getpid(),
            uptime=keeper.uptime,
            restarts=keeper.restarts,
            last_exit=keeper.last_exit,
            holders=len(house.holders),
            detached=house.holders.detached,
            log_path=house.config.log_path,
            memory=memory_of(session_members(keeper.pid)) if keeper.pid else 0,
            health=keeper.health,
            adapters=keeper.adapters,
        )


def memory_of(pids: list[int]) -> int:
    """Bytes that processes have in memory, each on its own."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", "rb") as file:
            total += int(file.read().split()[1]) * _PAGE
    return total


def _send(writer: asyncio.StreamWriter, reply: Reply) -> None:
    if not writer.is_closing():
        writer.write(msgspec.json.encode(reply) + b"\n")
