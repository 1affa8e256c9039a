"""Writes snapshots to disk, on a thread of its own, away from the training path."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from distrain.checkpoint import CheckpointStore, Snapshot
from distrain.errors import CheckpointError, DistrainError, ServerLost
from distrain.storage import Place

Written = Callable[[int, Place], None]
Failed = Callable[[int | None, CheckpointError], None]


class CheckpointWriter:
    """Fetches snapshots with `take` (None: none waiting) whenever it is woken, and writes them in order.

    What fails does not end the run: `failed` is told, with the step where that is known, and the next one is tried. It
    ends when the server is `lost`. `fields` gives the manifest's fields for a snapshot.
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
        self.last_error: CheckpointError | None = None
        self.lost: ServerLost | None = None
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
            except ServerLost as lost:  # whoever supervises it will say so
                self.lost = lost
                return
            except Exception as error:
                said = error.message if isinstance(error, DistrainError) else f"{type(error).__name__}: {error}"
                self._has_failed(None, CheckpointError(f"a snapshot could not be fetched or written: {said}"))
            if closing:
                return

    def _write(self, snapshot: Snapshot) -> None:
        try:
            path = self._store.write(snapshot, self._fields(snapshot))
        except CheckpointError as error:
            self._has_failed(snapshot.step, error)
        else:
            self.last_error = None
            self._written(snapshot.step, path)

    def _has_failed(self, step: int | None, error: CheckpointError) -> None:
        self.last_error = error
        self._failed(step, error)
