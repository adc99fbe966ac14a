"""What a supervisor can be told and asked: a line of JSON on its control socket, and replies.

The control socket is beside the one for leases, because who asks holds nothing: a server does not
live a second longer for being looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_unified.errors import ServerError, ServerStartError
from vllm_unified.servers.engines import Engine
from vllm_unified.servers.lease import ServerState
from vllm_unified.servers.lines import LineSocket
from vllm_unified.servers.records import control_path
from vllm_unified.servers.spec import ServerSpec

Progress = Callable[[str], Any]

_QUICK_SECONDS = 5.0


class Command(msgspec.Struct, frozen=True, kw_only=True, tag_field="do"):
    """Something to do, or to say."""


class Describe(Command, frozen=True, kw_only=True, tag="describe"):
    """Say what runs here, with the key."""


class Report(Command, frozen=True, kw_only=True, tag="report"):
    """Say how it does."""


class Detach(Command, frozen=True, kw_only=True, tag="detach"):
    """Keep the server without any lease, until it is stopped."""


class NoteAdapters(Command, frozen=True, kw_only=True, tag="note_adapters"):
    """Look now which adapters are loaded: they are loaded again after a restart."""


class Restart(Command, frozen=True, kw_only=True, tag="restart"):
    """End vLLM, and start it again."""


class Suspend(Command, frozen=True, kw_only=True, tag="suspend"):
    """End vLLM, and wait with its holders until ``Resume``, or the end of this connection."""

    drain_timeout: float


class Resume(Command, frozen=True, kw_only=True, tag="resume"):
    """Start vLLM again after ``Suspend``."""


class HandOver(Command, frozen=True, kw_only=True, tag="hand_over"):
    """Send all holders to another server, and end this one when it has nothing to do."""

    successor: str
    """Its fingerprint."""
    drain_timeout: float


class End(Command, frozen=True, kw_only=True, tag="end"):
    """End the server, whoever holds it."""

    by: str
    """Who wants it, for the holders."""


AnyCommand = Describe | Report | Detach | NoteAdapters | Restart | Suspend | Resume | HandOver | End


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What runs. The key is in ``spec``: it goes over the socket, and into no file."""

    fingerprint: str
    spec: ServerSpec
    engine: Engine
    state: ServerState
    url: str
    """Empty before the first start."""
    pid: int
    model: str
    log_path: str


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a local server does."""

    state: ServerState
    url: str
    model: str
    pid: int
    """vLLM's process (its HTTP server)."""
    supervisor_pid: int
    uptime: float
    """Seconds since this vLLM became ready; 0 where it is not."""
    restarts: int
    """How often it was started again after it had ended by itself, or hung."""
    last_exit: str
    """Why it ended the last time, in words; empty if it never did."""
    holders: int
    """Leases that are held."""
    detached: bool
    """Whether it is kept without any lease."""
    log_path: str
    memory: int
    """Bytes in memory of all its processes; pages that they share count for each."""
    health: str
    """``ok``, ``starting``, ``silent`` (asked for a token, and none has come so far), ``asleep``
    (it was put to sleep, or paused), ``suspended``, ``down``."""
    adapters: dict[str, str] = {}
    """LoRA adapters that a restart would load again: name to path."""


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of the answer to a command; the last one is ``done``."""

    done: bool = False
    progress: str = ""
    error: str = ""
    """Why it was not done."""
    start_failed: bool = False
    """Whether that is because vLLM does not start."""
    hint: str | None = None
    log: str = ""
    server: Description | None = None
    status: ServerStatus | None = None


_replies = msgspec.json.Decoder(Reply)


class Conversation:
    """A connection to a supervisor's control socket, for one command after the other."""

    def __init__(self, fingerprint: str) -> None:
        """Connect.

        Raises:
            ServerError: no such server runs.
        """
        connection = LineSocket.connect(control_path(fingerprint))
        if connection is None:
            raise ServerError("the server's supervisor has ended")
        self._connection = connection

    async def ask(
        self, command: AnyCommand, *, progress: Progress | None = None, until_gone: bool = False
    ) -> Reply:
        """Have it done; the last reply.

        Args:
            command: What to do.
            progress: Gets messages for people.
            until_gone: Whether the end of the supervisor is what is wanted.

        Raises:
            ServerError: it was refused, or the supervisor ended.
            ServerStartError: vLLM was to be started, and does not.
        """
        try:
            await self._connection.send(msgspec.json.encode(command))
        except OSError as error:
            raise ServerError("the server's supervisor has ended") from error
        while (line := await self._connection.next_line()) is not None:
            reply = _replies.decode(line)
            if reply.progress and progress:
                progress(reply.progress)
            if reply.error:
                raise _error(reply)
            if reply.done:
                return reply
        if not until_gone:
            raise ServerError("the server's supervisor ended")
        return Reply(done=True)

    def close(self) -> None:
        """End it. What was begun goes on, but a suspended server is resumed."""
        self._connection.close()


async def ask(
    fingerprint: str,
    command: AnyCommand,
    *,
    progress: Progress | None = None,
    until_gone: bool = False,
) -> Reply:
    """:meth:`Conversation.ask`, on a connection of its own."""
    conversation = Conversation(fingerprint)
    try:
        return await conversation.ask(command, progress=progress, until_gone=until_gone)
    finally:
        conversation.close()


async def describe(fingerprint: str) -> Description:
    """What runs under this fingerprint, with its key.

    Raises:
        ServerError: nothing does, or its supervisor is silent.
    """
    reply = await _quickly(fingerprint, Describe())
    assert reply.server is not None
    return reply.server


async def report(fingerprint: str) -> ServerStatus:
    """How the server with this fingerprint does.

    Raises:
        ServerError: there is none, or its supervisor is silent.
    """
    reply = await _quickly(fingerprint, Report())
    assert reply.status is not None
    return reply.status


async def _quickly(fingerprint: str, command: AnyCommand) -> Reply:
    try:
        async with asyncio.timeout(_QUICK_SECONDS):
            return await ask(fingerprint, command)
    except TimeoutError as error:
        raise ServerError(
            f"the server's supervisor does not answer within {_QUICK_SECONDS:g} s"
        ) from error


def _error(reply: Reply) -> ServerError | ServerStartError:
    if reply.start_failed:
        return ServerStartError(reply.error, log=reply.log, hint=reply.hint)
    return ServerError(reply.error, hint=reply.hint)
