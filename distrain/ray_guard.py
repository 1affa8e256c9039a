"""Ends what a Ray of our own leaves when its driver is killed.

Ray's head and raylet end with their driver, and its actors within 3 s; its agents take a minute, and its files stay. So
a process beside the driver waits for the driver's end, which closes a pipe; run as a program, this file is that process
and needs nothing but Python itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_SETTLE_S = 5.0  # at most, until nothing holds a file any more


class RayGuard:
    """Watches over a Ray whose temporary folder is `folder`, from before its start until `dismiss`.

    If this process ends before that, however it ends, every process that has a file of the folder open is killed, and
    the folder removed.
    """

    def __init__(self, folder: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, folder],
            stdin=subprocess.PIPE,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
        )

    def dismiss(self) -> None:
        """There is nothing to watch over any more."""
        self._process.kill()
        self._process.communicate()


def _holders(folder: str) -> list[int]:
    """The processes that have a file of the folder open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if any(os.readlink(file).startswith(f"{folder}/") for file in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


def _clear(folder: str) -> None:
    until = time.monotonic() + _SETTLE_S
    while (holders := _holders(folder)) and time.monotonic() < until:
        for pid in holders:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # until the driver ends
    _clear(sys.argv[1])
