"""Where checkpoints are kept: a local folder, or one in an object store. The two differ in how what is written becomes
whole (see durable.py and objects.py), and in nothing that a checkpoint has to know."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from distrain import durable, objects
from distrain.objects import ObjectPath

Place = Path | ObjectPath


class Keeper(Protocol):
    """How folders of files are written and removed at a place: whole or not at all, whatever dies."""

    def write_folder(self, folder: Any, files: Mapping[str, bytes]) -> None:
        """Write `files` (name -> content) as `folder`, replacing one of that name. Raises OSError."""

    def write_file(self, path: Any, content: bytes) -> None:
        """Write a file, replacing one of that name. Raises OSError."""

    def remove_folder(self, folder: Any) -> None:
        """Remove a folder. Raises OSError."""

    def folders(self, parent: Any) -> dict[str, Any]:
        """The whole folders in `parent`, by name."""

    def remove_leftovers(self, parent: Any) -> None:
        """Take away what writers left that died."""


def place(where: str | Place) -> Place:
    """The place that a path or URI names. Raises CheckpointError for a URI that names none."""
    if isinstance(where, str) and "://" in where and not where.startswith("file://"):
        return ObjectPath.of(where)
    return Path(where.removeprefix("file://")).expanduser() if isinstance(where, str) else where


def candidates(reference: str | Place, root: Place) -> tuple[Place, ...]:
    """The places that a person may mean: what a URI names, or a path from here or from `root`."""
    given = place(reference)
    return (given,) if isinstance(given, ObjectPath) else (given, root / str(given))


def num_bytes(file: Place) -> int:
    """The size of a file. Raises OSError."""
    return file.stat().st_size if isinstance(file, Path) else file.num_bytes()


def keeper(place: Place) -> Keeper:
    """Who writes there."""
    return cast(Keeper, objects if isinstance(place, ObjectPath) else durable)


class Mirror:
    """A file as a file of this machine: the place itself where that is local, else a copy, which is copied back when
    told to, since objects cannot be appended to.

    `path` is the local file. Raises OSError where the place cannot be read.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        if isinstance(place, Path):
            self.path = place
            return
        mark = hashlib.sha256(str(place).encode()).hexdigest()[:12]
        self.path = Path(tempfile.gettempdir(), f"distrain-{mark}-{place.name}")
        there = place.read_bytes() if place.exists() else b""
        # A run that this machine lost and goes on with may have more of it than was copied.
        if not (there and self.path.exists() and self.path.read_bytes().startswith(there)):
            self.path.write_bytes(there)

    def push(self) -> None:
        """Copy what there is now. Raises OSError."""
        if not isinstance(self._place, Path):
            keeper(self._place).write_file(self._place, self.path.read_bytes())

    def drop(self) -> None:
        """Remove the local file, where it is a copy."""
        if not isinstance(self._place, Path):
            self.path.unlink(missing_ok=True)
