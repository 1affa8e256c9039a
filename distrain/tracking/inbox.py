"""What the driver has said and the tracker's thread has not taken yet. Thread-safe, bounded, never blocks for long."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distrain.records import Event, StepRecord, ValidationRecord
from distrain.tracking.thinning import Point, Thinner, validation_points

if TYPE_CHECKING:
    from distrain.tracking.store import MlflowRun


@dataclass(frozen=True)
class Job:
    """Something to do with the run, that is not points. `what` names it to a person."""

    what: str
    do: Callable[[MlflowRun], None]


class Inbox:
    """A mailbox. Steps that are not taken for long are merged; events and jobs are kept, since they are few."""

    def __init__(self, every_steps: int | None) -> None:
        self._lock = threading.Lock()
        self._thinner = Thinner(every_steps)
        self._validations: list[ValidationRecord] = []
        self._events: list[Event] = []
        self._jobs: list[Job] = []
        self._staleness = Counter[int]()

    def step(self, record: StepRecord) -> None:
        with self._lock:
            self._thinner.add(record)
            self._staleness[record.staleness] += 1

    def validation(self, record: ValidationRecord) -> None:
        with self._lock:
            self._validations.append(record)

    def event(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)

    def job(self, what: str, do: Callable[[MlflowRun], None]) -> None:
        with self._lock:
            self._jobs.append(Job(what, do))

    def take_points(self, after_step: int, after_validation: int, finish: bool) -> list[Point]:
        """Points of steps and validations after the given ones; with `finish` those of a mean under way too."""
        with self._lock:
            steps = self._thinner.drain(finish)
            validations, self._validations = self._validations, []
        points = [point for point in steps if point.step > after_step]
        for record in validations:
            if record.step > after_validation:
                points += validation_points(record)
        return points

    def staleness(self) -> dict[int, int]:
        """How many updates had which staleness so far."""
        with self._lock:
            return dict(self._staleness)

    def take_events(self) -> list[Event]:
        with self._lock:
            events, self._events = self._events, []
        return events

    def take_jobs(self) -> list[Job]:
        with self._lock:
            jobs, self._jobs = self._jobs, []
        return jobs
