"""What a job is, so that another one is not taken for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_unified.batch.files.rows import encode_foreign
from vllm_unified.errors import ConfigurationError

Fingerprint = Mapping[str, Any]
"""Everything that changes answers or their form, by what users call it."""

_SHOWN = 60


def as_noted(fingerprint: Fingerprint) -> dict[str, Any]:
    """The fingerprint as it comes back out of a ledger."""
    data = msgspec.json.encode(fingerprint, enc_hook=encode_foreign, order="sorted")
    noted: dict[str, Any] = msgspec.json.decode(data)
    return noted


def check_same(then: Fingerprint, now: Fingerprint, output: str) -> None:
    """See that a job is the one that was begun.

    Raises:
        ConfigurationError: it is not; says what changed, and what to do.
    """
    changes = [*_changes(then, as_noted(now))]
    if changes:
        raise ConfigurationError(
            f"{output} belongs to another job, which differs in this: {'; '.join(changes)}",
            hint="Go on with that job by its own call, give this one another output, or begin anew "
            "with overwrite=True (--overwrite), which drops what is done.",
        )


def _changes(then: Fingerprint, now: Fingerprint) -> list[str]:
    found = []
    for name in dict.fromkeys([*then, *now]):
        old, new = then.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _changes(old, new)
        else:
            found.append(f"{name} was {_shown(old)} and is {_shown(new)}")
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
