"""Files that may be compressed, as bytes."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from pathlib import Path
from typing import IO, Any, Literal

from vllm_unified.errors import ConfigurationError

Compression = Literal["gz", "zst"]
_SUFFIXES: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
# Level 3 of zstd and 6 of gzip are what their own tools take.
_GZIP_LEVEL = 6
_BUFFER = 1 << 20


def compression_of(path: Path) -> Compression | None:
    """What the name says."""
    return _SUFFIXES.get(path.suffix.lower())


def without_compression(path: Path) -> Path:
    """The name that the file would have uncompressed."""
    return path.with_suffix("") if compression_of(path) else path


def decompressed(file: IO[bytes], compression: Compression | None) -> IO[bytes]:
    """A reader of what is in the file; several members or frames in a row are one content."""
    if compression == "gz":
        return io.BufferedReader(_Gzip(fileobj=file, mode="rb"), _BUFFER)
    if compression == "zst":
        return io.BufferedReader(_zstd().ZstdFile(file, "rb"), _BUFFER)
    return file


class _Gzip(gzip.GzipFile):
    """One that fails as files do, and not with zlib's error."""

    def readinto(self, buffer: Any) -> int:
        try:
            return super().readinto(buffer)
        except (zlib.error, EOFError) as error:
            raise OSError(f"the gzip data is broken: {error}") from error


def compressed(data: bytes, compression: Compression | None) -> bytes:
    """The data as a whole member or frame, which may be appended to others."""
    if compression == "gz":
        return gzip.compress(data, _GZIP_LEVEL, mtime=0)
    if compression == "zst":
        return bytes(_zstd().compress(data))
    return data


def check_compression(compression: Compression | None) -> None:
    """See that what it takes is installed.

    Raises:
        ConfigurationError: it is not; says how to get it.
    """
    if compression == "zst":
        _zstd()


def _zstd() -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise ConfigurationError(
            "zst files need the extra 'batch'", hint="pip install 'vllm-unified[batch]'"
        ) from None
    return zstd
