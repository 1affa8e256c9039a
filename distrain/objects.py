"""Folders in an object store (s3://, gs://) or another remote file system that pyarrow opens.

An object store has no rename, and no folders but common beginnings of names. What it has: an object appears whole, at
the end of its upload, or not at all. So a checkpoint's files are written one after the other, and the last of them, the
manifest, makes it count: a folder without one is not a checkpoint yet. Whoever reads one while it is written again sees
files that do not match the manifest's SHA-256, and never takes a mixture for whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, cast
from urllib.parse import quote, unquote

from pyarrow import fs

from distrain.credentials import redacted
from distrain.data.files import filesystem
from distrain.errors import CheckpointError, CheckpointUnreadable, DataError
from distrain.manifest import MANIFEST

_ABANDONED_S = 3600.0  # a folder that nobody has finished for so long


@dataclass(frozen=True)
class ObjectPath:
    """A place in a remote file system, with as much of `pathlib.Path`'s interface as checkpoints need.

    `key` is its path there (in S3: bucket and key); `prefix` and `query` are what its URI has before and after that.
    Shown without the user's name and password. Raises CheckpointError where the file system cannot be reached, and
    FileNotFoundError as a Path does.
    """

    files: fs.FileSystem = field(repr=False, compare=False)
    key: str
    prefix: str
    query: str = ""

    @classmethod
    def of(cls, uri: str) -> ObjectPath:
        """The place that a URI names. Raises CheckpointError where it names none."""
        base, question, query = uri.partition("?")
        base = base.rstrip("/")
        try:
            files, key = filesystem(base + question + query)
        except DataError as error:
            reason = error.message.removeprefix(f"{base}{question}{query}: ")
            raise CheckpointError(f"{redacted(uri)}: {reason}") from None
        start = next((start for start in range(len(base)) if unquote(base[start:]) == key), len(base))
        return cls(files, key, base[:start], question + query)

    def __str__(self) -> str:
        return f"{redacted(f'{self.prefix}{quote(self.key)}')}{self.query}"

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.files, f"{self.key}/{name}", self.prefix, self.query)

    def __lt__(self, other: ObjectPath) -> bool:
        return self.key < other.key

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.files, self.key.rpartition("/")[0], self.prefix, self.query)

    def absolute(self) -> ObjectPath:
        return self

    def exists(self) -> bool:
        return bool(self._info().type != fs.FileType.NotFound)

    def is_dir(self) -> bool:
        return bool(self._info().type == fs.FileType.Directory)

    def num_bytes(self) -> int:
        """The size of a file. Raises FileNotFoundError."""
        info = self._info()
        if info.type != fs.FileType.File:
            raise FileNotFoundError(f"{self}: no such object")
        return int(info.size)

    def iterdir(self) -> Iterator[ObjectPath]:
        for info in self.listing():
            yield ObjectPath(self.files, info.path, self.prefix, self.query)

    def open(self, mode: str) -> IO[bytes]:
        """Open for reading as a stream: "rb" is the only mode there is."""
        assert mode == "rb"
        return cast(IO[bytes], self.files.open_input_stream(self.key))

    def read_bytes(self) -> bytes:
        with self.open("rb") as stream:
            return stream.read()

    def listing(self, recursive: bool = False) -> list[fs.FileInfo]:
        """What is in this folder; nothing where there is none."""
        try:
            selector = fs.FileSelector(self.key, allow_not_found=True, recursive=recursive)
            return list(self.files.get_file_info(selector))
        except OSError as error:
            raise CheckpointUnreadable(f"{self}: cannot be listed: {_first_line(error)}") from error

    def _info(self) -> fs.FileInfo:
        try:
            return self.files.get_file_info(self.key)
        except OSError as error:
            raise CheckpointUnreadable(f"{self}: cannot be reached: {_first_line(error)}") from error


def write_folder(folder: ObjectPath, files: Mapping[str, bytes]) -> None:
    """Write `files` (name -> content), the manifest last. Raises OSError; there is no new checkpoint then."""
    for name in sorted(files, key=lambda name: name == MANIFEST):
        write_file(folder / name, files[name])


def write_file(path: ObjectPath, content: bytes) -> None:
    """Write an object, replacing one of that name at one stroke: where the upload ends. Raises OSError."""
    try:
        stream = path.files.open_output_stream(path.key)
    except FileNotFoundError:  # a file system that has folders
        path.files.create_dir(path.parent.key, recursive=True)
        stream = path.files.open_output_stream(path.key)
    with stream:
        stream.write(content)


def remove_folder(folder: ObjectPath) -> None:
    """Remove a checkpoint, its manifest first, so that no half of it counts. Raises OSError."""
    folder.files.delete_file((folder / MANIFEST).key)
    folder.files.delete_dir(folder.key)


def folders(parent: ObjectPath) -> dict[str, ObjectPath]:
    """The folders in `parent` that are whole, by name."""
    return {folder: parent / folder for folder, files in _inside(parent).items() if MANIFEST in files}


def remove_leftovers(parent: ObjectPath) -> None:
    """Take away folders that were begun by writers that ended before the manifest, long ago."""
    for folder, files in _inside(parent).items():
        if MANIFEST not in files and time.time() - max(files.values()) > _ABANDONED_S:
            parent.files.delete_dir((parent / folder).key)


def _inside(parent: ObjectPath) -> dict[str, dict[str, float]]:
    """The folders in `parent`, and the files right in each with the Unix seconds of their last change."""
    found: dict[str, dict[str, float]] = {}
    for info in parent.listing(recursive=True):
        folder, _, name = info.path.removeprefix(parent.key).lstrip("/").partition("/")
        if name and "/" not in name and info.type == fs.FileType.File:
            found.setdefault(folder, {})[name] = (info.mtime_ns or 0) / 1e9
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
