"""Folders, on this machine or in a store, and the files in them. Needs pyarrow."""

from __future__ import annotations

import os
import posixpath
from typing import Any

import msgspec

from vllm_unified.batch.files.formats import Place, place_of
from vllm_unified.errors import BatchFileError, ConfigurationError


class InputFile(msgspec.Struct, frozen=True):
    """A file of rows."""

    name: str
    """Its path within the folder."""
    size: int
    """In bytes."""
    changed: int
    """When it was written last, in ns since 1970; 0 where the store does not say."""


class Folder:
    """A folder: a path, or the address of one (``s3://bucket/folder``, ``gs://``, ``file://``).

    Attributes:
        name: As it was given.
        files: The file system that it is on, Arrow's.
        path: Within that.
    """

    def __init__(self, name: str) -> None:
        """Raises:
        ConfigurationError: there is no such file system.
        """
        import pyarrow as pa
        import pyarrow.fs

        self.name = name
        try:
            if "://" in name:
                self.files, self.path = pyarrow.fs.FileSystem.from_uri(name)
            else:
                self.files = pyarrow.fs.LocalFileSystem()
                self.path = os.path.realpath(name)
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigurationError(f"{name} is no folder that can be reached: {error}") from error
        self.path = self.path.rstrip("/")

    @property
    def address(self) -> str:
        """What it is called in other processes, whose working directory may be another."""
        return self.name if "://" in self.name else self.path

    def at(self, *parts: str) -> str:
        """A path in it."""
        return posixpath.join(self.path, *parts)

    def inputs(self) -> list[InputFile]:
        """The files of rows in it and in its folders, by name; those that begin with ``_`` or
        ``.`` are none.

        Raises:
            ConfigurationError: it is not there, or has none.
        """
        found = []
        for info in self._look(self.path, must_exist=True):
            name = info.path[len(self.path) + 1 :]
            if not info.is_file or any(part[0] in "._" for part in name.split("/")):
                continue
            found.append(InputFile(name, info.size, info.mtime_ns or 0))
        if not found:
            raise ConfigurationError(f"{self.name} has no files in it")
        return sorted(found, key=lambda each: each.name)

    def names(self, *parts: str) -> list[str]:
        """The files in one of its folders, which need not be there."""
        at = self.at(*parts)
        infos = self._look(at, must_exist=False, recursive=False)
        return sorted(posixpath.basename(info.path) for info in infos if info.is_file)

    def read(self, *parts: str) -> bytes | None:
        """A file's bytes; ``None`` where there is none."""
        try:
            with self.files.open_input_stream(self.at(*parts)) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, data: bytes, *parts: str) -> None:
        """Write a file that is there whole, or not at all.

        Raises:
            BatchFileError: it cannot be written.
        """
        at = self.at(*parts)
        try:
            self.files.create_dir(posixpath.dirname(at), recursive=True)
            with self.files.open_output_stream(f"{at}.partial") as file:
                file.write(data)
            self.files.move(f"{at}.partial", at)
        except OSError as error:
            raise BatchFileError(f"cannot write {at}: {error}") from error

    def delete(self, *parts: str) -> None:
        """Delete a file, or a folder with all that is in it; it need not be there."""
        import pyarrow.fs

        at = self.at(*parts)
        kind = self.files.get_file_info(at).type
        if kind == pyarrow.fs.FileType.Directory:
            self.files.delete_dir(at)
        elif kind == pyarrow.fs.FileType.File:
            self.files.delete_file(at)

    def _look(self, at: str, *, must_exist: bool, recursive: bool = True) -> list[Any]:
        import pyarrow.fs

        selector = pyarrow.fs.FileSelector(at, recursive=recursive, allow_not_found=not must_exist)
        try:
            infos: list[Any] = self.files.get_file_info(selector)
        except OSError as error:
            raise ConfigurationError(f"cannot look into {self.name}: {error}") from error
        return infos


def is_folder(name: str) -> bool:
    """Whether it is a folder, or an address."""
    return "://" in name or os.path.isdir(name)


def format_of(files: list[InputFile], format: str | None) -> Place:
    """The format that all files have.

    Raises:
        ConfigurationError: they have several, or a name does not say it.
    """
    places = {place_of(each.name, format, "input").format: each for each in files}
    if len(places) > 1:
        names = " and ".join(each.name for each in places.values())
        raise ConfigurationError(
            f"the files have different formats: {names}",
            hint="Files of one format make a job: put the others elsewhere.",
        )
    first = place_of(files[0].name, format, "input")
    return msgspec.structs.replace(first, compression=None)
