"""The driver. `Trainer.fit` reads as the story of a run."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from distrain.actors import Ready, Restored, RunSpec, ServerActor, UpdateSpec, WorkerActor, worker_failure
from distrain.checkpoint import MODEL, Checkpoint, CheckpointStore, Snapshot, check_resumable, find, load
from distrain.checkpoint_writer import CheckpointWriter
from distrain.config import TrainConfig
from distrain.errors import CheckpointError, ClusterError, DistrainError, Interrupted, TrackingError, TrainingError
from distrain.learning.model_state import restore_model
from distrain.learning.task import build_task
from distrain.placement import Cluster, Placement
from distrain.preparation import Preparation, prepare
from distrain.progress import Progress, RunInfo, SilentProgress
from distrain.records import Event, Report
from distrain.server.loop import LoopSettings, Outcome
from distrain.server.stopping import HIGHER_IS_BETTER
from distrain.signals import SIGNALS, StopSignals
from distrain.supervision import Fail, GiveUp, Replace, Supervision
from distrain.tracking import DatasetDescription, ModelInput, RunDescription, Tracker, check_reachable, make_tracker

_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Result:
    """How a run ended. `status` is "finished", or "stopped" by a signal."""

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
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-able values: what `--json` prints."""
        values = asdict(self)
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


class Trainer:
    """Runs one training on a Ray cluster: `Trainer(TrainConfig(...)).fit()`.

    `progress` shows the run to a person (default: nothing). `checkpoint` is where to go on from. `began` is the Unix
    time in seconds from which the result counts (default: now); the command line gives its own start.
    """

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress | None = None,
        checkpoint: Checkpoint | None = None,
        began: float | None = None,
    ) -> None:
        self.config = config
        self._began = time.time() if began is None else began
        self._progress = progress or SilentProgress()
        self._checkpoint = checkpoint
        self._stop_reason: str | None = None
        self._worker_refs: dict[Any, int] = {}  # the call under way on each worker -> its rank
        self._workers: dict[int, Any] = {}
        self._due: list[tuple[float, int]] = []  # replacements: (monotonic seconds, rank)
        self._supervision = Supervision(config.workers.count, config.workers.min)
        self._step = checkpoint.manifest["step"] if checkpoint is not None else 0
        self.run_name = self._run_name()

    @classmethod
    def resume(
        cls,
        reference: str,
        overrides: Sequence[str] = (),
        progress: Progress | None = None,
        root: str = "checkpoints",
        began: float | None = None,
    ) -> Trainer:
        """Go on from a checkpoint: a checkpoint's folder, a run's folder, its name, or its MLflow run id.

        Raises CheckpointError when there is none, it is damaged, or `overrides` change what decides the result.
        """
        found = find(reference, root)
        checkpoint = load(found.path)
        before = checkpoint.manifest["config"]
        config = TrainConfig.from_mapping(before, overrides)
        check_resumable(checkpoint.manifest, config.to_mapping(), {})
        return cls(config, progress, checkpoint, began)

    def stop(self, reason: str = "asked to stop") -> None:
        """Finish the step in flight, write a checkpoint, and end. May be called from any thread."""
        self._stop_reason = reason

    def fit(self) -> Result:
        """Train, and return how it went.

        Raises ConfigError or DataError before anything starts, ClusterError or TrackingError where those are out of
        reach, TrainingError when the user's code fails, DivergenceError when the loss does, and Interrupted after a
        signal, with a checkpoint written.
        """
        try:
            with StopSignals(lambda: self.stop("stopped by a signal")) as signals:
                result = self._fit(signals)
            result = replace(result, seconds={**result.seconds, "total": time.time() - self._began})
            self._progress.finished(result)
        finally:
            self._progress.close()
        if signals.received is not None and result.status == "stopped":
            raise Interrupted(
                f"stopped after step {result.steps}; go on with: distrain resume {result.checkpoint}", signals.received
            )
        return result

    def _fit(self, signals: StopSignals) -> Result:
        config = self.config
        self._progress.phase("reading footers")
        preparation = prepare(config)
        if self._checkpoint is not None:
            check_resumable(self._checkpoint.manifest, config.to_mapping(), preparation.fingerprints)
        if config.tracking.enabled:
            check_reachable(config.tracking.uri)
        steps = config.epochs * preparation.train.plan.steps_per_epoch
        self._last_step = min(steps, config.max_steps) if config.max_steps is not None else steps
        self._progress.phase("starting Ray")
        cluster = Cluster(config.cluster.address, config.workers.count, config.workers.cpus)
        signals.install()  # Ray has installed its own
        try:
            tracker = make_tracker(
                config.tracking, self._description(preparation, cluster), self._folder, self._progress.note
            )
            tracker.start()
            status = "FAILED"
            try:
                result = self._train(preparation, cluster, tracker)
                status = "FINISHED" if result.status == "finished" else "KILLED"
            except _StoppedEarly as stopped:
                status = "KILLED"
                raise Interrupted("stopped before the first step", signals.received or SIGNALS[0]) from stopped
            finally:
                self._progress.phase("storing the run in MLflow" if config.tracking.enabled else "ending")
                tracker.finish(status)
        finally:
            cluster.close()
        return result

    def _train(self, preparation: Preparation, cluster: Cluster, tracker: Tracker) -> Result:
        self._progress.phase("starting workers")
        if cluster.resources.shared_cores:
            self._progress.note(
                f"{self.config.workers.count} workers share the {cluster.resources.there_cpus:g} cores of this machine"
            )
        placement = cluster.reserve()
        run = RunSpec(
            preparation.task, preparation.train, preparation.validation, secrets.token_hex(32), (os.getcwd(),)
        )
        server = ray.remote(ServerActor).options(
            num_cpus=0, max_concurrency=4, max_restarts=0, scheduling_strategy=placement.for_server()
        ).remote()  # fmt: skip
        ready = server.prepare.remote(run, self._update_spec(placement), self._restored())
        start = _WorkerStarter(placement, run, ready, self.config.workers.cpus)
        for rank in range(self.config.workers.count):
            self._start_worker(rank, start)
        num_parameters = self._await_server(ready).num_parameters
        self._progress.started(self._run_info(preparation, num_parameters))
        writer = self._checkpoint_writer(preparation, server, tracker)
        running = server.run.remote()
        try:
            outcome = self._supervise(server, running, start, writer, tracker)
        finally:
            writer.close()
        self._report(_get(server.poll.remote()), writer, tracker)
        if writer.last_error is not None:
            raise writer.last_error
        return self._finish(outcome, preparation, writer, tracker)

    def _supervise(
        self, server: Any, running: Any, start: _WorkerStarter, writer: CheckpointWriter, tracker: Tracker
    ) -> Outcome:
        """Watch over server and workers until the run is over. No Ray call belongs to a step."""
        stop_sent = False
        while True:
            done, _ = ray.wait([running, *self._worker_refs], timeout=_POLL_SECONDS)
            if running in done:
                return _get(running)
            if self._stop_reason is not None and not stop_sent:
                server.stop.remote(self._stop_reason)
                stop_sent = True
            self._report(_get(server.poll.remote()), writer, tracker)
            for ref in done:
                self._worker_ended(ref, server, running)
            now = time.monotonic()
            for due in [due for due in self._due if due[0] <= now]:
                self._due.remove(due)
                self._start_worker(due[1], start)

    def _start_worker(self, rank: int, start: _WorkerStarter) -> None:
        self._workers[rank], ref = start(rank)
        self._worker_refs[ref] = rank

    def _worker_ended(self, ref: Any, server: Any, running: Any) -> None:
        """Decide what follows on a worker's end, and do it."""
        rank = self._worker_refs.pop(ref)
        try:
            ray.get(ref)
            return  # told to stop: the run is over
        except RayTaskError as error:
            cause: Exception = error.cause
            if isinstance(cause, DistrainError) and ray.wait([running], timeout=1.0)[0]:
                return  # it told the server, which ends the run
        except RayActorError as error:
            cause = error
        decision = self._supervision.ended(rank, worker_failure(cause), self._step)
        match decision:
            case Replace(after_s=after_s):
                self._due.append((time.monotonic() + after_s, rank))
            case GiveUp(message=message):
                self._progress.note(message)
            case Fail(message=message):
                server.abort.remote(TrainingError(message))

    def _report(self, report: Report, writer: CheckpointWriter, tracker: Tracker) -> None:
        """Pass on what the server said."""
        if report.steps:
            self._step = report.steps[-1].step
        for event in report.events:
            if event.kind == "joined":
                self._supervision.joined(event.rank, event.step)
            elif event.kind == "lost" and event.rank in self._workers:
                ray.kill(self._workers[event.rank])  # it may only hang; a dead one does not mind
            tracker.event(event)
        for record in report.steps:
            tracker.step(record)
        for validation in report.validations:
            tracker.validation(validation)
        self._progress.report(report)
        writer.wake()

    def _await_server(self, ready: Any) -> Ready:
        """The server has built the model, or says what is wrong with it."""
        while not ray.wait([ready], timeout=_POLL_SECONDS)[0]:
            if self._stop_reason is not None:
                raise _StoppedEarly
        return _get(ready)

    def _update_spec(self, placement: Placement) -> UpdateSpec:
        config = self.config
        loop = LoopSettings(
            epochs=config.epochs,
            max_steps=config.max_steps,
            checkpoint_every_steps=config.checkpoint.every_steps,
            validation_every_steps=config.validation.every_steps,
            early_stopping=config.early_stopping,
            convergence=config.convergence,
            num_workers=config.workers.count,
            min_workers=config.workers.min,
            worker_timeout_s=config.workers.timeout_seconds,
        )
        return UpdateSpec(
            config.optimizer,
            config.schedule,
            config.clip,
            loop,
            config.server.threads,
            placement.workers_beside_server * config.workers.cpus,
            placement.spans_nodes,
        )

    def _restored(self) -> Restored | None:
        found = self._checkpoint
        if found is None:
            return None
        return Restored(found.manifest["step"], found.model, found.optimizer, found.manifest["state"])

    def _run_name(self) -> str:
        """The run's name: its checkpoints' folder is called so."""
        if self._checkpoint is not None:
            return str(self._checkpoint.manifest["run_name"])
        name = self.config.tracking.run_name or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        unique, number = name, 2
        while Path(self.config.checkpoint.dir, unique).exists():
            unique, number = f"{name}-{number}", number + 1
        return unique

    def _checkpoint_writer(self, preparation: Preparation, server: Any, tracker: Tracker) -> CheckpointWriter:
        config, dataset = self.config, preparation.train.dataset
        metric = config.early_stopping.metric if config.early_stopping is not None else "loss"
        store = CheckpointStore(self._folder, config.checkpoint.keep, metric, metric in HIGHER_IS_BETTER)
        steps_per_epoch = preparation.train.plan.steps_per_epoch

        def fields(snapshot: Snapshot) -> dict[str, Any]:
            return {
                "run_name": self.run_name,
                "mlflow_run_id": self._mlflow_run_id(tracker, snapshot.step),
                "tracking_uri": config.tracking.uri,
                "step_in_epoch": snapshot.step % steps_per_epoch,
                "epoch_finished": snapshot.step % steps_per_epoch == 0,
                "config": {**config.to_mapping(), "shards": preparation.train.plan.num_shards},
                "data": preparation.fingerprints,
                "features": list(dataset.columns.features),
                "labels": list(dataset.columns.labels),
                "num_features": preparation.task.num_features,
                "num_outputs": preparation.task.num_outputs,
                "torch": {"version": torch.__version__, "worker_threads": worker_threads(config.workers.cpus)},
            }

        def written(step: int, path: Path) -> None:
            tracker.event(Event(_now_ms(), "checkpoint", f"checkpoint {path}", step))

        def failed(step: int, error: CheckpointError) -> None:
            tracker.event(Event(_now_ms(), "checkpoint", error.message, step))
            self._progress.note(f"no checkpoint of step {step}: {error.message}")

        return CheckpointWriter(store, lambda: _get(server.take_snapshot.remote()), fields, written, failed)

    def _mlflow_run_id(self, tracker: Tracker, step: int) -> str | None:
        """MLflow's id of the run. Checkpoints do not wait for MLflow to open, but the last one, from which a run goes
        on, does."""
        if tracker.run_id is None and (self._stop_reason is not None or step >= self._last_step):
            with suppress(TrackingError):  # said at the end of the run
                return tracker.wait_ready()
        return tracker.run_id

    @property
    def _folder(self) -> Path:
        """The run's checkpoints."""
        if self._checkpoint is not None:
            return self._checkpoint.path.parent
        return Path(self.config.checkpoint.dir, self.run_name)

    def _description(self, preparation: Preparation, cluster: Cluster) -> RunDescription:
        config = self.config
        tags = {"distrain.checkpoints": str(self._folder.absolute())}
        if cluster.job_id is not None:
            tags["distrain.ray_job_id"] = cluster.job_id
        resumed_run = None
        if self._checkpoint is not None:
            tags["distrain.resumed_from"] = str(self._checkpoint.path)
            resumed_run = self._checkpoint.manifest["mlflow_run_id"]
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
            params=flat(config.to_mapping()),
            tags=tags,
            datasets=datasets,
            run_name=self.run_name,
            resume_run_id=resumed_run,
        )

    def _run_info(self, preparation: Preparation, num_parameters: int) -> RunInfo:
        config, plan = self.config, preparation.train.plan
        return RunInfo(
            run_name=self.run_name,
            total_steps=self._last_step,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=config.epochs,
            num_rows=plan.num_rows,
            batch_size=config.batch_size,
            num_parameters=num_parameters,
            num_workers=config.workers.count,
            first_step=self._step,
            tracking_uri=config.tracking.uri if config.tracking.enabled else None,
        )

    def _finish(self, outcome: Outcome, preparation: Preparation, writer: CheckpointWriter, tracker: Tracker) -> Result:
        """Log the model, and put the result together."""
        path = writer.last or (self._checkpoint.path if self._checkpoint is not None else None)
        if path is not None and outcome.status == "finished" and self.config.tracking.enabled:
            self._log_model(load(path), preparation, tracker)
        startup = outcome.first_step_ms / 1000 - self._began if outcome.first_step_ms else math.nan
        return Result(
            run_id=tracker.wait_ready(),
            run_name=self.run_name,
            status=outcome.status,
            reason=outcome.reason,
            epochs=outcome.epoch,
            steps=outcome.step,
            samples=outcome.samples,
            samples_per_second=outcome.samples_per_second,
            train_loss=outcome.train_loss,
            validation=outcome.validation,
            parameters_sha256=outcome.parameters_sha256,
            checkpoint=str(path) if path is not None else None,
            rows_per_epoch=preparation.train.plan.num_rows,
            worker_failures=self._supervision.failures,
            seconds={"startup": startup, "training": outcome.training_s, "total": math.nan},
        )

    def _log_model(self, checkpoint: Checkpoint, preparation: Preparation, tracker: Tracker) -> None:
        """Hand the final model to MLflow, with an example of its input."""
        model = build_task(preparation.task).model
        restore_model(model, checkpoint.model)
        dataset = preparation.train.dataset
        group = next(number for number, rows in enumerate(dataset.row_counts) if rows)
        rows = next(dataset.read(group, 0, min(2, dataset.row_counts[group])))
        kinds = dict(dataset.columns.types)
        inputs = [
            ModelInput(
                name, tensor, tuple((c, kinds[c]) for c in dataset.columns.features) if name == "features" else ()
            )
            for name, tensor in rows.items()
            if name != "label"
        ]
        tracker.model(model.eval(), inputs, checkpoint.manifest["step"])
        tracker.artifact_file(checkpoint.path / MODEL)


class _StoppedEarly(Exception):
    """Asked to stop before the first step."""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


class _WorkerStarter:
    """Starts workers, the first time and again."""

    def __init__(self, placement: Placement, run: RunSpec, ready: Any, cpus: float) -> None:
        self._placement, self._run, self._ready, self._cpus = placement, run, ready, cpus

    def __call__(self, rank: int) -> tuple[Any, Any]:
        """A worker actor for a rank, and its call under way."""
        actor = ray.remote(WorkerActor).options(
            num_cpus=self._cpus, max_restarts=0, scheduling_strategy=self._placement.for_worker(rank)
        ).remote()  # fmt: skip
        node = self._placement.server_node
        return actor, actor.run.remote(rank, self._run, self._ready, node, worker_threads(self._cpus))


def worker_threads(cpus: float) -> int:
    """How many threads a worker computes with. Bits of a gradient depend on it."""
    return max(1, int(cpus))


def _get(ref: Any) -> Any:
    """`ray.get` with errors for people: ours as they are, a dead server as one line."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DistrainError) else error) from None
    except RayActorError as error:
        raise TrainingError(f"the parameter server died: {worker_failure(error)}") from error
    except RayError as error:
        raise ClusterError(f"the Ray cluster failed: {error}") from error


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
