"""A server's quantization is changed: another server takes its place, and nobody notices.

vLLM fixes how weights are stored when it loads them. So a new server is started, shown to be as
good, and handed the old one's users. Until then the old one is what counts: whatever fails, or is
cancelled, ends the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec

from vllm_unified.errors import (
    ConfigurationError,
    QuantizationError,
    ServerError,
    ServerStartError,
    VllmError,
)
from vllm_unified.models.fidelity import Likeness, likeness
from vllm_unified.models.quantization import (
    QuantizationConfig,
    QuantizationResult,
    ServerFigures,
    Step,
    StepProgress,
)
from vllm_unified.models.weights import model_folder, weights_bytes
from vllm_unified.servers.adapters import load_again
from vllm_unified.servers.cache import run_dir
from vllm_unified.servers.local import LocalServer
from vllm_unified.servers.locks import FileLock
from vllm_unified.servers.probe import Contact
from vllm_unified.servers.records import running_servers
from vllm_unified.servers.rollouts.checkpoints import ensure_checkpoint
from vllm_unified.servers.rollouts.facts import gather_facts
from vllm_unified.servers.rollouts.preflight import Placement, check
from vllm_unified.servers.rollouts.proof import Proof, prove
from vllm_unified.servers.rollouts.successor import (
    Successor,
    beside,
    runs_as_asked,
    runs_with,
    successor,
)
from vllm_unified.servers.spec import ServerSpec, fingerprint
from vllm_unified.servers.threads import in_thread

T = TypeVar("T")
Told = Callable[[StepProgress], object]

_GONE_SECONDS = 15.0
# The lock of a program that was killed is released some moments after its server is gone.
_LOCK_SECONDS = 1.0
_POLL = 0.05


class Switch(Protocol):
    """Who sends requests to the server, and can send them elsewhere."""

    def add(self, server: LocalServer) -> None:
        """Hold the new server, as its user."""

    def hold(self, url: str) -> None:
        """Let requests wait until ``move``."""

    def move(self, url: str, new_url: str) -> None:
        """Send them to another address, or to the same one again."""


class Rollout:
    """One change of one server."""

    def __init__(
        self,
        old: LocalServer,
        config: QuantizationConfig,
        switch: Switch,
        progress: Told | None = None,
    ) -> None:
        self._old = old
        self._config = config
        self._switch = switch
        self._tell = progress or (lambda told: None)
        self._began = time.monotonic()
        self._steps: list[Step] = []
        self._old_url = old.url
        self._wanted = ""
        """The fingerprint of the server that is being started."""
        self._new: LocalServer | None = None
        self._held = False
        """Whether requests wait, as the old server is being ended, or has ended."""
        self._suspended = False

    async def run(self) -> QuantizationResult:
        """Do it, or leave everything as it was.

        Raises:
            QuantizationError: it cannot be done, or failed; its ``step`` says where.
        """
        lock = FileLock(_lock_path(self._old))
        if not await _acquired(lock):
            raise QuantizationError(
                f"the quantization of {self._old.url} is being changed by somebody else",
                step="check",
                hint="Wait until that has ended, and look what it runs with then.",
            )
        with lock:
            try:
                return await self._run()
            except BaseException:
                await _undisturbed(self._undo())
                raise

    async def _run(self) -> QuantizationResult:
        async with self._step("check", "looking at what it runs with") as say:
            if runs_as_asked(self._old.spec, self._config, os.environ):
                return self._unchanged()
            new = await in_thread(lambda _: successor(self._old.spec, self._config, os.environ))
            status = await self._old.status()
            if status.state != "ready":
                raise QuantizationError(
                    f"the server at {self._old_url} is {status.state}: nothing was changed",
                    step="check",
                    hint="Wait until it is ready.",
                )
            facts = await in_thread(
                lambda _: gather_facts(
                    self._old.spec, self._old.engine, new, self._config, status.memory
                )
            )
            placement, reason = check(self._config, facts)
            say(f"{placement.replace('_', ' ')}: {reason}")
        spec = new.spec
        if new.recipe is not None:
            spec = new.with_checkpoint(await self._checkpoint(new))
        if placement == "beside" and facts.platform == "cpu":
            spec = beside(spec, facts.cores)
        async with self._step("measure", "asking the old server for comparison"):
            before = await prove(self._old)
        if placement == "in_place":
            await self._suspend()
        await self._start(spec, status.adapters)
        after, like = await self._prove(before)
        result = await self._result(new, spec, placement, (before, after), like, status.memory)
        await self._hand_over(detached=status.detached)
        return msgspec.structs.replace(
            result, steps=tuple(self._steps), duration=time.monotonic() - self._began
        )

    async def _checkpoint(self, new: Successor) -> Path:
        recipe = new.recipe
        assert recipe is not None
        async with self._step("checkpoint", f"looking for {recipe.name}") as say:
            loop = asyncio.get_running_loop()

            def told(words: str) -> None:
                loop.call_soon_threadsafe(say, words)

            return await in_thread(
                lambda cancel: ensure_checkpoint(recipe, self._old.engine, told, cancel=cancel)
            )

    async def _suspend(self) -> None:
        async with self._step("suspend", "waiting for requests to end, and ending the old server"):
            self._switch.hold(self._old_url)
            self._held = True
            await self._old.suspend(drain_timeout=self._config.drain_timeout)
            self._suspended = True

    async def _start(self, spec: ServerSpec, adapters: dict[str, str]) -> None:
        async with self._step("start", "starting the new server") as say:
            self._wanted = fingerprint(spec, self._old.engine, os.environ)
            self._new = new = await LocalServer.start(
                spec, progress=say, install=False, start_timeout=self._config.start_timeout
            )
            problems = await load_again(_contact(new), adapters)
            if problems:
                raise ServerError("; ".join(problems))

    async def _prove(self, before: Proof) -> tuple[Proof, Likeness]:
        new = self._new
        assert new is not None
        async with self._step("prove", "comparing the new server with the old one"):
            after = await prove(new)
            like = likeness(before.readings, after.readings)
            limit = self._config.max_perplexity_ratio
            if not like.perplexity_ratio <= limit:
                raise ServerError(
                    f"the new server is not as good: its perplexity is {like.perplexity_ratio:.3g} "
                    f"times the old one's ({after.perplexity:.4g} to {before.perplexity:.4g}), "
                    f"and {limit:g} times is allowed",
                    hint="Another checkpoint, or more or better texts for calibration, may do; "
                    "max_perplexity_ratio says what is allowed.",
                )
            return after, like

    async def _hand_over(self, *, detached: bool) -> None:
        """From here on the new server counts, also if this is cancelled."""
        new = self._new
        assert new is not None
        async with self._step("switch", "sending requests to the new server"):
            self._switch.move(self._old_url, new.url)
            try:
                await self._old.hand_over(new, drain_timeout=self._config.drain_timeout)
            except ServerError:
                if await _answers(self._old):
                    self._switch.move(new.url, self._old_url)
                    raise
                detached = False  # the old one has gone meanwhile, and could not say so
            except asyncio.CancelledError:
                self._settle(new)
                raise
            if detached:
                self._new, self._held = None, False
                await new.stop()
            else:
                self._settle(new)

    def _settle(self, new: LocalServer) -> None:
        """The new server has its users, of which this program is one."""
        self._new, self._held = None, False
        self._switch.add(new)

    async def _undo(self) -> None:
        """End the new server, and bring the old one back if it was suspended."""
        if self._new is not None:
            await self._new.stop()
        if not self._held:
            return
        async with self._step("return", "starting the old server again") as say:
            try:
                await _gone(self._wanted)
                if self._suspended:
                    await self._old.resume(progress=say)
                else:  # its supervisor sees to it, as whoever suspended it has left
                    await _ready(self._old)
            finally:
                self._switch.move(self._old_url, self._old.url)

    def _unchanged(self) -> QuantizationResult:
        now = described(self._old.spec)
        figures = ServerFigures(
            url=self._old.url, quantization=now, weights_bytes=_weights(self._old.spec)
        )
        return QuantizationResult(
            quantization=now,
            changed=False,
            url=self._old.url,
            before=figures,
            after=figures,
            duration=time.monotonic() - self._began,
        )

    async def _result(
        self,
        new: Successor,
        spec: ServerSpec,
        placement: Placement,
        proofs: tuple[Proof, Proof],
        like: Likeness,
        old_memory: int,
    ) -> QuantizationResult:
        server = self._new
        assert server is not None
        status = await server.status()
        before, after = (
            ServerFigures(
                url=url,
                quantization=described(which),
                weights_bytes=_weights(which),
                memory_bytes=memory,
                tokens_per_second=proof.tokens_per_second,
                perplexity=proof.perplexity,
            )
            for which, url, memory, proof in (
                (self._old.spec, self._old_url, old_memory, proofs[0]),
                (spec, server.url, status.memory, proofs[1]),
            )
        )
        asked = self._config
        if asked.enabled and asked.method:
            # compressed-tensors is how it is stored; this is what it is.
            after.quantization["method"] = asked.method
        return QuantizationResult(
            quantization=after.quantization,
            changed=True,
            url=server.url,
            before=before,
            after=after,
            agreement=like.agreement,
            placement=placement,
        )

    @contextlib.asynccontextmanager
    async def _step(self, name: str, message: str) -> AsyncIterator[Callable[[str], None]]:
        """A part of the change: told when it begins, and when it has ended; it names its errors."""
        began = time.monotonic()

        def say(words: str, *, done: bool = False) -> None:
            seconds = time.monotonic() - began
            self._tell(StepProgress(step=name, message=words, seconds=seconds, done=done))

        said = [message]

        def told(words: str) -> None:
            said.append(words)
            say(words)

        say(message)
        try:
            yield told
        except (QuantizationError, ConfigurationError):
            raise
        except VllmError as error:
            raise _failed(error, name, self._old_url, held=self._held) from error
        self._steps.append(Step(name, time.monotonic() - began))
        say(said[-1] if name == "check" else message, done=True)


def described(spec: ServerSpec) -> dict[str, object]:
    """How a server's weights are stored, as a result has it."""
    found = runs_with(spec, os.environ)
    return {
        "enabled": found.enabled,
        "method": found.method,
        "bits": found.bits,
        "checkpoint": spec.model if found.enabled else None,
    }


def _failed(error: VllmError, step: str, url: str, *, held: bool) -> QuantizationError:
    if step == "return":
        outcome = f"The server at {url} does not start again either"
    elif held:
        outcome = f"The server at {url} is started again as it was"
    else:
        outcome = f"The server at {url} serves as before"
    hint = "\n".join(filter(None, [outcome + ".", error.hint]))
    log = error.log if isinstance(error, ServerStartError) else ""
    return QuantizationError(f"{step}: {error.message}", step=step, log=log, hint=hint)


def _lock_path(server: LocalServer) -> Path:
    return run_dir() / f"{server.fingerprint}.change"


async def _acquired(lock: FileLock) -> bool:
    deadline = time.monotonic() + _LOCK_SECONDS
    while not lock.try_acquire():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL)
    return True


def _weights(spec: ServerSpec) -> int | None:
    folder = model_folder(spec.model, {**os.environ, **spec.env})
    return None if folder is None else weights_bytes(folder)


def _contact(server: LocalServer) -> Contact:
    address = urlsplit(server.url)
    return Contact(
        host=address.hostname or server.spec.host,
        port=address.port or 80,
        model=server.model,
        api_key=server.api_key,
    )


async def _answers(server: LocalServer) -> bool:
    """Whether the server is there, or its supervisor and may be resumed."""
    try:
        return (await server.status()).state in {"ready", "suspended"}
    except ServerError:
        return False


async def _ready(server: LocalServer) -> None:
    """Wait until it is; its supervisor ends where it does not start."""
    while (await server.status()).state != "ready":  # noqa: ASYNC110 - another process decides
        await asyncio.sleep(_POLL)


async def _gone(mark: str) -> None:
    """Wait until a server that was cancelled or failed has left its port."""
    deadline = time.monotonic() + _GONE_SECONDS
    while mark and time.monotonic() < deadline:
        if not any(server.fingerprint == mark for server in running_servers()):
            return
        await asyncio.sleep(_POLL)


async def _undisturbed(work: Awaitable[T]) -> T:
    """Finish it, even if the task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    return task.result()
