"""Memory for payloads that is used again, since fresh memory has to be taken from the system page by page."""

from __future__ import annotations


class Pool:
    """Lends buffers by their size."""

    def __init__(self) -> None:
        self._free: dict[int, list[memoryview]] = {}

    def take(self, num_bytes: int) -> memoryview:
        """A buffer of so many bytes, with whatever is in it."""
        free = self._free.get(num_bytes)
        return free.pop() if free else memoryview(bytearray(num_bytes))

    def give(self, buffer: memoryview) -> None:
        """Take a buffer back that nobody reads any more."""
        self._free.setdefault(len(buffer), []).append(buffer)
