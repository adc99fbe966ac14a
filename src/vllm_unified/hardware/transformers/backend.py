"""A model in this process: where vLLM does not run, and while its server is down."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from vllm_unified.errors import (
    ClientClosedError,
    ConfigurationError,
    EngineError,
    RequestTimeoutError,
)
from vllm_unified.hardware.backend import Capabilities
from vllm_unified.hardware.detect import detect
from vllm_unified.hardware.request import InferenceRequest
from vllm_unified.hardware.transformers.job import Job, Line
from vllm_unified.hardware.transformers.model import Model
from vllm_unified.hardware.transformers.work import InProcessStream, Work, foreign
from vllm_unified.models.weights import model_config, model_folder
from vllm_unified.results import (
    GenerationResult,
)

_BUNDLED = "bundled"
_NEEDED = ("torch", "transformers")
_STOP_SECONDS = 30.0


class TransformersBackend:
    """A backend that runs a model in this process, with ``transformers`` (extra ``local``).

    The model is loaded by the first request, in a thread of its own, which also runs it. Requests
    that wait are answered together, as many as ``max_batch_size`` at a time, where their sampling
    is the same; one batch runs to its end before the next. Cancelled answers end at their next
    token. Belongs to one event loop.

    It has the parameters ``max_tokens``, ``min_tokens``, ``temperature``, ``top_p``, ``top_k``,
    ``min_p``, ``repetition_penalty``, ``seed``, ``stop`` and ``ignore_eos``; asked for others, it
    raises :class:`UnsupportedError`, and the layer goes on to another backend.
    """

    name = "transformers"

    def __init__(
        self,
        model: str = _BUNDLED,
        *,
        served_model_name: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        max_model_len: int | None = None,
        max_batch_size: int = 8,
        timeout: float = 600.0,
    ) -> None:
        """
        Args:
            model: A folder, a repository's id, or ``"bundled"``.
            served_model_name: Its name in requests; ``None``: ``model`` as it stands.
            device: torch's name of a device; ``None``: the fastest that torch has here.
            dtype: torch's name of a type; ``None``: the checkpoint's, but ``float32`` on a CPU.
            threads: Of torch, on a CPU, for the whole process. Where other programs keep the
                processors busy, as many as are free are faster than all (``None``).
            max_model_len: Tokens of prompt and answer; ``None``: as many as the model can.
            max_batch_size: Answers that are generated at a time.
            timeout: Seconds for a request, waiting included; of a stream, for each piece.
        """
        if max_batch_size < 1:
            raise ConfigurationError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self._source = model
        self.served = served_model_name or _served_name(model)
        self._device = device
        self._dtype = dtype
        self._threads = threads
        self.context = max_model_len
        self.timeout = timeout
        self._line = Line(max_batch_size)
        self._model: Model | None = None
        self._loading: asyncio.Future[Model] | None = None
        self._thread: threading.Thread | None = None
        self._running: Sequence[Job] = ()
        self._closed = False
        self.appetite = 2 * max_batch_size
        """How many requests at once keep it busy."""

    async def capabilities(self) -> Capabilities:
        """What it serves; nothing is loaded for that."""
        missing = _missing()
        if missing:
            return Capabilities(
                unavailable=f"{' and '.join(missing)} is not installed: "
                "pip install 'vllm-unified[local]'"
            )
        context = self.context
        if self._model is not None:
            context = context or self._model.context
            return Capabilities(models={self.served: context}, device=self._platform())
        folder = _folder_of(self._source)
        if context is None and folder is not None:
            context = model_config(folder).get("max_position_embeddings")
        gpu = next(iter((await asyncio.to_thread(detect)).gpus), None)
        device = self._device or (gpu.platform if gpu is not None else "cpu")
        return Capabilities(models={self.served: context}, device=device)

    def _platform(self) -> str:
        return self._model.device.partition(":")[0] if self._model is not None else "cpu"

    async def health(self) -> bool:
        """Whether it can generate."""
        return not self._closed and (await self.capabilities()).unavailable is None

    async def infer(self, request: InferenceRequest) -> GenerationResult:
        """The answer.

        Raises:
            UnsupportedError: something is asked for that only a server has.
            ContextLengthError: the prompt does not fit.
            BackendError: the model cannot be loaded, or failed; in the words of its library.
        """
        work = Work(self, request)
        try:
            async with asyncio.timeout(work.seconds):
                await work.begin()
                async for _ in work.texts():
                    pass
        except TimeoutError:
            raise RequestTimeoutError(f"no answer within {work.seconds:g} s") from None
        finally:
            work.cancel()
        return work.result()

    def stream(self, request: InferenceRequest) -> InProcessStream:
        """The answer piece by piece."""
        return InProcessStream(Work(self, request))

    def put(self, job: Job) -> bool:
        """Have a job done; whether it will be."""
        return self._line.put(job)

    async def load(self) -> Model:
        """Load the model, if it is not; the first request does so as well.

        Raises:
            BackendError, EngineError: it cannot be loaded.
        """
        if self._closed:
            raise ClientClosedError("this backend is closed")
        if self._model is not None:
            return self._model
        if self._loading is None:
            self._loading = asyncio.get_running_loop().create_future()
            self._thread = threading.Thread(
                target=self._serve,
                args=(asyncio.get_running_loop(), self._loading),
                name="vllm-unified-transformers",
                daemon=True,
            )
            self._thread.start()
        return await asyncio.shield(self._loading)

    def _serve(self, loop: asyncio.AbstractEventLoop, loaded: asyncio.Future[Model]) -> None:
        """The model's thread."""
        try:
            model = Model(
                _source_of(self._source),
                device=self._device,
                dtype=self._dtype,
                threads=self._threads,
            )
        except Exception as error:  # noqa: BLE001 - of a foreign library it may be any
            with suppress(RuntimeError):  # the loop may be closed
                loop.call_soon_threadsafe(self._not_loaded, loaded, error)
            return
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._loaded, loaded, model)
        while jobs := self._line.take():
            self._running = jobs
            try:
                model.generate(jobs)
            except Exception as error:  # noqa: BLE001 - of a foreign library it may be any
                for job in jobs:
                    job.fail(error)
            self._running = ()

    def _loaded(self, loaded: asyncio.Future[Model], model: Model) -> None:
        if not self._closed:
            self._model = model
        if not loaded.done():
            loaded.set_result(model)

    def _not_loaded(self, loaded: asyncio.Future[Model], error: Exception) -> None:
        self._loading = None
        if not loaded.done():
            known = isinstance(error, EngineError)
            loaded.set_exception(error if known else foreign(f"cannot load {self._source}", error))
            loaded.exception()  # whoever waits for it gets it; perhaps nobody does any more

    async def close(self) -> None:
        """End what runs, and forget the model. May be called twice."""
        self._closed = True
        gone = ClientClosedError("this backend was closed before the answer was complete")
        for job in self._line.close():
            job.fail(gone)
        for job in self._running:
            job.cancel()
        if self._loading is not None and not self._loading.done():
            self._loading.set_exception(gone)
            self._loading.exception()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _STOP_SECONDS)
        self._model = None

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
        state = f"on {self._model.device}" if self._model is not None else "not loaded"
        return f"<TransformersBackend of {self._source}, {state}>"


def _missing() -> list[str]:
    """What would have to be installed."""
    return [name for name in _NEEDED if importlib.util.find_spec(name) is None]


def _source_of(model: str) -> str:
    """A folder or a repository's id. The bundled model is made first, where it is missing."""
    if model != _BUNDLED:
        return os.path.expanduser(model)
    from vllm_unified.servers import ensure_bundled_model, find_engine

    engine = find_engine()
    if engine is None:
        raise EngineError(
            "the bundled model comes with an engine, and none is installed",
            hint="`vllm-unified engine install`, or give the folder of another model.",
        )
    return str(ensure_bundled_model(engine))


def _folder_of(model: str) -> Path | None:
    """Where the model is, if it is on this machine already."""
    if model != _BUNDLED:
        return model_folder(model, os.environ)
    from vllm_unified.servers import BUNDLED_NAME
    from vllm_unified.servers.cache import models_dir

    return models_dir() / BUNDLED_NAME


def _served_name(model: str) -> str:
    if model != _BUNDLED:
        return model
    from vllm_unified.servers import BUNDLED_NAME

    return BUNDLED_NAME
