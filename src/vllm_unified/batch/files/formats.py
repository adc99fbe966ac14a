"""Which format a file has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import msgspec

from vllm_unified.batch.files.compression import (
    Compression,
    check_compression,
    compression_of,
    without_compression,
)
from vllm_unified.errors import ConfigurationError

Format = Literal["jsonl", "csv", "tsv", "parquet", "openai"]
FORMATS: tuple[Format, ...] = get_args(Format)
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
DELIMITERS: dict[Format, str] = {"csv": ",", "tsv": "\t"}


class Place(msgspec.Struct, frozen=True):
    """A file in a format, or a standard stream."""

    path: Path | None
    """``None`` for standard input or output."""
    format: Format
    compression: Compression | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.path) if self.path is not None else "the standard stream"


def place_of(name: str, format: str | None, what: Literal["input", "output"]) -> Place:
    """What a name means: ``-`` is the standard stream, of JSON lines; a file's suffix says its
    format and its compression.

    Raises:
        ConfigurationError: it says nothing, the format does not exist, or a package is missing.
    """
    if format is not None and format not in FORMATS:
        raise ConfigurationError(
            f"{what}_format must be one of {', '.join(FORMATS)}, not {format!r}"
        )
    if name == "-":
        place = Place(None, _known(format) or "jsonl")
        if place.format == "parquet":
            raise ConfigurationError(f"Parquet needs a file for {what}, not the standard stream")
        return place
    path = Path(name)
    plain = without_compression(path)
    chosen = _known(format) or _SUFFIXES.get(plain.suffix.lower())
    if chosen is None:
        raise ConfigurationError(
            f"the name of {name!r} does not say its format",
            hint=f"Use one of {', '.join(_SUFFIXES)}, with .gz or .zst after it if compressed, or "
            f"say {what}_format=... (--{what}-format): {', '.join(FORMATS)}.",
        )
    compression = compression_of(path)
    if chosen == "parquet":
        if compression:
            raise ConfigurationError(f"{name!r}: Parquet is compressed inside; drop the suffix")
        _check_parquet()
    check_compression(compression)
    return Place(path, chosen, compression)


def _known(format: str | None) -> Format | None:
    return next((known for known in FORMATS if known == format), None)


def _check_parquet() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "Parquet files need the extra 'batch'", hint="pip install 'vllm-unified[batch]'"
        ) from None
