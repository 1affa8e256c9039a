"""A stream that outlives who reads it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, TextIO, cast


class _LastingStream:
    """Passes everything on to a stream. Where that fails, the stream's file becomes one that takes everything."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def _let_go(self) -> None:
        """What could not be written is still in its buffer, and Python ends with an error where that stays so."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lasting(stream: TextIO) -> TextIO:
    """The same stream, but that it takes no offence where its reader is gone (a closed pipe, a terminal that is away):
    what is told on the way is no reason for a run to end."""
    return cast(TextIO, _LastingStream(stream))
