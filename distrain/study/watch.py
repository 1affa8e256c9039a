"""Watches one point's run and keeps what the study needs of it, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

from distrain.config import TargetConfig
from distrain.progress import RunInfo, SilentProgress
from distrain.records import Report
from distrain.server.stopping import reached
from distrain.step_sums import StepSums
from distrain.study.point import PARTS, Moment, Target

_MOST_GROUPS = 400  # of consecutive steps
_MOST_BLOCKS = 20  # of which a step's mean time and its error are taken


class PointWatch(SilentProgress):
    """Takes a run's reports in. `note` gets what a person should know."""

    def __init__(self, note: Callable[[str], None], target: TargetConfig | None = None) -> None:
        self._note, self._target = note, target
        self.info: RunInfo | None = None
        self.moments: list[Moment] = []
        self.reached: Target | None = None
        self.noise_scale: float | None = None  # of the whole run
        self._groups: list[StepSums] = []
        self._stride = 1  # steps in a group
        self._now = (0, 0, 0.0)  # step, samples, seconds

    def started(self, info: RunInfo) -> None:
        self.info = info

    def note(self, message: str) -> None:
        self._note(message)

    def report(self, report: Report) -> None:
        places = {self._now[0]: self._now}
        for record in report.steps:
            _, samples, seconds = self._now
            self._now = places[record.step] = (record.step, samples + record.samples, seconds + record.step_s)
            self._add(StepSums.of(record))
            self.noise_scale = record.critical_batch_size
        for validation in report.validations:
            step, samples, seconds = places.get(validation.step, self._now)
            if self._target is not None and self.reached is None and reached(self._target, validation.metrics):
                before = self.moments[-1].seconds if self.moments else 0.0
                self.reached = Target(step, samples, seconds, before)
            self.moments.append(Moment(step, samples, seconds, dict(validation.metrics)))

    def losses(self) -> list[tuple[int, int, float, float]]:
        """(step, samples, seconds, mean training loss) at the end of each group of steps."""
        found, samples, seconds = [], 0, 0.0
        for group in self._groups:
            samples, seconds = samples + group.samples, seconds + group.step_s
            found.append((group.step, samples, seconds, group.loss))
        return found

    def blocks(self) -> list[tuple[float, ...]]:
        """Mean seconds of a step's parts over stretches of equally many steps. The first one tenth of the run, in which
        caches and threads warm up, is left out."""
        groups = self._groups[len(self._groups) // 10 :]
        whole = [group for group in groups if group.num_steps == self._stride] or groups
        size = max(1, -(-len(whole) // _MOST_BLOCKS))
        blocks: list[tuple[float, ...]] = []
        for first in range(0, len(whole), size):
            total = whole[first].copy()
            for group in whole[first + 1 : first + size]:
                total.merge(group)
            if total.num_steps == size * self._stride or not blocks:
                blocks.append(tuple(getattr(total, f"{part}_s") / total.num_steps for part in PARTS))
        return blocks

    def _add(self, step: StepSums) -> None:
        if self._groups and self._groups[-1].num_steps < self._stride:
            self._groups[-1].merge(step)
            return
        if len(self._groups) == _MOST_GROUPS:
            for first, second in zip(self._groups[::2], self._groups[1::2], strict=True):
                first.merge(second)
            self._groups, self._stride = self._groups[::2], 2 * self._stride
        self._groups.append(step)
