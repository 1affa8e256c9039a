"""How a run stands, and how that reads. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from distrain.progress.protocol import RunInfo
from distrain.records import Event, Report, ValidationRecord
from distrain.step_sums import StepSums

_RECENT_MS = 5000  # what "now" means in speeds and in the loss
_PIECE_MS = 250

PARTS = ("data", "compute", "waiting", "exchange", "update")


class Standing:
    """The last seconds of a run, added up from its reports, in constant memory."""

    def __init__(self, info: RunInfo) -> None:
        self.info = info
        self.validation: ValidationRecord | None = None
        self._recent: deque[StepSums] = deque()

    def add(self, report: Report) -> None:
        """Take in a report."""
        for record in report.steps:
            if self._recent and record.time_ms - self._recent[-1].start_ms < _PIECE_MS:
                self._recent[-1].merge(StepSums.of(record))
            else:
                self._recent.append(StepSums.of(record))
            while record.time_ms - self._recent[0].time_ms > _RECENT_MS:
                self._recent.popleft()
        if report.validations:
            self.validation = report.validations[-1]

    @property
    def now(self) -> StepSums | None:
        """The steps of the last 5 s; None before the first one."""
        if not self._recent:
            return None
        first, *others = self._recent
        total = first.copy()
        for sums in others:
            total.merge(sums)
        return total

    @property
    def step(self) -> int:
        """Updates applied."""
        return self._recent[-1].step if self._recent else self.info.first_step

    @property
    def epoch(self) -> int:
        """The epoch under way, counted from 1."""
        started = self._recent[-1].epoch if self._recent else self.step // max(self.info.steps_per_epoch, 1)
        return min(started + 1, self.info.epochs)


def shares(sums: StepSums) -> dict[str, float]:
    """Where the time of the steps went: parts of 1, in the order of PARTS."""
    seconds = {part: getattr(sums, f"{part}_s") for part in PARTS}
    total = math.fsum(seconds.values())
    return {part: value / total if total > 0 else 0.0 for part, value in seconds.items()}


def samples_per_second(sums: StepSums) -> float:
    """Speed of the steps."""
    return sums.samples / sums.step_s if sums.step_s > 0 else 0.0


def remaining_s(standing: Standing) -> float | None:
    """Seconds to the last step at the present speed; None while that is not known."""
    now = standing.now
    if now is None:
        return None
    return max(standing.info.total_steps - standing.step, 0) * now.step_s / now.num_steps


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float) -> str:
    """A loss or metric, four digits."""
    return f"{value:.4g}"


def size(num_bytes: float) -> str:
    """Bytes as 512 B, 1.5 MB, 3.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def plural(count: int, noun: str, ending: str = "s") -> str:
    """`1 worker`, `2,000 workers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{ending}"


def headline(info: RunInfo) -> str:
    """The run in one line."""
    told = [
        plural(info.num_rows, "row"),
        f"{plural(info.steps_per_epoch, 'step')} an epoch",
        plural(info.epochs, "epoch"),
        plural(info.num_parameters, "parameter"),
        plural(info.num_workers, "worker"),
    ]
    if info.first_step:
        told.append(f"goes on after step {info.first_step:,}")
    return f"run {info.run_name}: " + ", ".join(told)


def metrics_line(metrics: Mapping[str, float]) -> str:
    """`loss 0.21, accuracy 0.953`, the loss first."""
    names = sorted(metrics, key=lambda name: (name != "loss", name))
    return ", ".join(f"{name} {number(metrics[name])}" for name in names)


def validation_line(record: ValidationRecord) -> str:
    """A validation in one line."""
    rows = plural(record.samples, "row")
    return f"validation after step {record.step:,}: {metrics_line(record.metrics)} ({rows}, {record.seconds:.1f} s)"


def event_line(event: Event) -> str:
    """An event in one line."""
    return f"step {event.step:,}: {event.kind}: {event.message}"
