"""Keeps two processes from training one run at the same time: both would write its folder and its MLflow run."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrain.errors import CheckpointError
from distrain.storage import Place


@contextmanager
def run_lock(folder: Place) -> Iterator[None]:
    """Hold the run of a folder, which need not be there, while it is trained.

    It holds between processes that share a network namespace, such as the jobs of a cluster, whose drivers run on its
    head, and leaves nothing behind however its holder ends. Raises CheckpointError where the run is trained already.
    """
    where = os.path.realpath(folder) if isinstance(folder, Path) else str(folder)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as holder:
        try:
            holder.bind(f"\0distrain-run-{hashlib.sha256(where.encode()).hexdigest()}")  # lives as long as its socket
        except OSError as error:
            raise CheckpointError(
                f"{folder}: another process of this machine trains this run now; wait for its end, or stop it"
            ) from error
        yield


def is_trained(folder: Place) -> bool:
    """Whether another process of this machine trains the run of a folder now."""
    try:
        with run_lock(folder):
            return False
    except CheckpointError:
        return True
