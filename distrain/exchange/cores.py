"""Keeps the workers of a host from being woken on the same core.

Linux wakes a thread on the core where it last ran, or on one that is idle at that moment. Two workers that went to
sleep on one core, one after the other, are thus woken there together, and the second waits until the first has had its
turn, while another core falls idle (measured: in 18 to 29 % of the steps of two workers on two cores, each of them 4 ms
longer; in 2 % with this). So a worker that is about to sleep where another one sleeps moves to another core first.
Nobody is bound to a core: what else runs on the host may push a worker aside as ever.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

from distrain.exchange.memory import SharedBuffer

_NUM_CORES = 8192  # as many as Linux can have
_NOBODY = 0


class Cores:
    """Who sleeps on which core of a host: shared memory that holds a worker's rank + 1 for each core, or 0.

    Each worker writes only for itself, and nothing is locked: what two of them overlook costs one of them a turn.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.buffer = SharedBuffer(_NUM_CORES * 4, fd)
        self._sleepers = self.buffer.words(_NUM_CORES)
        self._current = getattr(ctypes.CDLL(None), "sched_getcpu", lambda: -1)  # glibc's and musl's

    def settle(self, rank: int) -> int:
        """The worker of this rank is about to sleep, in the thread that calls: move it away from where another one
        sleeps, if there is room elsewhere. Returns the core, -1 where that is not known."""
        core, mine = self._current(), rank + 1
        if not 0 <= core < _NUM_CORES:
            return -1
        if self._sleepers[core] not in (_NOBODY, mine):
            allowed = os.sched_getaffinity(0)
            if free := {c for c in allowed if self._sleepers[c] in (_NOBODY, mine)}:
                with suppress(OSError):  # the host may have been given other cores since
                    os.sched_setaffinity(0, free)
                    os.sched_setaffinity(0, allowed)
                core = self._current()
        self._sleepers[core] = mine
        return core

    def leave(self, core: int, rank: int) -> None:
        """It is awake."""
        if core >= 0 and self._sleepers[core] == rank + 1:
            self._sleepers[core] = _NOBODY
