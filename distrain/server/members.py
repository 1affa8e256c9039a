"""The workers that joined a server: their links and buffers, until when they must answer, and how fast they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from distrain.exchange.link import Frame, Kind, SocketLink
from distrain.exchange.memory import Published, PushSlots
from distrain.server.ledger import Assignment

_WEIGHT = 0.2  # of the newest measurement in the running mean
_LATE = 2.0  # times what a task usually takes, beyond that, is late
_LATE_SECONDS = 0.1  # and at least this much


@dataclass(frozen=True, slots=True)
class Task:
    """What was sent for an assignment."""

    kind: Kind
    sent_at: float  # time.monotonic()
    is_copy: bool = False  # another worker owes it too


@dataclass(eq=False)
class Member:
    """A worker that joined. `own` are the parameters that only it reads, in asynchronous training."""

    rank: int
    incarnation: int
    link: SocketLink
    slots: PushSlots
    launch: int
    own: Published | None = None
    deadline: float = math.inf  # time.monotonic() by which it must have answered, if it owes anything
    held: dict[int, int] = field(default_factory=dict)  # without shared memory: version -> update whose parameters
    tasks: dict[Assignment, Task] = field(default_factory=dict)  # not answered yet
    answered_at: float = 0.0  # time.monotonic()
    seconds: float | None = None  # a microbatch usually takes so long
    opening_s: float | None = None  # so long did its first task take, which opens windows

    @property
    def speed(self) -> float | None:
        """Microbatches a second."""
        return 1.0 / self.seconds if self.seconds else None

    def answered(self, frame: Frame, now: float) -> None:
        """A push came. A task's first push says how long all of it took."""
        self.answered_at = now
        for assignment in [a for a in self.tasks if a.round == frame.round and a.first <= frame.first < a.stop]:
            task = self.tasks[assignment]
            if task.kind is Kind.TRAIN and frame.compute_s:
                self._took(frame.data_s + frame.compute_s, assignment.stop - assignment.first, task.is_copy)
            if frame.stop == assignment.stop:
                del self.tasks[assignment]

    def _took(self, seconds: float, microbatches: int, is_copy: bool) -> None:
        if self.opening_s is None:
            self.opening_s = seconds
        elif not is_copy:  # which opens windows, too
            each = max(seconds / microbatches, 1e-6)
            self.seconds = each if self.seconds is None else (1 - _WEIGHT) * self.seconds + _WEIGHT * each

    def is_late(self, assignment: Assignment, now: float, opening_s: float) -> bool:
        """Whether its oldest assignment takes so much longer than usual that another worker, which has to open the
        shards first, had better been given it: the wait is as long as that takes."""
        task = self.tasks.get(assignment)
        if self.seconds is None or task is None or task.kind is not Kind.TRAIN:
            return False
        expected = self.seconds * (assignment.stop - assignment.first)
        waited = now - max(task.sent_at, self.answered_at) - expected
        return waited > max(_LATE * expected, opening_s, _LATE_SECONDS)
