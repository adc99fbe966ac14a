"""Locks between processes, which the kernel releases when their holder dies."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from types import TracebackType
from typing import Self

from vllm_unified.errors import EngineError

try:
    import fcntl
except ImportError:  # Windows, where no server is run
    fcntl = None  # type: ignore[assignment]

_POLL = 0.05


class FileLock:
    """An exclusive lock on a file, as a context manager.

    It is held by an open file, so that neither ``kill -9`` nor a crash leaves it behind. A child
    process that inherits ``fileno()`` holds it too, until it ends.

    Args:
        path: The lock's file; it is made, and never removed.
        on_wait: Called once when another process holds the lock.
        cancel: When it is set, waiting ends with ``concurrent.futures.CancelledError``.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_wait: Callable[[], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        self._path = path
        self._on_wait = on_wait
        self._cancel = cancel or threading.Event()
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def fileno(self) -> int:
        """The open file that holds the lock."""
        if self._descriptor is None:
            raise ValueError(f"the lock {self._path.name} is not held")
        return self._descriptor

    def try_acquire(self) -> bool:
        """Take the lock if it is free; whether it is held now."""
        if self._descriptor is not None:
            return True
        if fcntl is None:
            raise EngineError("this system has no file locks of the kind that servers need")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        if self.try_acquire():
            return self
        if self._on_wait:
            self._on_wait()
        while not self.try_acquire():
            if self._cancel.is_set():
                raise CancelledError
            time.sleep(_POLL)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
