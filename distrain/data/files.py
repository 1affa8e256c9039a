"""Finds Parquet files: files, folders, globs and lists of them, on this machine or behind a URI."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import PurePosixPath
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from distrain.credentials import redacted
from distrain.errors import DataError

_GLOB = frozenset("*?[")
_URI_SAFE = "/:=@+,;!$&'()*~"
_TABLE_LOGS = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}


def filesystem(source: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it. Local paths become absolute."""
    if "://" not in source:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(source))
    try:
        found, path = fs.FileSystem.from_uri(source)
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise DataError(f"{source}: not a path or URI that can be read: {_first_line(error)}") from error
    return found, path


def find_files(sources: str | Iterable[str]) -> list[tuple[str, int]]:
    """The Parquet files that `sources` name, as (path or URI, bytes), in a fixed order.

    Raises DataError for a path that is missing, an empty folder, a glob that matches nothing, or the folder of a table
    (Delta Lake, Hudi, Iceberg), where not every file counts.
    """
    found: list[tuple[str, int]] = []
    for source in [sources] if isinstance(sources, str) else sources:
        found += _find(source)
    for path, times in Counter(path for path, _ in found).items():
        if times > 1:
            raise DataError(f"{path}: named more than once; its rows would count twice")
    return found


def _find(source: str) -> list[tuple[str, int]]:
    # A URI's query (an endpoint, a region) belongs to the file system, and every file's URI needs it again.
    base, question, query = source.partition("?") if "://" in source else (source, "", "")
    is_glob = bool(_GLOB & set(base))
    root = _before_glob(base) if is_glob else base
    files, path = filesystem(root + question + query)
    scheme, _, rest = root.partition("://") if "://" in root else ("", "", "")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if ":" in user:
        raise DataError(
            f"{redacted(source)}: workers on other machines would not have this password: put it into the environment "
            "of each (for s3://: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or into its credentials file"
        )

    def uri(found: str) -> str:
        # The listing gives names as they are; in a URI, spaces and such stand as %20.
        return f"{scheme}://{user}{at}{quote(found, safe=_URI_SAFE)}{question}{query}" if scheme else found

    try:
        info = files.get_file_info(path)
        if info.type == fs.FileType.File and not is_glob:
            return [(uri(info.path), info.size)]
        if info.type == fs.FileType.NotFound and not is_glob:
            raise DataError(f"{source}: no such file or folder")
        selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
        entries = [entry for entry in files.get_file_info(selector) if entry.type == fs.FileType.File]
    except OSError as error:
        raise DataError(f"{source}: cannot be listed: {_first_line(error)}") from error
    patterns = [part for part in base.split("/")[_fixed_parts(base) :] if part] if is_glob else ["**"]
    inside = len(PurePosixPath(path).parts)
    parts = {entry.path: PurePosixPath(entry.path).parts[inside:] for entry in entries}
    entries = [entry for entry in entries if _match(parts[entry.path], patterns)]
    if not entries:
        raise DataError(f"{source}: {'matches no file' if is_glob else 'the folder holds no files'}")
    tables = dict(filter(None, map(_table, parts.values())))
    for inner in (parts[entry.path] for entry in entries if tables):
        table = next((inner[:depth] for depth in range(len(inner)) if inner[:depth] in tables), None)
        if table is not None:
            raise DataError(
                f"{uri('/'.join((path, *table)))}: a table of {tables[table]}, whose folder holds rows too that were "
                "replaced or deleted: write its rows to plain Parquet files, or list the files that count"
            )
    return sorted((uri(entry.path), entry.size) for entry in entries)


def _before_glob(path: str) -> str:
    """The part of a path before the first component with a wildcard."""
    return "/".join(path.split("/")[: _fixed_parts(path)]) or ("/" if path.startswith("/") else ".")


def _fixed_parts(path: str) -> int:
    """How many components come before the first with a wildcard."""
    return next(index for index, part in enumerate(path.split("/")) if _GLOB & set(part))


def _table(parts: tuple[str, ...]) -> tuple[tuple[str, ...], str] | None:
    """The folder of a table whose log a file belongs to, and which kind of table it is."""
    for depth, part in enumerate(parts[:-1]):
        if part in _TABLE_LOGS:
            return parts[:depth], _TABLE_LOGS[part]
    is_iceberg = parts[-2:-1] == ("metadata",) and parts[-1].endswith(".metadata.json")
    return (parts[:-2], "Iceberg") if is_iceberg else None


def _match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Component by component, so that * does not cross folders; ** does. What begins with _ or . is bookkeeping of
    whoever wrote the folder, by Parquet's convention: only a pattern that begins likewise matches it."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        visible = next((depth for depth, part in enumerate(parts) if part[0] in "_."), len(parts))
        return any(_match(parts[skip:], patterns[1:]) for skip in range(visible + 1))
    if not parts or (parts[0][0] in "_." and patterns[0][0] != parts[0][0]):
        return False
    return fnmatch(parts[0], patterns[0]) and _match(parts[1:], patterns[1:])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
