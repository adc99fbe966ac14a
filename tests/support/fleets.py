"""Fleets without a client around them."""

from __future__ import annotations

from typing import Any

from vllm_unified.fleet.directory import Directory
from vllm_unified.settings import Settings
from vllm_unified.wire.http import HttpTransport


def directory(settings: Settings | None = None, **resources: Any) -> Directory:
    """What a client with these settings has; to be closed."""
    return Directory(settings or Settings(), resources, HttpTransport)
