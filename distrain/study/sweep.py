"""A sweep: every point of a grid as a run of its own, under one parent run, side by side where there is room."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.config import TrainConfig, WorkersConfig
from distrain.config_file import setting
from distrain.errors import ConfigError, DistrainError, Interrupted, TrackingError
from distrain.placement import Cluster
from distrain.progress import SweepProgress
from distrain.signals import StopSignals
from distrain.study.grid import GridPoint, expand
from distrain.study.point import Point
from distrain.study.record import FILE, Study
from distrain.study.report import Report, publish
from distrain.study.watch import PointWatch
from distrain.tracking import ParentRun, RunDescription, check_reachable, open_parent
from distrain.trainer import Result, Trainer

_POLL_SECONDS = 0.5
_SERVER_CPUS = 1.0  # a point beside others needs its server's core as well


@dataclass(frozen=True, slots=True)
class Room:
    """What a cluster has for the points of a sweep. `may_share`: more workers than cores may share them. `may_grow`: it
    gets what `num_parallel` points need."""

    cpus: float
    gpus: float
    may_share: bool
    may_grow: bool

    def has_place(self, workers: WorkersConfig, others: Sequence[WorkersConfig], num_parallel: int | None) -> bool:
        """Whether a point may start beside those that run. Unless it was said how many may, they must not share cores,
        since each measures its speed."""
        if not others:
            return True
        together = [*others, workers]
        if self.may_grow and num_parallel is not None:
            return len(together) <= num_parallel
        cpus, gpus = sum(each.all_cpus for each in together), sum(each.all_gpus for each in together)
        if gpus > self.gpus:
            return False
        if num_parallel is None:
            return cpus + _SERVER_CPUS * len(together) <= self.cpus
        return len(together) <= num_parallel and (self.may_share or cpus <= self.cpus)


class Sweep:
    """Runs the points of a configuration's `sweep.grid`.

    A point that fails is marked, and the others go on. `name` is the folder, in checkpoint.dir, of everything that the
    sweep keeps; where it is there already, what is finished in it is not run again. `num_parallel` points run at a time
    (None: as many as the cluster has cores for). With `resumes`, the configuration's `resume: auto` holds for points
    that were begun: what they measure is then of their last part only.
    """

    def __init__(
        self,
        config: TrainConfig,
        name: str | None = None,
        progress: SweepProgress | None = None,
        num_parallel: int | None = None,
        resumes: bool = False,
    ) -> None:
        sweep = config.sweep
        if sweep is None:
            raise ConfigError(
                "there is nothing to sweep: give --grid key=value,value or the configuration's sweep.grid"
            )
        if "://" in config.checkpoint.dir:
            raise ConfigError(
                f"checkpoint.dir: sweeps and restarts keep their record and report in a local folder, not in "
                f"{config.checkpoint.dir}: give one, as in checkpoint.dir=checkpoints"
            )
        keyword = config.schedule.own_rate if config.schedule is not None else None
        if "optimizer.lr" in sweep.grid and keyword:
            raise ConfigError(f"the grid gives optimizer.lr, and the schedule has its own: sweep schedule.{keyword}")
        if config.tracking.registered_model_name is not None:
            raise ConfigError("tracking.registered_model_name: a sweep registers no model: leave the name out")
        if sweep.scale_lr != "none" and config.optimizer.scale_lr != "none":
            raise ConfigError("optimizer.scale_lr is set, and the sweep's scale_lr would replace it: leave one out")
        self._config, self._grid, self._scale_lr = config, sweep.grid, sweep.scale_lr
        self._resumes = resumes
        self._points = expand(sweep.grid, sweep.scale_lr, config.batch_size)
        self.name = name or f"sweep-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(config.checkpoint.dir, self.name)
        self._configs = self._point_configs()
        self._progress = progress or SweepProgress()
        self._num_parallel = num_parallel
        self._study = self._begun()
        self._trainers: dict[str, Trainer] = {}
        self._lock = threading.Lock()
        self._stopping = False

    def stop(self) -> None:
        """Stop the points under way, and begin no others. May be called from any thread."""
        self._stopping = True
        with self._lock:
            for trainer in self._trainers.values():
                trainer.stop("the sweep was stopped")

    def run(self) -> tuple[Study, Report]:
        """Run what is not finished yet. Returns all points and the report on them.

        Raises ClusterError or TrackingError where those are out of reach, Interrupted after a signal; what is finished
        is kept then.
        """
        tracking = self._config.tracking
        if tracking.enabled:
            check_reachable(tracking.uri)
        with StopSignals(self.stop) as signals:
            most = max(
                (config.workers for config in self._configs.values()),
                key=lambda workers: (workers.all_gpus, workers.all_cpus),
            )
            where, num_runs = self._config.cluster, self._num_parallel or 1
            cluster = Cluster(where.address, most, where.wait_seconds, num_runs)
            try:
                cores = float(os.cpu_count() or 1) if cluster.is_local else cluster.resources.there_cpus
                self._study.num_cores = cores
                room = Room(cores, cluster.resources.there_gpus, cluster.is_local, where.wait_seconds is not None)
                parent = open_parent(tracking, self._description())
                self._study.parent_run_id = parent.run_id
                self._study.save(self.folder)
                status = "FAILED"
                try:
                    self._run_all(parent, room)
                    status = "KILLED" if self._stopping else "FINISHED"
                finally:
                    report = publish(self._study, self.folder, parent)
                    parent.finish(status)
            finally:
                cluster.close()
        if signals.received is not None:
            raise Interrupted(f"stopped; what is finished is kept: go on with --name {self.name}", signals.received)
        return self._study, report

    def _point_configs(self) -> dict[str, TrainConfig]:
        """The configuration of each point, by name. Raises ConfigError with the problems of all."""
        configs, problems = {}, []
        for point in self._points:
            overrides = [
                *point.overrides,
                "sweep=null",
                setting("checkpoint.dir", str(self.folder)),
                setting("tracking.run_name", point.slug),
                *([] if self._resumes else ["resume=null"]),
            ]
            try:
                configs[point.name] = self._config.changed(overrides)
            except ConfigError as error:
                problems += [f"{point.name}: {line}" for line in error.message.splitlines()]
        if problems:
            raise ConfigError("\n".join(problems))
        return configs

    def _begun(self) -> Study:
        """The study as an earlier sweep of this name left it, or a new one."""
        config = self._config.to_mapping()
        if not (self.folder / FILE).exists():
            return Study(self.name, config, self._grid, self._scale_lr, 0.0)
        before = Study.load(self.folder)
        ignored = ("cluster", "tracking")
        changed = [key for key in config if key not in ignored and config[key] != before.config.get(key)]
        if changed:
            raise ConfigError(
                f"the sweep {self.name!r} in {self.folder} was begun with another {', '.join(changed)}; give another "
                "--name, or the same configuration to go on"
            )
        return before

    def _description(self) -> RunDescription:
        return RunDescription(
            config_yaml=self._config.to_yaml(),
            config_sha256=self._config.sha256(),
            params={f"grid.{key}": values for key, values in self._grid.items()} | {"scale_lr": self._scale_lr},
            tags={"distrain.sweep": str(self.folder.absolute())},
            run_name=self.name,
            resume_run_id=self._study.parent_run_id,
        )

    def _run_all(self, parent: ParentRun, room: Room) -> None:
        waiting = deque(point for point in self._points if self._study.finished(point.name) is None)
        self._progress.began(self.name, len(self._points), len(self._points) - len(waiting))
        running: dict[Future[Point], WorkersConfig] = {}
        with ThreadPoolExecutor(self._num_parallel or len(self._points)) as pool:
            while (waiting and not self._stopping) or running:
                while waiting and not self._stopping:
                    workers = self._configs[waiting[0].name].workers
                    if not room.has_place(workers, list(running.values()), self._num_parallel):
                        break
                    running[pool.submit(self._run_point, waiting.popleft(), parent.run_id)] = workers
                for future in wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    self._ended(future.result(), parent)

    def _run_point(self, point: GridPoint, parent_run_id: str | None) -> Point:
        """One run, on a thread of its own."""
        config = self._configs[point.name]
        tags = {"distrain.sweep_point": point.name}
        if parent_run_id is not None:
            tags["mlflow.parentRunId"] = parent_run_id
        watch = PointWatch(lambda text: self._progress.note(point.name, text), config.target)
        self._progress.point_began(point.name)
        run_name = ""
        try:
            trainer = Trainer(config, watch, tags=tags)
            run_name = trainer.run_name
            with self._lock:
                self._trainers[point.name] = trainer
                if self._stopping:
                    trainer.stop("the sweep was stopped")
            result = trainer.fit()
        except Interrupted as stopped:
            return Point(point.name, point.values, "stopped", stopped.message, run_name)
        except DistrainError as error:
            return Point(point.name, point.values, "failed", error.message, run_name)
        except Exception as error:  # of the user's own model or loss
            return Point(point.name, point.values, "failed", f"{type(error).__name__}: {error}", run_name)
        finally:
            with self._lock:
                self._trainers.pop(point.name, None)
        return _point(point, config, result, watch)

    def _ended(self, point: Point, parent: ParentRun) -> None:
        self._study.put(point)
        self._study.save(self.folder)
        self._progress.point_ended(point)
        if point.run_id is not None and point.is_finished:
            try:
                parent.child(point.run_id, _params(point, self._configs[point.name]), final_scalars(point))
            except TrackingError as error:
                self._progress.note(point.name, error.message)


def final_scalars(point: Point) -> dict[str, float]:
    """What a point comes to, as single values."""
    values = {
        "final/samples_per_sec": point.samples_per_second,
        "final/train_loss": point.train_loss,
        "final/seconds": point.seconds,
        "final/step_sec": point.step_s,
        "final/worker_peak_bytes": float(point.peak_worker_bytes),
        **{f"final/val_{name}": value for name, value in point.validation.items()},
    }
    if point.target is not None:
        values["target/steps"], values["target/samples"] = float(point.target.step), float(point.target.samples)
        values["target/seconds"] = point.target.seconds
        values["target/worker_seconds"] = point.target.seconds * point.workers
    return values


def _params(point: Point, config: TrainConfig) -> dict[str, Any]:
    return {
        "batch_size": point.batch_size,
        "workers": point.workers,
        "mode": config.server.mode,
        "staleness": config.server.staleness,
    }


def _point(point: GridPoint, config: TrainConfig, result: Result, watch: PointWatch) -> Point:
    """What was measured."""
    return Point(
        name=point.name,
        values=point.values,
        status=result.status,
        reason=result.reason,
        run_name=result.run_name,
        run_id=result.run_id,
        batch_size=watch.info.batch_size if watch.info is not None else 0,
        workers=config.workers.count,
        shards=config.resolved_shards,
        num_bytes=4 * watch.info.num_parameters if watch.info is not None else 0,
        steps=result.steps,
        samples=result.samples,
        samples_per_second=result.samples_per_second,
        train_loss=result.train_loss,
        validation=result.validation,
        parameters_sha256=result.parameters_sha256,
        seconds=result.seconds["training"],
        noise_scale=watch.noise_scale,
        peak_worker_bytes=result.peak_worker_bytes,
        target=watch.reached,
        moments=watch.moments,
        losses=watch.losses(),
        blocks=watch.blocks(),
        result=result.to_json(),
    )
