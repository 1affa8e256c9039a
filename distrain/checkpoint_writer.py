"""Writes snapshots to disk, on a thread of its own, away from the training path."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from distrain.checkpoint import CheckpointStore, Snapshot
from distrain.errors import CheckpointError
from distrain.storage import Place

Written = Callable[[int, Place], None]
Failed = Callable[[int, CheckpointError], None]


class CheckpointWriter:
    """Fetches snapshots with `take` (None: none waiting) whenever it is woken, and writes them in order.

    A write that fails does not end the run: `failed` is told. `fields` gives the manifest's fields for a snapshot.
    """

    def __init__(
        self,
        store: CheckpointStore,
        take: Callable[[], Snapshot | None],
        fields: Callable[[Snapshot], Mapping[str, Any]],
        written: Written,
        failed: Failed,
    ) -> None:
        self._store = store
        self._take = take
        self._fields = fields
        self._written = written
        self._failed = failed
        self._woken = threading.Event()
        self._closing = False
        self._broken: Exception | None = None
        self.last_error: CheckpointError | None = None
        self._thread = threading.Thread(target=self._run, name="distrain-checkpoints", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There may be snapshots to fetch."""
        self._woken.set()

    def close(self) -> None:
        """Write what is waiting, then end the thread."""
        self._closing = True
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._woken.wait()
            self._woken.clear()
            closing = self._closing
            try:
                while (snapshot := self._take()) is not None:
                    self._write(snapshot)
            except Exception as error:  # the server died: whoever supervises it will say so
                self._broken = error
                return
            if closing:
                return

    def _write(self, snapshot: Snapshot) -> None:
        try:
            path = self._store.write(snapshot, self._fields(snapshot))
        except CheckpointError as error:
            self.last_error = error
            self._failed(snapshot.step, error)
        else:
            self.last_error = None
            self._written(snapshot.step, path)
