"""What a process or thread asks of its operating system. On one that does not know it, nothing happens."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress

_LOWEST = 19  # priority, as nice(2) counts: Ray's workers run at 15
# glibc's mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 512 << 20  # free memory at the heap's top that is not given back
_MAPPED_BYTES = 32 << 20  # what is larger gets pages of its own, and gives them back


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for what is asked for next.

    Else glibc gives the gradients' memory back after each step and takes it again: 130 to 280 page faults and 0.4 to
    0.9 ms of the system's time in a step of an MLP 784-512-512-10 with 128 rows.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def run_in_the_background() -> None:
    """Give this thread the lowest priority: where cores are short, it takes the time in which others wait.

    Not SCHED_IDLE, with which it would stand still on a machine that others keep busy, and whoever waits for it too.
    """
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
