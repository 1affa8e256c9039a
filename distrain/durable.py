"""Folders and files that appear whole or not at all, whatever dies: a hidden name beside them, fsync, then a rename."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>writing|replaced|removed)-(?P<host>.+)-(?P<pid>\d{1,9})-[0-9a-f]{8}")
_ABANDONED_S = 3600.0  # a hidden folder of another host that nobody touched for so long


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (name -> content) as `folder`, replacing one of that name.

    Whenever the process or the machine dies, either the new folder is there or the old one is (see `replaced`).
    Raises OSError, after taking away what was written.
    """
    hidden = _hidden(folder, "writing")
    aside = None
    with creating_folder(folder.parent):
        try:
            hidden.mkdir()
            for name, content in files.items():
                _write(hidden / name, content)
            _sync(hidden)
            if folder.exists():
                # A folder cannot be renamed over one that holds files.
                aside = folder.rename(_hidden(folder, "replaced"))
            hidden.rename(folder)
            _sync(folder.parent)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            if aside is not None and not folder.exists():
                aside.rename(folder)
            raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def creating_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and its parents where missing; when the block fails, take away those that were created."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            _sync(path.parent)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write `path`, replacing a file of that name at one stroke. Raises OSError; the old file is still there then."""
    with replacing_file(path) as hidden:
        _write(hidden, content)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Give a hidden name to write to; it becomes `path` when the block ends well and is removed when it does not."""
    hidden = _hidden(path, "writing")
    try:
        yield hidden
        with open(hidden, "rb") as file:
            os.fsync(file.fileno())
        hidden.replace(path)
        _sync(path.parent)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove `folder`, so that no half of it is ever seen under its name. Raises OSError where it cannot be renamed."""
    hidden = folder.rename(_hidden(folder, "removed"))
    shutil.rmtree(hidden, ignore_errors=True)  # what stays is hidden, and taken away at the next write


def folders(parent: Path) -> dict[str, Path]:
    """The whole folders in `parent`, by name: those under their own, and those that were being replaced."""
    return {path.name: path for path in parent.iterdir() if path.is_dir()} | dict(replaced(parent))


def replaced(parent: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, where it is now) of each folder that was being replaced when its process died."""
    for path in parent.iterdir():
        match = _HIDDEN.fullmatch(path.name)
        if match and match["kind"] == "replaced" and not (parent / match["name"]).exists():
            yield match["name"], path


def remove_leftovers(parent: Path) -> None:
    """Take away the hidden folders and files of dead processes, and put back what one of them was about to replace."""
    for name, path in list(replaced(parent)):
        if _is_dead(path):
            path.rename(parent / name)
    for path in list(parent.iterdir()):
        if _HIDDEN.fullmatch(path.name) and _is_dead(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _hidden(folder: Path, kind: str) -> Path:
    mark = f"{kind}-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    return folder.with_name(f".{folder.name}.{mark}")


def _is_dead(path: Path) -> bool:
    """Whether the process that made a hidden folder is gone, as far as can be told from here."""
    match = _HIDDEN.fullmatch(path.name)
    assert match
    try:
        untouched_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if untouched_s > _ABANDONED_S:
        return True
    if match["host"] != platform.node():
        return False
    pid = int(match["pid"])
    # Our own number: this process writes one folder at a time, so it is an earlier life (container) that had it.
    return pid == os.getpid() or not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the folder's entries survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
