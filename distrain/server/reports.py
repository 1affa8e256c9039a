"""What the server's loop has to say, kept until the driver asks. Thread-safe."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from safetensors.torch import save
from torch import Tensor

from distrain.checkpoint import Snapshot
from distrain.records import Event, Report, StepRecord, ValidationRecord

_MAX_SNAPSHOTS = 4


@dataclass(frozen=True)
class Captured:
    """A snapshot before it is serialized. Its tensors belong to nobody else. `is_best`: of those so far, by its
    validation."""

    step: int
    epoch: int
    epoch_finished: bool
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    metrics: dict[str, float]
    is_best: bool = False

    def serialized(self) -> Snapshot:
        return Snapshot(
            self.step, self.epoch, self.epoch_finished, save(self.model), save(self.optimizer), self.state, self.metrics
        )


class Reports:
    """A mailbox: the loop posts, the driver drains. Snapshots wait apart, since they are large; when the driver cannot
    keep up, the oldest that was not validated gives way, or the oldest of all, but never the best one. A snapshot is
    given out once the steps before it have been drained: what is durable has been told of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._report = Report()
        self._snapshots: deque[Captured] = deque()
        self._num_drained = 0  # of the snapshots: their steps were drained

    def step(self, record: StepRecord) -> None:
        with self._lock:
            self._report.steps.append(record)

    def validation(self, record: ValidationRecord) -> None:
        with self._lock:
            self._report.validations.append(record)

    def event(self, event: Event) -> None:
        with self._lock:
            self._report.events.append(event)

    def snapshot(self, snapshot: Captured) -> None:
        with self._lock:
            self._snapshots.append(snapshot)
            if len(self._snapshots) > _MAX_SNAPSHOTS:
                waiting = list(self._snapshots)
                best = max((place for place, each in enumerate(waiting) if each.is_best), default=None)
                older = [place for place in range(len(waiting) - 1) if place != best]
                victim = next((place for place in older if not waiting[place].metrics), older[0])
                self._num_drained -= victim < self._num_drained
                del self._snapshots[victim]

    def drain(self) -> Report:
        """Everything since the last call."""
        with self._lock:
            report, self._report = self._report, Report()
            self._num_drained = len(self._snapshots)
            return report

    def take_snapshot(self) -> Snapshot | None:
        """The oldest snapshot whose steps have been drained, if any."""
        with self._lock:
            if not self._num_drained:
                return None
            self._num_drained -= 1
            captured = self._snapshots.popleft()
        return captured.serialized()
