"""Any backend behind one call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from vllm_unified.endpoints.breaker import BreakerConfig
from vllm_unified.errors import (
    ClientClosedError,
    ConfigurationError,
    NoBackendError,
    ProtocolError,
    VllmError,
)
from vllm_unified.hardware.clients import as_backend, default_name
from vllm_unified.hardware.failures import may_go_elsewhere
from vllm_unified.hardware.inference import Inference, InferenceResult, told_attempts
from vllm_unified.hardware.many import answer_all
from vllm_unified.hardware.member import BackendStatus, Member
from vllm_unified.hardware.request import InferenceRequest, inference_request
from vllm_unified.hardware.selection import Selection
from vllm_unified.hardware.statistics import LayerStatistics
from vllm_unified.hardware.stream import InferenceStream

# Two failures in a row: one may be bad luck, and whoever meets it is answered elsewhere anyway.
_BREAKER = BreakerConfig(failure_threshold=2, reset_timeout=2.0, half_open_successful_calls=1)


class HardwareAbstractionLayer:
    """Backends by task, and the best one for each request.

    ::

        hal = HardwareAbstractionLayer()
        hal.register_backend("llm", vllm)
        result = await hal.run_inference("llm", {"input": "Hello, world!", "model": "llama-7b"})
        print(result.text, result.backend)

    Tasks are ``llm``, ``chat``, ``embedding``, and any name of one's own. A request goes to the
    backend that can take it (model, context, streaming), is well, and has the highest priority; of
    equals to the one with the faster device, then to the one that was registered first. Where it
    fails, but not by the caller's own mistake, the next one is tried. A backend that fails twice in
    a row is shut out until it is found well again.

    Backends belong to who made them: :meth:`close` closes none. Belongs to one event loop.
    """

    def __init__(self, *, breaker: BreakerConfig | None = None) -> None:
        """``breaker``: when a backend is shut out, and when it is looked at again."""
        self._breaker = breaker or _BREAKER
        self._members: dict[str, Member] = {}
        self._registered = 0
        self._closed = False
        self._success = self._errors = self._cancelled = self._failovers = 0

    def register_backend(
        self, task: str, backend: Any, *, priority: int = 0, name: str | None = None
    ) -> str:
        """Have a backend for a task.

        Args:
            task: ``llm``, ``chat``, ``embedding``, or a name of one's own. A backend may be
                registered for several.
            backend: A client or a load balancer of this library, asynchronous or not; a
                :class:`Backend`; or a function, asynchronous or not, that takes the request's
                dict. A function that is not asynchronous runs in a thread, and goes on there when
                its caller leaves.
            priority: The highest one first.
            name: What it is called in results and statistics.

        Returns:
            Its name.

        Raises:
            ConfigurationError: it is no backend, or the name is another one's.
        """
        if not isinstance(task, str) or not task:
            raise ConfigurationError(f"a task is a name, not {task!r}")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise ConfigurationError(f"priority must be a whole number, not {priority!r}")
        known = next((each for each in self._members.values() if each.value is backend), None)
        if known is not None:
            if name not in (None, known.name):
                raise ConfigurationError(f"this backend is registered as {known.name!r} already")
            known.tasks[task] = priority
            return known.name
        if name is None:
            name = self._free_name(default_name(backend))
        elif name in self._members:
            raise ConfigurationError(f"there is another backend with the name {name!r}")
        self._registered += 1
        member = Member(name, backend, as_backend(backend), self._registered, self._breaker)
        member.tasks[task] = priority
        self._members[name] = member
        return name

    def _free_name(self, name: str) -> str:
        names = (name, *(f"{name}-{number}" for number in range(2, len(self._members) + 3)))
        return next(each for each in names if each not in self._members)

    def unregister_backend(self, backend: Any, task: str | None = None) -> None:
        """Send nothing more to a backend. What is there goes on.

        Args:
            backend: Its name, or what was registered.
            task: Only for this task; ``None``: for all.

        Raises:
            ConfigurationError: it is not registered.
        """
        for member in self._members.values():
            if backend in (member.name, member.value) and (task is None or task in member.tasks):
                break
        else:
            names = ", ".join(self._members) or "none"
            where = "" if task is None else f" for {task!r}"
            raise ConfigurationError(
                f"{backend!r} is not registered{where}", hint=f"Registered are: {names}."
            )
        if task is None:
            member.tasks.clear()
        else:
            del member.tasks[task]
        if not member.tasks:
            del self._members[member.name]
            member.stop()

    def list_backends(self, task: str | None = None) -> list[BackendStatus]:
        """How all backends do, or those for a task."""
        return [
            member.status()
            for member in self._members.values()
            if task is None or task in member.tasks
        ]

    async def select(
        self, task: str, request: Any, *, streaming: bool = False, **params: Any
    ) -> Selection:
        """Where this request would go now, and why; ``print()`` shows it.

        Args:
            streaming: Whether it is for :meth:`stream_inference`.
        """
        asked = inference_request(task, request, params)
        return await self._inference(asked, streaming=streaming).select()

    async def run_inference(self, task: str, request: Any, **params: Any) -> InferenceResult:
        """Get an answer.

        Args:
            request: A dict with ``input`` (or ``prompt``, or ``messages``), perhaps ``model``, and
                parameters; or an input alone. For a task of one's own: what its backends expect.
            params: More parameters; they win.

        Raises:
            NoBackendError: no backend is registered for the task, or none can take this request.
            VllmError: the error of the last backend; its ``attempts`` have all of them.
        """
        inference = self._inference(inference_request(task, request, params))
        try:
            output = await inference.attempt(lambda member: member.backend.infer(inference.request))
        except VllmError:
            self._count(inference, "error")
            raise
        except BaseException:
            self._count(inference, "cancelled")
            raise
        result = inference.succeed(output, told_attempts(output))
        self._count(inference, "complete")
        return result

    def stream_inference(self, task: str, request: Any, **params: Any) -> InferenceStream:
        """Get an answer piece by piece, from a backend that streams; see :class:`InferenceStream`.

        Arguments as for :meth:`run_inference`.
        """
        asked = inference_request(task, request, params)
        return InferenceStream(lambda: self._inference(asked, streaming=True), self._count)

    async def batch_inference(
        self,
        task: str,
        requests: Iterable[Any],
        *,
        on_progress: Callable[[int], None] | None = None,
        **params: Any,
    ) -> list[InferenceResult]:
        """The answers to many requests, in order, several at a time.

        Args:
            requests: Each as for :meth:`run_inference`.
            on_progress: Called with the number of requests that are done, after each.
            params: For all of them; a request's own win.

        Raises:
            BatchError: some failed; has the answers of the others.
        """
        asked = []
        for request in requests:
            own = inference_request(task, request, {})
            asked.append(inference_request(task, own, {**params, **own.parameters}))
        if not asked:
            return []
        whole = self._inference(asked[0])
        chosen = (await whole.select()).chosen
        if chosen is not None and self._members[chosen].batching is not None:
            answered = await self._whole_batch(whole, asked)
            if answered is not None:
                if on_progress is not None:
                    on_progress(len(answered))
                return answered

        def at_once() -> int:
            there = [each.appetite for each in self._members.values() if task in each.tasks]
            return max(there, default=1)

        return await answer_all(
            asked,
            lambda request: self.run_inference(task, request),
            at_once=at_once,
            on_progress=on_progress,
        )

    async def _whole_batch(
        self, whole: Inference, asked: list[InferenceRequest]
    ) -> list[InferenceResult] | None:
        """The answers of a backend that takes many requests at once; ``None`` if one by one is
        better: the backend failed, or another one is meant now."""

        async def once(member: Member) -> list[Any] | None:
            return await member.batching.batch(asked) if member.batching is not None else None

        try:
            outputs = await whole.attempt(once)
        except VllmError as error:
            self._failovers += whole.failovers
            if not may_go_elsewhere(error):
                self._errors += len(asked)
                raise
            return None
        if outputs is None:
            whole.leave()
            return None
        if len(outputs) != len(asked):
            self._errors += len(asked)
            raise whole.fail(
                ProtocolError(f"{len(outputs)} answers came for {len(asked)} requests", hint="")
            )
        first = whole.succeed(outputs[0])
        self._success += len(asked)
        return [
            InferenceResult(
                output=output,
                backend=first.backend,
                selection=first.selection,
                attempts=first.attempts,
            )
            for output in outputs
        ]

    def statistics(self) -> LayerStatistics:
        """What became of the requests."""
        return LayerStatistics(
            requests=self._success + self._errors + self._cancelled,
            success=self._success,
            errors=self._errors,
            cancelled=self._cancelled,
            failovers=self._failovers,
            backends={name: member.tally.snapshot() for name, member in self._members.items()},
        )

    def _inference(self, request: InferenceRequest, *, streaming: bool = False) -> Inference:
        if self._closed:
            raise ClientClosedError("this hardware layer is closed")
        members = [each for each in self._members.values() if request.task in each.tasks]
        if not members:
            tasks = sorted({task for each in self._members.values() for task in each.tasks})
            raise NoBackendError(
                f"no backend is registered for {request.task!r}",
                hint=f"There are backends for: {', '.join(tasks) or 'nothing'}.",
            )
        return Inference(members, request, streaming=streaming)

    def _count(self, inference: Inference, ending: str) -> None:
        self._failovers += inference.failovers
        match ending:
            case "complete":
                self._success += 1
            case "cancelled":
                self._cancelled += 1
            case _:
                self._errors += 1

    async def close(self) -> None:
        """Take no more requests, and look at no backend any more. May be called twice."""
        self._closed = True
        ending = [task for each in self._members.values() for task in each.stop()]
        await asyncio.gather(*ending, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {', '.join(self._members) or 'no backends'}>"
