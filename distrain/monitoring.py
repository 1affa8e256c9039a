"""A run's series for Prometheus: Ray exports them on its node's metrics port, as ray_distrain_*."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from distrain.records import Report, StepRecord

# Upper bounds of the step-time histogram, seconds: within 2 or 2.5 times of each other, from 1 ms to a minute.
STEP_BOUNDS_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0]
_PARTS: dict[str, Callable[[StepRecord], float]] = {
    "data": lambda record: record.data_s,
    "compute": lambda record: record.compute_s,
    "waiting": lambda record: record.waiting_s,
    "exchange": lambda record: record.exchange_s,
    "update": lambda record: record.update_s,
}


class RunSeries:
    """The series of one run, each with the tag `run`, the run's name.

    The driver records what the server reported, a few times a second: no step waits for it. Ray sends the values to its
    node's agent every RAY_metrics_report_interval_ms (10 s) of the driver's environment. Counters and the histogram
    start at this process's start: a resumed run counts from zero again, as Prometheus expects of a process that was
    started anew.
    """

    def __init__(self, run: str) -> None:
        def made(kind: Any, name: str, description: str, *keys: str, **options: Any) -> Any:
            series = kind(f"distrain_{name}", description=description, tag_keys=("run", *keys), **options)
            return series.set_default_tags({"run": run})

        self._step_s = made(Histogram, "step_seconds", "Wall-clock time of a step", boundaries=STEP_BOUNDS_S)
        self._part_s = made(Counter, "part_seconds", "Time of the parts of steps: means over the workers", "part")
        self._samples = made(Counter, "samples", "Rows trained on")
        self._step = made(Gauge, "step", "Updates applied, those before a resume included")
        self._epoch = made(Gauge, "epoch", "The epoch under way, from 0")
        self._loss = made(Gauge, "train_loss", "Loss of the last step whose rows have weight, their mean")
        self._validation_loss = made(Gauge, "validation_loss", "Loss of the last validation")
        self._workers = made(Gauge, "workers", "Workers alive")
        self._failures = made(Gauge, "worker_failures", "Workers that ended before the run did")
        self._staleness = made(Gauge, "staleness", "Updates between the parameters of the last gradient and its update")

    def record(self, report: Report, worker_failures: int) -> None:
        """Take in what the server reported since the last call, and how many workers were lost in all."""
        self._failures.set(worker_failures)
        for record in report.steps:
            self._step_s.observe(record.step_s)
            self._samples.inc(record.samples)
        for part, seconds in _PARTS.items():
            total = math.fsum(max(0.0, seconds(record)) for record in report.steps)
            if total > 0:  # a counter takes no zero
                self._part_s.inc(total, {"part": part})
        if report.steps:
            last = report.steps[-1]
            self._step.set(last.step)
            self._epoch.set(last.epoch)
            if weighted := [record for record in report.steps if record.weight]:  # the others have no loss
                self._loss.set(weighted[-1].loss)
            self._workers.set(last.workers)
            self._staleness.set(last.staleness)
        if report.validations:
            self._validation_loss.set(report.validations[-1].metrics["loss"])
