"""The blocking hardware layer, by scripts/generate_blocking.py: do not edit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from vllm_unified.bridge import BlockingStream, LoopThread
from vllm_unified.endpoints.breaker import BreakerConfig
from vllm_unified.hardware.inference import InferenceResult
from vllm_unified.hardware.layer import HardwareAbstractionLayer
from vllm_unified.hardware.member import BackendStatus
from vllm_unified.hardware.selection import Selection
from vllm_unified.hardware.statistics import LayerStatistics


class BlockingHardwareAbstractionLayer:
    """Any backend behind one call: :class:`HardwareAbstractionLayer` without ``await``.

    It works from any number of threads at once. An asynchronous client that is registered here
    lives on this layer's event loop, and can be used nowhere else; blocking clients can.
    """

    def __init__(self, *, breaker: BreakerConfig | None = None) -> None:
        """``breaker``: when a backend is shut out, and when it is looked at again."""
        self._thread = LoopThread()
        self._layer = HardwareAbstractionLayer(breaker=breaker)
        self._thread.farewell = self._layer.close
        finalizer = weakref.finalize(self, self._thread.close, wait=False)
        finalizer.atexit = False  # at exit, the bridge closes what is open

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
        return self._thread.call(
            lambda: self._layer.register_backend(task, backend, priority=priority, name=name)
        )

    def unregister_backend(self, backend: Any, task: str | None = None) -> None:
        """Send nothing more to a backend. What is there goes on.

        Args:
            backend: Its name, or what was registered.
            task: Only for this task; ``None``: for all.

        Raises:
            ConfigurationError: it is not registered.
        """
        self._thread.call(lambda: self._layer.unregister_backend(backend, task))

    def list_backends(self, task: str | None = None) -> list[BackendStatus]:
        """How all backends do, or those for a task."""
        return self._thread.call(lambda: self._layer.list_backends(task))

    def select(
        self, task: str, request: Any, *, streaming: bool = False, **params: Any
    ) -> Selection:
        """Where this request would go now, and why; ``print()`` shows it.

        Args:
            streaming: Whether it is for :meth:`stream_inference`.
        """
        return self._thread.run(
            lambda: self._layer.select(task, request, streaming=streaming, **params)
        )

    def run_inference(self, task: str, request: Any, **params: Any) -> InferenceResult:
        """Get an answer.

        Args:
            request: A dict with ``input`` (or ``prompt``, or ``messages``), perhaps ``model``, and
                parameters; or an input alone. For a task of one's own: what its backends expect.
            params: More parameters; they win.

        Raises:
            NoBackendError: no backend is registered for the task, or none can take this request.
            VllmError: the error of the last backend; its ``attempts`` have all of them.
        """
        return self._thread.run(lambda: self._layer.run_inference(task, request, **params))

    def stream_inference(
        self, task: str, request: Any, **params: Any
    ) -> BlockingStream[InferenceResult]:
        """Get an answer piece by piece, from a backend that streams; see :class:`InferenceStream`.

        Arguments as for :meth:`run_inference`.
        """
        return BlockingStream(
            self._thread, self._layer.stream_inference(task, request, **params), self
        )

    def batch_inference(
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
        return self._thread.run(
            lambda: self._layer.batch_inference(task, requests, on_progress=on_progress, **params)
        )

    def statistics(self) -> LayerStatistics:
        """What became of the requests."""
        return self._thread.call(lambda: self._layer.statistics())

    def close(self) -> None:
        """Take no more requests, and end the thread. May be called twice."""
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._layer!r}>"
