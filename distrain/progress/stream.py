"""A stream that outlives who reads it."""

from __future__ import annotations

from typing import Any, TextIO, cast


class _LastingStream:
    """Passes everything on to a stream until that fails; from then on, nobody reads any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_read = stream, True

    def write(self, text: str) -> int:
        if self._is_read:
            try:
                return self._stream.write(text)
            except OSError:
                self._is_read = False
        return len(text)

    def flush(self) -> None:
        if self._is_read:
            try:
                self._stream.flush()
            except OSError:
                self._is_read = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lasting(stream: TextIO) -> TextIO:
    """The same stream, but that it takes no offence where its reader is gone (a closed pipe, a terminal hung up): what
    is told on the way is no reason for a run to end."""
    return cast(TextIO, _LastingStream(stream))
