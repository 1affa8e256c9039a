"""Keeps two processes from training one run at the same time: both would write its folder and its MLflow run."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrain.errors import CheckpointError
from distrain.storage import Place

_NAMES = Path("/proc/net/unix")


@contextmanager
def run_lock(folder: Place) -> Iterator[None]:
    """Hold the run of a folder, which need not be there, while it is trained.

    It holds between processes that share a network namespace, such as the jobs of a cluster, whose drivers run on its
    head, and leaves nothing behind however its holder ends. Raises CheckpointError where the run is trained already.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as holder:
        try:
            holder.bind(f"\0{_name(folder)}")  # lives as long as its socket
        except OSError as error:
            why = "another process of this machine trains this run now; wait for its end, or stop it"
            if error.errno != errno.EADDRINUSE:
                why = f"the run cannot be held against other processes: {error.strerror}"
            raise CheckpointError(f"{folder}: {why}") from error
        yield


def is_trained(folder: Place) -> bool:
    """Whether a process of this machine trains the run of a folder now."""
    return f"@{_name(folder)}\n" in _NAMES.read_text()


def _name(folder: Place) -> str:
    where = os.path.realpath(folder) if isinstance(folder, Path) else str(folder)
    return f"distrain-run-{hashlib.sha256(where.encode()).hexdigest()}"
