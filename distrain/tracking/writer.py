"""What the tracker's thread does: takes from the inbox, gives to the store, spools while the store is away."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from distrain.figures import loss_curve, staleness_histogram
from distrain.tracking.inbox import Inbox, Job
from distrain.tracking.spool import Spool
from distrain.tracking.store import MlflowRun, first_line, is_permanent, is_refused
from distrain.tracking.thinning import Point

if TYPE_CHECKING:
    from distrain.tracking.system import SystemMetrics

_RETRY_S = 15.0  # between attempts to reach a store that went away
_EVENTS_S = 30.0  # between writings of events.txt


class Writer:
    """Brings one inbox into one run. Not thread-safe, and none of its methods raises for a store that is away.

    `resumed`: the run has points already; those of steps that it has are not stored again. `system` watches the machine
    beside it, if it is to.
    """

    def __init__(
        self,
        run: MlflowRun,
        inbox: Inbox,
        spool: Spool,
        notify: Callable[[str], None],
        resumed: bool,
        system: SystemMetrics | None = None,
    ) -> None:
        self._run, self._inbox, self._spool, self._notify, self._system = run, inbox, spool, notify, system
        self._jobs: list[Job] = []
        self._event_text, self._has_unwritten_events, self._events_at = "", False, 0.0
        self._refused = 0  # pushes
        self._refused_keys: set[str] = set()  # which MLflow does not take
        self._is_away, self._retry_at = False, 0.0
        self._last_step = self._last_validation = 0
        if resumed:
            self._spool.deliver(self._log)  # of a process before this one
            self._last_step, self._last_validation = run.last_step("train/loss"), run.last_step("val/loss")
            self._event_text = run.read_text("events.txt")
        self._step = self._last_step  # of which there are points

    def deliver(self, finish: bool = False) -> None:
        """One round: points, jobs, events. With `finish` the last one, which tries even when the store was away."""
        points = self._inbox.take_points(self._last_step, self._last_validation, finish)
        self._jobs += self._inbox.take_jobs()
        self._step = max([self._step, *(point.step for point in points)])
        points += self._take_events()
        if self._system is not None:
            points += self._system.take(self._step, at_once=finish)
        if self._is_away and not finish and time.monotonic() < self._retry_at:
            self._keep(points)
            return
        try:
            self._send(points)
            self._do_jobs()
            self._write_events(finish)
        except Exception as error:  # MLflow, its database driver and its file systems raise what they like
            self._went_away(error)
        else:
            self._came_back()

    def end(self, status: str) -> bool:
        """Deliver what is left and set the run's status. Returns whether all was delivered; says what was not."""
        self._jobs += [*self._inbox.take_jobs(), Job("loss_curve.png", _log_loss_curve)]
        staleness = self._inbox.staleness()
        if any(staleness):
            figure = staleness_histogram(staleness)
            self._jobs.append(Job("staleness.png", lambda run: run.log_figure("staleness.png", figure)))
        self.deliver(finish=True)
        if not self._is_away:
            try:
                self._run.terminate(status)
                return True
            except Exception as error:
                self._went_away(error)
        left = [job.what for job in self._jobs]
        if self._spool:
            left.insert(0, f"{len(self._spool)} points, which wait in {self._spool.path} for the run to be resumed")
        self._notify(f"MLflow does not have the status of run {self._run.run_id} ({status}), nor: " + ", ".join(left))
        return False

    def _send(self, points: list[Point]) -> None:
        """Store points, behind those that wait. Raises when the store is away; all wait then."""
        if self._spool:
            self._keep(points)
            self._spool.deliver(self._log)
            return
        try:
            self._log(points)
        except Exception:
            self._keep(points)
            raise

    def _log(self, points: list[Point]) -> None:
        """Store points. One that the store finds fault with costs no other."""
        try:
            self._run.log_points(points)
        except Exception as error:
            if not is_refused(error) or not points or not self._run.is_active:
                raise  # MLflow says the same of a run that was deleted, and may be restored
            if len(points) > 1:
                middle = len(points) // 2
                self._log(points[:middle])
                self._log(points[middle:])
            elif points[0].key not in self._refused_keys:
                self._refused_keys.add(points[0].key)
                self._notify(f"MLflow did not take {points[0].key}: {first_line(error)}")

    def _keep(self, points: list[Point]) -> None:
        try:
            self._spool.append(points)
        except OSError as error:
            self._notify(f"{len(points)} points for MLflow are lost: {error}")

    def _do_jobs(self) -> None:
        while self._jobs:
            job = self._jobs[0]
            try:
                job.do(self._run)
            except Exception as error:
                if not is_permanent(error):
                    raise
                self._notify(f"MLflow did not take {job.what}: {first_line(error)}")
            self._jobs.pop(0)

    def _take_events(self) -> list[Point]:
        """Add events to the text; those with a duration are points too."""
        points = []
        for event in self._inbox.take_events():
            at = datetime.fromtimestamp(event.time_ms / 1000, UTC).isoformat(timespec="milliseconds")
            self._event_text += f"{at} step {event.step} {event.kind}: {event.message}\n"
            self._has_unwritten_events = True
            if event.kind == "refused":
                self._refused += 1
                points.append(Point("ps/refused", self._refused, event.time_ms, event.step))
            if event.seconds is not None:
                points.append(Point("time/recovery_sec", event.seconds, event.time_ms, event.step))
        return points

    def _write_events(self, at_once: bool) -> None:
        if self._has_unwritten_events and (at_once or time.monotonic() >= self._events_at):
            self._run.log_text("events.txt", self._event_text)
            self._has_unwritten_events, self._events_at = False, time.monotonic() + _EVENTS_S

    def _went_away(self, error: Exception) -> None:
        if not self._is_away:
            self._notify(f"MLflow's store is away ({first_line(error)}); points wait in {self._spool.path}")
        self._is_away, self._retry_at = True, time.monotonic() + _RETRY_S

    def _came_back(self) -> None:
        if self._is_away:
            self._notify("MLflow's store is back, and what waited is delivered")
        self._is_away = False


def _log_loss_curve(run: MlflowRun) -> None:
    training, validation = run.history("train/loss"), run.history("val/loss")
    if training[0]:
        run.log_figure("loss_curve.png", loss_curve(training, validation))
