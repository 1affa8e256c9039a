"""The driver. `Trainer.fit` reads as the story of a run."""

from __future__ import annotations

import json
import math
import os
import secrets
import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from distrain.actors import Restored, RunSpec, UpdateSpec
from distrain.checkpoint import (
    MODEL,
    Checkpoint,
    CheckpointStore,
    Snapshot,
    as_overrides,
    differences,
    find,
    follow_changes,
    has_checkpoints,
    is_superseded,
    load,
)
from distrain.checkpoint_writer import CheckpointWriter
from distrain.config import TrainConfig
from distrain.crew import MOVING, Crew, worker_threads
from distrain.data.plan import Plan
from distrain.devices import Arithmetic
from distrain.errors import (
    CheckpointError,
    CheckpointUnreadable,
    ConfigError,
    Interrupted,
    ServerLost,
    TrackingError,
    TrackingRefused,
    TrainingCheckpointError,
)
from distrain.final_model import log_model
from distrain.history import History
from distrain.jsonable import jsonable
from distrain.learning.overfitting import Look, overfitting
from distrain.learning.schedules import check_optimization, has_end
from distrain.monitoring import RunSeries
from distrain.placement import Cluster, Placement, submitted_job_id
from distrain.preparation import Preparation, check_own_code, prepare
from distrain.progress import Progress, RunInfo, SilentProgress
from distrain.records import Event, Report
from distrain.run_lock import is_trained, run_lock
from distrain.server.loop import LoopSettings, Outcome
from distrain.server.loss_scale import first_scale
from distrain.server.stopping import HIGHER_IS_BETTER, Stopping, best_metric
from distrain.signals import SIGNALS, STOP_WAIT, STOP_WAIT_S, StopSignals
from distrain.step_sums import StepSums
from distrain.storage import Mirror, Place, place
from distrain.tracking import DatasetDescription, RunDescription, Tracker, check_reachable, make_tracker
from distrain.worker import WorkerOptions


@dataclass(frozen=True)
class Result:
    """How a run ended. `status` is "finished", or "stopped" by a signal. A number that is not known is nan."""

    run_id: str | None  # MLflow's, None where tracking is off
    run_name: str
    status: str
    reason: str
    epochs: int
    steps: int
    samples: int
    samples_per_second: float
    train_loss: float
    validation: dict[str, float]
    parameters_sha256: str
    checkpoint: str | None
    rows_per_epoch: int
    worker_failures: int
    skipped_microbatches: int  # whose loss or gradient was not finite
    skipped_rows: int
    overfitting: str | None  # where validation turned while training went on
    warnings: tuple[str, ...]  # what is wrong with the training, by its layers
    peak_worker_bytes: int  # the most memory that a worker held; 0 where it is not known
    seconds: dict[str, float]  # startup (to the first step: nan where none was done), training, total

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-able values: what `--json` prints. What is not finite becomes null."""
        return jsonable(asdict(self))


class Trainer:
    """Runs one training on a Ray cluster: `Trainer(TrainConfig(...)).fit()`.

    `progress` shows the run to a person (default: nothing). `checkpoint` is where to go on from; without one, and with
    `resume: auto`, the last good one of the run of that name, if there is one. `began` is the Unix time in seconds from
    which the result counts (default: now); the command line gives its own start. `tags` are further ones of the MLflow
    run. Raises CheckpointError as `resume` does.
    """

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress | None = None,
        checkpoint: Checkpoint | None = None,
        began: float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        if config.restarts is not None:
            raise ConfigError("restarts are several runs: distrain train does them, or distrain.study.restarts")
        is_auto = checkpoint is None and config.resume == "auto"
        if is_auto and has_checkpoints(folder := place(config.checkpoint.dir) / (config.tracking.run_name or "")):
            checkpoint = load(find(folder).path)
        if checkpoint is not None and config.shards is None:
            config = config.changed([f"shards={checkpoint.manifest['config']['shards']}"])
        self.config = config
        self._tags = dict(tags or {})
        self._began = time.time() if began is None else began
        self._progress = progress or SilentProgress()
        self._checkpoint = checkpoint
        self._anyway = False  # resume although what decides the result has changed
        self._is_auto = is_auto
        self._is_branch = False  # goes on otherwise than the checkpoint's run did from there
        self._stop_reason: str | None = None
        self._step = checkpoint.manifest["step"] if checkpoint is not None else 0  # the furthest one told of
        self._validated_step = self._step
        self._samples = 0
        self._first_step_ms = 0  # Unix time of this run's first update
        self._written = checkpoint.path if checkpoint is not None else None  # the last checkpoint
        self._unwritten: CheckpointError | None = None  # why there is none of the step at which the run ended
        self._refused: TrackingRefused | None = None  # what MLflow's store said
        self._lost_at: float | None = None  # Unix seconds: a server died, and its steps are not all done again
        self._lost_servers = 0
        self._warnings: list[str] = []
        self._looks: list[Look] = []  # validations, for signs of overfitting
        self._since: StepSums | None = None  # the steps since the last one
        self._history: History | None = None
        self._mirrors: dict[str, Mirror] = {}  # local copies of files that are kept elsewhere, by name
        self._series: RunSeries | None = None  # for Prometheus, on a cluster that outlives the run
        self.run_name = self._run_name()
        if is_auto and checkpoint is not None:
            self._check_resumable(checkpoint, {})

    @classmethod
    def resume(
        cls,
        reference: str,
        overrides: Sequence[str] = (),
        progress: Progress | None = None,
        root: str = "checkpoints",
        began: float | None = None,
        anyway: bool = False,
    ) -> Trainer:
        """Go on from a checkpoint: a checkpoint's folder, a run's folder, its name, or its MLflow run id.

        Raises ConfigError for `overrides` that are wrong, CheckpointError when there is no checkpoint, it is damaged,
        or what decides the result has changed: data, or keys that `overrides` set. With `anyway` that is only said, and
        the epoch under way begins again; from a checkpoint that is not the run's last, it goes on as another run then,
        and the later ones stay.
        """
        found = find(reference, root)
        checkpoint = load(found.path)
        before = checkpoint.manifest["config"]
        config = TrainConfig.from_mapping(before, overrides, check_optimization)
        if keys := config.without_credentials:
            raise CheckpointError(
                f"a checkpoint does not hold passwords: {', '.join(keys)} had one. Give it again: {keys[0]}=..."
            )
        now = config.to_mapping()
        for section, key in (("checkpoint", "dir"), ("tracking", "run_name"), ("tracking", "experiment")):
            if now[section][key] != before[section][key]:
                raise CheckpointError(
                    f"{section}.{key}: {now[section][key]!r}, and a resumed run keeps its name, its folder and its "
                    f"place in MLflow. To go on elsewhere, copy {found.path.parent} there and resume the copy"
                )
        trainer = cls(config, progress, checkpoint, began)
        trainer._anyway = anyway
        trainer._check_resumable(checkpoint, {})
        return trainer

    def stop(self, reason: str = "asked to stop") -> None:
        """Finish the step in flight, write a checkpoint, and end. May be called from any thread."""
        self._stop_reason = reason

    def fit(self) -> Result:
        """Train, and return how it went.

        Raises ConfigError or DataError before anything starts, ClusterError or TrackingError where those are out of
        reach, TrainingError when the user's code fails, DivergenceError when the loss does, TrainingCheckpointError
        when the last checkpoint cannot be written, and Interrupted after a signal. These hold the `result`, where there
        is one.
        """
        try:
            with StopSignals(lambda: self.stop("stopped by a signal")) as signals:
                result = self._fit(signals)
            result = replace(result, seconds={**result.seconds, "total": time.time() - self._began})
            self._progress.finished(result)
        finally:
            self._progress.close()
        if signals.received is not None and result.status == "stopped":
            message = f"stopped after step {result.steps}; go on with: distrain resume {result.checkpoint}"
            if self._unwritten is not None:
                message = f"stopped after step {result.steps}: {self._way_on(self._unwritten)}"
            raise Interrupted(message, signals.received, result)
        error = self._refused if self._unwritten is None else TrainingCheckpointError(self._way_on(self._unwritten))
        if error is not None:
            error.result = result
            raise error
        return result

    def _fit(self, signals: StopSignals) -> Result:
        config = self.config
        self._progress.phase("reading footers")
        preparation = prepare(config)
        check_own_code(preparation)
        if self._checkpoint is not None:
            changed = self._check_resumable(self._checkpoint, preparation.fingerprints)
            for line in changed.values():
                self._progress.note(f"changed since the checkpoint: {line}")
            if changed:
                for line in follow_changes(self._checkpoint.manifest, changed):
                    self._progress.note(line)
                if is_superseded(self._checkpoint.path):
                    self._branch(self._checkpoint.path)
            self._note_other_bits(self._checkpoint)
            if (why := self._is_over(self._checkpoint)) is not None:
                self._progress.note(
                    f"the run is over: {why}. With another early_stopping, target or convergence it would train on"
                )
        with run_lock(self._folder):
            return self._run(preparation, signals)

    def _run(self, preparation: Preparation, signals: StopSignals) -> Result:
        config = self.config
        if config.tracking.enabled:
            check_reachable(config.tracking.uri)
        self._last_step = preparation.total_steps
        for line in preparation.warnings:
            self._progress.note(line)
        tracker = make_tracker(config.tracking, self._description(preparation), str(self._folder), self._progress.note)
        tracker.open()  # which takes as long as Ray does, and a core that Ray leaves idle
        self._progress.phase("starting Ray")
        try:
            cluster = Cluster(config.cluster.address, config.workers, config.cluster.wait_seconds)
        except BaseException as error:
            tracker.finish("KILLED" if isinstance(error, Interrupted) else "FAILED")
            raise
        try:
            tracker.start()
            status = "FAILED"
            try:
                result = self._train(preparation, cluster, tracker)
                status = "FINISHED" if result.status == "finished" else "KILLED"
            except _StoppedEarly as stopped:
                status = "KILLED"
                message = "stopped before the first step"
                if self._written is not None:
                    message = f"stopped while no server trained; go on with: distrain resume {self._written}"
                raise Interrupted(message, signals.received or SIGNALS[0]) from stopped
            except CheckpointError as error:
                if not self._first_step_ms:  # before training, what was given is at fault
                    raise
                raise TrainingCheckpointError(self._way_on(error)) from error
            finally:
                self._progress.phase("storing the run in MLflow" if config.tracking.enabled else "ending")
                tracker.finish(status)
                self._copy_history()
                for mirror in self._mirrors.values():
                    mirror.drop()
        finally:
            cluster.close()
        return result

    def _check_resumable(self, checkpoint: Checkpoint, fingerprints: dict[str, str | None]) -> dict[str, str]:
        """What decides the result and has changed, by key. Raises CheckpointError, unless told to go on anyway."""
        changed = differences(checkpoint.manifest, self.config.to_mapping(), fingerprints)
        if changed and not self._anyway:
            lines = "\n".join(f"  {line}" for line in changed.values())
            raise CheckpointError(
                f"the run cannot be resumed as it was, since this decides its result:\n{lines}\n{self._remedy(changed)}"
            )
        return changed

    def _remedy(self, changed: Collection[str]) -> str:
        """How to go on although these keys have changed."""
        if not self._is_auto:
            return "with --anyway it goes on from these weights, and begins the epoch under way again"
        settings = " ".join(shlex.quote(each) for each in as_overrides(self.config.to_mapping(), changed))
        return (
            f"resume: auto goes on with {self._folder}: give another tracking.run_name to begin a run, or go on from "
            f"these weights with: distrain resume {self._folder} {settings} --anyway"
        )

    def _branch(self, begins: Place) -> None:
        """Become a run of its own: the checkpoint's went on from there, and this one will not give the same bits."""
        assert self._checkpoint is not None
        self._is_branch = True
        self.run_name = self._run_name()
        self._checkpoint.manifest["state"]["stopping"]["top"] = None  # its folder has no best one yet
        self._progress.note(
            f"{begins.parent} holds later checkpoints, which stay: from {begins.name} on this is a run of its own, "
            f"{self.run_name}"
        )

    def _is_over(self, checkpoint: Checkpoint) -> str | None:
        """Why one of its rules has ended the run, where it has them still."""
        stopping = Stopping(self.config.early_stopping, self.config.convergence, self.config.target)
        stopping.load_state_dict(checkpoint.manifest["state"]["stopping"])
        return stopping.ended

    def _note_other_bits(self, checkpoint: Checkpoint) -> None:
        """Say where the weights will not be the same to the bit as those of the run without the break."""
        now = _what_bits_depend_on(self.config)
        for key, before in checkpoint.manifest["torch"].items():
            if before != now.get(key, before):
                name = key.replace("_", " ")
                self._progress.note(
                    f"torch's {name} is {now[key]}, and was {before} before the break: from here on the weights differ "
                    "in their last bits from those of a run without it"
                )

    def _train(self, preparation: Preparation, cluster: Cluster, tracker: Tracker) -> Result:
        self._progress.phase("starting workers")
        if submitted_job_id() is not None and STOP_WAIT not in os.environ:
            variables = json.dumps({"env_vars": {STOP_WAIT: str(STOP_WAIT_S)}})
            self._progress.note(
                f"{STOP_WAIT} is not set: Ray kills a stopped job after 3 s, perhaps before its checkpoint is there. "
                f"Submit with distrain submit, or with --runtime-env-json '{variables}'"
            )
        if cluster.resources.shared_cores:
            self._progress.note(
                f"{self.config.workers.count} workers share the {cluster.resources.there_cpus:g} cores of this machine"
            )
        if self.config.server.slices > 1 and self.config.diagnostics.every_steps is not None:
            self._progress.note("diagnostics: layers are not looked at, since server.slices is more than 1")
        placement = cluster.reserve(self._progress.note, lambda: self._stop_reason is not None)
        if placement is None:
            raise _StoppedEarly
        run = RunSpec(
            preparation.task,
            preparation.train,
            preparation.validation,
            secrets.token_hex(32),
            (os.getcwd(),),
            WorkerOptions(
                self.config.on_nonfinite == "skip", self.config.diagnostics.every_steps, self.config.server.wire_dtype
            ),
            Arithmetic(self.config.workers.precision, self.config.workers.deterministic),
        )
        if self.config.checkpoint.history:
            plan, server = preparation.train.plan, self.config.server
            path, whole = self._mirror("history.jsonl").path, server.mode == "sync" and server.quorum is None
            try:
                self._history = History(path, plan.num_shards, plan.steps_per_epoch, plan.num_rows, self._step, whole)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
        crew = Crew(
            placement,
            run,
            self._update_spec(placement, preparation.train.plan),
            self.config.workers,
            self._progress.note,
        )
        if not cluster.is_local:
            self._series = RunSeries(self.run_name)
        try:
            outcome = self._train_with(crew, preparation, tracker)
            peak_bytes = crew.peak_worker_bytes()
        finally:
            crew.close()
        return self._finish(outcome, crew.failures, peak_bytes, preparation, tracker)

    def _train_with(self, crew: Crew, preparation: Preparation, tracker: Tracker) -> Outcome:
        """Have the crew train to the end; when the server dies, again from the last good checkpoint."""
        restored = self._restored(self._checkpoint)
        is_started = False
        while True:
            try:
                crew.start(restored, self._spent_s)
                ready = crew.await_server(lambda: self._stop_reason is not None)
                if ready is None:
                    raise _StoppedEarly
                if not is_started:
                    is_started = True
                    self._progress.started(self._run_info(preparation, ready.num_parameters))
                writer = self._checkpoint_writer(preparation, crew, tracker)
                outcome = self._watch(crew, writer, tracker)
                if outcome.reason != MOVING or self._stop_reason is not None:
                    break
                if not crew.move():
                    raise _StoppedEarly
                restored = self._go_back("the parameter server's node is about to go", tracker)
            except ServerLost as lost:
                self._lost_servers += 1
                self._lost_at = self._lost_at or time.time()
                if not crew.dismiss(lost, self._step):
                    raise _StoppedEarly from lost
                restored = self._go_back(lost.message, tracker)
        self._unwritten = writer.last_error
        if self._unwritten is not None and outcome.status == "finished":
            raise self._unwritten
        return outcome

    def _way_on(self, error: CheckpointError) -> str:
        """What a run says that a checkpoint ended: why, and how to go on."""
        if self._written is None:
            return f"{error.message}; there is no other checkpoint: once that is mended, begin the run anew"
        return (
            f"{error.message}; once that is mended, go on from the last good checkpoint with: distrain resume "
            f"{self._written}"
        )

    @property
    def _spent_s(self) -> float:
        """Since the first step: what a server that takes over has less of max_seconds."""
        return time.time() - self._first_step_ms / 1000 if self._first_step_ms else 0.0

    def _watch(self, crew: Crew, writer: CheckpointWriter, tracker: Tracker) -> Outcome:
        """Have the crew train, and pass on what it reports, until the run is over."""
        crew.train()
        outcome = None
        try:
            while outcome is None:
                if self._stop_reason is None:
                    tracker.check()
                outcome = crew.watch(self._stop_reason)
                self._report(crew.report(), crew.failures, writer, tracker)
        finally:
            writer.close()
        if writer.lost is not None:  # and with the server the run's last snapshot
            raise writer.lost
        return outcome

    def _report(self, report: Report, failures: int, writer: CheckpointWriter, tracker: Tracker) -> None:
        """Pass on what the server said; steps that a server repeats, which took over from a dead one, were told of."""
        self._remember(lambda history: history.steps(report.steps))
        new = Report(
            [record for record in report.steps if record.step > self._step],
            [record for record in report.validations if record.step > self._validated_step],
            report.events,
        )
        if new.steps and self._lost_at is not None:
            seconds, self._lost_at = new.steps[0].time_ms / 1000 - self._lost_at, None
            message = f"the first new step was done {seconds:.2f} s after the parameter server was lost"
            new.events.append(Event(_now_ms(), "recovered", message, new.steps[0].step, seconds=seconds))
        for event in new.events:
            tracker.event(event)
            if event.kind == "warning" and event.message not in self._warnings:
                self._warnings.append(event.message)
        for record in new.steps:
            tracker.step(record)
            self._step = record.step
            self._samples += record.samples
            if self._since is None:
                self._since = StepSums.of(record)
            else:
                self._since.merge(StepSums.of(record))
            self._first_step_ms = self._first_step_ms or record.time_ms
        for validation in new.validations:
            tracker.validation(validation)
            self._validated_step = validation.step
            if self._since is not None:
                self._looks.append(Look(validation.step, self._since.loss, validation.metrics["loss"]))
                self._since = None
        if self._series is not None:
            self._series.record(new, failures)
        self._progress.report(new)
        writer.wake()

    def _remember(self, write: Callable[[History], None]) -> None:
        """Append to the history, if one is kept. A disk that is full ends it, and not the run."""
        if self._history is None:
            return
        try:
            write(self._history)
        except OSError as error:
            self._history = None
            self._progress.note(f"{self._folder / 'history.jsonl'} ends here: {error.strerror or error}")

    def _mirror(self, name: str) -> Mirror:
        """A file of the run's folder as one of this machine, until the run is over."""
        if name not in self._mirrors:
            self._mirrors[name] = Mirror(self._folder / name)
        return self._mirrors[name]

    def _copy_history(self) -> None:
        """Copy the history to the checkpoints, if one is kept and they are elsewhere."""
        if self._history is not None:
            self._remember(lambda _: self._mirror("history.jsonl").push())

    def _go_back(self, why: str, tracker: Tracker) -> Restored | None:
        """Where the next server goes on: the last good checkpoint, or where this run began."""
        last, damaged = self._last_good()
        checkpoint = self._checkpoint
        if last is not None and (checkpoint is None or last.path != checkpoint.path):
            checkpoint = last
        self._written = checkpoint.path if checkpoint is not None else None
        restored = self._restored(checkpoint)
        step = restored.step if restored is not None else 0
        message = f"{why}; going on from step {step}, {self._step - step} steps before the last one reported"
        self._remember(lambda history: history.restored(step, damaged))
        self._progress.note(message)
        tracker.event(Event(_now_ms(), "restored", message, step))
        return restored

    def _last_good(self) -> tuple[Checkpoint | None, int]:
        """The last good checkpoint, and how many later ones are damaged.

        Raises CheckpointUnreadable where that cannot be told for a minute: to begin anew would cost what they hold.
        """
        store, until, is_told = CheckpointStore(self._folder), time.monotonic() + _UNREADABLE_SECONDS, False
        while True:
            found = None
            try:
                found = store.latest()
                return (load(found.path), len(found.skipped)) if found is not None else (None, 0)
            except CheckpointUnreadable as error:
                if self._stop_reason is not None:
                    raise _StoppedEarly from error
                if time.monotonic() > until:
                    raise
                if not is_told:
                    self._progress.note(f"{error.message}; trying again for {_UNREADABLE_SECONDS:g} s")
                is_told = True
                time.sleep(1.0)
            except CheckpointError as error:
                if found is None:  # all are damaged, and not one between two looks at it
                    self._progress.note(error.message)
                    return None, store.count

    def _update_spec(self, placement: Placement, plan: Plan) -> UpdateSpec:
        config = self.config
        rows = -(-plan.batch_size // plan.num_shards)
        is_scaled = config.workers.precision == "fp16"
        loop = LoopSettings(
            epochs=config.epochs,
            max_steps=config.max_steps,
            max_s=config.max_seconds,
            checkpoint_every_steps=config.checkpoint.every_steps,
            checkpoint_every_s=config.checkpoint.every_seconds,
            validation_every_steps=config.validation.every_steps,
            early_stopping=config.early_stopping,
            convergence=config.convergence,
            target=config.target,
            num_workers=min(config.workers.count, len(placement.ranks)),
            min_workers=config.workers.min,
            worker_timeout_s=config.workers.timeout_seconds,
            asynchronous=config.server.mode == "async",
            staleness=config.server.staleness,
            quorum=config.server.quorum,
            max_skipped=config.max_skipped,
            look_every_steps=config.diagnostics.every_steps if config.server.slices == 1 else None,
            slices=config.server.slices,
        )
        return UpdateSpec(
            config.optimizer.scaled(plan.batch_size),
            config.schedule,
            config.clip,
            config.penalty,
            config.gradient_noise,
            config.averaging,
            config.server.delay_compensation,
            loop,
            config.server.threads,
            placement.workers_beside_server * config.workers.cpus,
            placement.spans_nodes or config.server.slices > 1,
            first_scale(min(rows, plan.forward_rows or rows)) if is_scaled else None,
            config.server.wire_dtype,
        )

    @staticmethod
    def _restored(found: Checkpoint | None) -> Restored | None:
        if found is None:
            return None
        return Restored(found.manifest["step"], found.model, found.optimizer, found.manifest["state"])

    def _run_name(self) -> str:
        """The run's name: its checkpoints' folder is called so."""
        name = str(self._checkpoint.manifest["run_name"]) if self._checkpoint is not None else None
        if name is not None and not self._is_branch:
            return name
        if self._is_auto and not self._is_branch:
            return str(self.config.tracking.run_name)  # by which the next attempt looks for this one's checkpoints
        name = name or self.config.tracking.run_name or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        unique, number = name, 2
        try:
            while (self._root / unique).exists() or is_trained(self._root / unique):
                unique, number = f"{name}-{number}", number + 1
        except OSError as error:
            raise CheckpointError(f"{self._root}: cannot be looked at: {error.strerror}") from error
        return unique

    def _checkpoint_writer(self, preparation: Preparation, crew: Crew, tracker: Tracker) -> CheckpointWriter:
        config, dataset = self.config, preparation.train.dataset
        metric = best_metric(config.early_stopping)
        store = CheckpointStore(self._folder, config.checkpoint.keep, metric, metric in HIGHER_IS_BETTER)

        def fields(snapshot: Snapshot) -> dict[str, Any]:
            return {
                "run_name": self.run_name,
                "mlflow_run_id": self._mlflow_run_id(tracker, snapshot.step),
                "tracking_uri": config.tracking.uri,
                "config": {**config.to_mapping(), "shards": preparation.train.plan.num_shards},
                "data": preparation.fingerprints,
                "features": list(dataset.columns.features),
                "labels": list(dataset.columns.labels),
                "num_features": preparation.task.num_features,
                "num_outputs": preparation.task.num_outputs,
                "image_shape": preparation.task.image_shape,
                "torch": _what_bits_depend_on(config),
            }

        def written(step: int, path: Place) -> None:
            self._written = path
            self._remember(lambda history: history.durable(step))
            self._copy_history()
            tracker.event(Event(_now_ms(), "checkpoint", f"checkpoint {path}", step))

        def failed(step: int | None, error: CheckpointError) -> None:
            tracker.event(Event(_now_ms(), "checkpoint", error.message, self._step if step is None else step))
            self._progress.note(f"no checkpoint{'' if step is None else f' of step {step}'}: {error.message}")

        return CheckpointWriter(store, crew.take_snapshot, fields, written, failed)

    def _mlflow_run_id(self, tracker: Tracker, step: int) -> str | None:
        """MLflow's id of the run. Checkpoints do not wait for MLflow to open, but the last one, from which a run goes
        on, does."""
        if tracker.run_id is None and (self._stop_reason is not None or step >= self._last_step):
            with suppress(TrackingError):  # said at the end of the run
                return tracker.wait_ready()
        return tracker.run_id

    def _logged_run_id(self, tracker: Tracker) -> str | None:
        """MLflow's id of the run, at its end. A store that did not open costs the run's points, not its result. That it
        refused the run is said once all else is done."""
        try:
            return tracker.wait_ready()
        except TrackingError as error:
            self._refused = error if isinstance(error, TrackingRefused) else None
            self._progress.note(f"the run is not in MLflow: {error.message}")
            return None

    @property
    def _folder(self) -> Place:
        """The run's checkpoints."""
        if self._checkpoint is not None and not self._is_branch:
            return self._checkpoint.path.parent
        return self._root / self.run_name

    @property
    def _root(self) -> Place:
        """Where this run's folder is, among others."""
        if self._checkpoint is not None:
            return self._checkpoint.path.absolute().parent.parent
        return place(self.config.checkpoint.dir)

    def _description(self, preparation: Preparation) -> RunDescription:
        config = self.config
        tags = {**self._tags, "distrain.checkpoints": str(self._folder.absolute())}
        if (job_id := submitted_job_id()) is not None:
            tags["distrain.ray_job_id"] = job_id
        resumed_run = None
        if self._checkpoint is not None:
            tags["distrain.resumed_from"] = str(self._checkpoint.path)
            resumed_run = None if self._is_branch else self._checkpoint.manifest["mlflow_run_id"]
        sources = [("training", preparation.train), ("validation", preparation.validation)]
        datasets = tuple(
            DatasetDescription(
                name=context,
                source=source.dataset.source,
                digest=source.dataset.fingerprint,
                num_rows=source.dataset.num_rows,
                columns=source.dataset.columns.types,
                context=context,
            )
            for context, source in sources
            if source is not None
        )
        return RunDescription(
            config_yaml=config.to_yaml(),
            config_sha256=config.sha256(),
            params={key: value for key, value in flat(config.to_mapping()).items() if key not in _NOT_PARAMS},
            tags=tags,
            datasets=datasets,
            run_name=self.run_name,
            resume_run_id=resumed_run,
            is_resumed=self._checkpoint is not None and not self._is_branch,
        )

    def _run_info(self, preparation: Preparation, num_parameters: int) -> RunInfo:
        config, plan = self.config, preparation.train.plan
        return RunInfo(
            run_name=self.run_name,
            total_steps=self._last_step,
            steps_per_epoch=preparation.updates_per_epoch,
            epochs=config.epochs,
            num_rows=plan.num_rows,
            batch_size=plan.batch_size,
            num_parameters=num_parameters,
            num_workers=config.workers.count,
            first_step=self._step,
            tracking_uri=config.tracking.uri if config.tracking.enabled else None,
            train_on=self._train_on(),
        )

    def _train_on(self) -> str:
        """The override with which a finished run goes on; none where its schedule would rise again, or has ended."""
        if has_end(self.config.schedule):
            return ""
        if self.config.max_steps == self._last_step:
            return f"max_steps={2 * self._last_step}"
        return f"epochs={2 * self.config.epochs}"

    def _finish(
        self, outcome: Outcome, failures: int, peak_bytes: int, preparation: Preparation, tracker: Tracker
    ) -> Result:
        """Log the model, and put the result together."""
        path = self._written
        if path is not None and outcome.status == "finished" and self.config.tracking.enabled:
            log_model(load(path), preparation, tracker, f"{self.run_name}: a microbatch")
            tracker.artifact_file(self._mirror(f"{path.name}/{MODEL}").path)
        tracker.tag("distrain.parameters_sha256", outcome.parameters_sha256)
        overfits = overfitting(self._looks)
        if overfits is not None:
            tracker.tag("distrain.overfitting", overfits)
        startup = self._first_step_ms / 1000 - self._began if self._first_step_ms else math.nan
        training = outcome.training_s
        if self._lost_servers and self._first_step_ms:  # their time counts too
            training = time.time() - self._first_step_ms / 1000
        return Result(
            run_id=self._logged_run_id(tracker),
            run_name=self.run_name,
            status=outcome.status,
            reason=outcome.reason,
            epochs=outcome.epoch,
            steps=outcome.step,
            samples=self._samples,
            samples_per_second=outcome.samples_per_second,
            train_loss=outcome.train_loss,
            validation=outcome.validation,
            parameters_sha256=outcome.parameters_sha256,
            checkpoint=str(path) if path is not None else None,
            rows_per_epoch=preparation.train.plan.num_rows,
            worker_failures=failures,
            peak_worker_bytes=peak_bytes,
            skipped_microbatches=outcome.skipped.microbatches,
            skipped_rows=outcome.skipped.rows,
            overfitting=overfits,
            warnings=tuple(self._warnings),
            seconds={"startup": startup, "training": training, "total": math.nan},
        )


_UNREADABLE_SECONDS = 60.0
_NOT_PARAMS = ("tracking.run_name", "checkpoint.dir")  # names, by which runs are not to be compared


class _StoppedEarly(Exception):
    """Asked to stop while no server trains."""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _what_bits_depend_on(config: TrainConfig) -> dict[str, Any]:
    """What of torch a gradient's bits depend on."""
    kinds = {"gpu" if config.workers.gpus_of(rank) else "cpu" for rank in range(config.workers.count)}
    return {
        "version": torch.__version__,
        "worker_threads": worker_threads(config.workers.cpus),
        "device": " and ".join(sorted(kinds)),
        "determinism": "on" if config.workers.deterministic else "off",
    }


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
