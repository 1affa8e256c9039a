"""Ctrl-C and SIGTERM: the first one asks the run to stop, the second one ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray's variable: between SIGTERM and SIGKILL where a job is stopped
STOP_WAIT_S = 60  # for the step and the checkpoint
_SHOW_CURSOR = b"\x1b[?25h"  # which live lines hide


@contextmanager
def handlers_kept() -> Iterator[bool]:
    """At the end, give the process back the handlers of SIGNALS that it has now. Gives whether this thread may set
    others meanwhile: only the main one may."""
    may = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if may else {}
    try:
        yield may
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """While entered, calls `stop` on the first signal. Outside the main thread it leaves signals alone."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._kept = handlers_kept()
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        if self._kept.__enter__():
            for number in SIGNALS:
                signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.__exit__(kind, error, trace)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            with suppress(OSError):
                if os.isatty(2):
                    os.write(2, _SHOW_CURSOR)
            os._exit(128 + number)  # a local Ray and all actors share this process's fate
        self.received = number
        self._stop()
        # On a thread, since what was interrupted may hold the terminal's lock.
        threading.Thread(target=_tell, args=(signal.Signals(number).name,), daemon=True).start()


def _tell(name: str) -> None:
    with suppress(OSError):  # who reads may have been interrupted as well
        print(f"{name}: finishing the step and writing a checkpoint; once more to end at once", file=sys.stderr)
