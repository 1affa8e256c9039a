"""Points that could not be delivered yet, in a file of JSON lines that outlives the process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from distrain.tracking.thinning import Point

_BATCH = 1000


class Spool:
    """A file of points, oldest first; it exists only while there are any. Not thread-safe.

    Whoever delivers must stand the same point twice: after a crash delivery starts over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._delivered_lines = 0

    def __bool__(self) -> bool:
        return self.path.exists()

    def append(self, points: Sequence[Point]) -> None:
        """Add points at the end. Raises OSError where the file cannot be written."""
        if not points:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(point) + "\n" for point in points)

    def deliver(self, send: Callable[[list[Point]], None]) -> None:
        """Send all points, at most 1000 at a time, then remove the file. What `send` raises ends it; what was sent by
        then is not sent by the next call."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            lines = islice(file, self._delivered_lines, None)
            while batch := list(islice(lines, _BATCH)):
                send([point for line in batch if (point := _parse(line)) is not None])
                self._delivered_lines += len(batch)
        self.path.unlink()
        self._delivered_lines = 0

    def __len__(self) -> int:
        """The number of points not yet delivered."""
        if not self.path.exists():
            return 0
        with self.path.open(encoding="utf-8") as file:
            return sum(1 for _ in file) - self._delivered_lines


def _parse(line: str) -> Point | None:
    try:
        key, value, time_ms, step = json.loads(line)
        return Point(str(key), float(value), int(time_ms), int(step))
    except (ValueError, TypeError):
        return None  # the last line of a process that was killed while it wrote
