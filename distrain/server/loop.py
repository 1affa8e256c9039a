"""The server's loop: links -> ledger -> update -> publish, one round after another, until the run is over."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from distrain.config import ConvergenceConfig, EarlyStoppingConfig, TargetConfig
from distrain.data.plan import Plan
from distrain.errors import DistrainError, TrainingDataError
from distrain.exchange.link import Hub, Kind
from distrain.learning.fingerprint import parameters_sha256
from distrain.learning.metrics import Metrics
from distrain.learning.model_state import copied, model_state
from distrain.learning.optimizer_state import pack_optimizer, unpack_optimizer
from distrain.records import Event, StepRecord, ValidationRecord
from distrain.server.agenda import Agenda, FreeAgenda, StepAgenda
from distrain.server.members import Member
from distrain.server.parameter_server import ParameterServer
from distrain.server.reports import Captured, Reports
from distrain.server.rounds import Round, Rounds
from distrain.server.stopping import Stopping
from distrain.study.noise_scale import NoiseScale


@dataclass(frozen=True)
class LoopSettings:
    """How long to train and how often to look up from it. Steps count updates; None means never."""

    epochs: int
    max_steps: int | None = None
    checkpoint_every_steps: int | None = None
    checkpoint_every_s: float | None = None
    validation_every_steps: int | None = None
    early_stopping: EarlyStoppingConfig | None = None
    convergence: ConvergenceConfig | None = None
    target: TargetConfig | None = None
    num_workers: int = 1  # joined before the first step
    min_workers: int = 1  # enough for the first step after `grace_s`
    grace_s: float = 10.0
    worker_timeout_s: float = 60.0
    asynchronous: bool = False
    staleness: int | None = 0  # None: unbounded, asynchronous only
    quorum: int | None = None  # microbatches that make up an update; None: all


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `status` is finished or stopped; rates count the steps after the first."""

    status: str
    reason: str
    step: int
    epoch: int
    samples: int
    samples_per_second: float
    train_loss: float
    validation: dict[str, float]
    parameters_sha256: str
    training_s: float
    refused_pushes: int
    copied_microbatches: int


class _Stopped(Exception):
    """The run was asked to stop and the round in flight cannot finish."""


class Loop:
    """Drives a run: deals rounds to whoever is there, applies their sums, validates, snapshots, decides when to end.

    Call `run` once; `stop` and `abort` from any thread.
    """

    def __init__(
        self,
        server: ParameterServer,
        hub: Hub,
        plan: Plan,
        settings: LoopSettings,
        reports: Reports,
        metrics: Metrics,
        validation_plan: Plan | None = None,
    ) -> None:
        self._server = server
        self._hub = hub
        self._plan = plan
        self._settings = settings
        self._reports = reports
        self._metrics = metrics
        self._validation_plan = validation_plan
        may_drop = settings.quorum is not None and settings.quorum < plan.num_shards
        self._window = 1 if settings.asynchronous else 1 + (settings.staleness or 0)
        sizes = (plan.steps_per_epoch, plan.num_shards, settings.epochs)
        self._agenda: Agenda
        if settings.asynchronous:
            self._agenda = FreeAgenda(*sizes, settings.staleness, plan.num_microbatch_rows)
        else:
            self._agenda = StepAgenda(*sizes, may_drop, plan.num_microbatch_rows)
        self._rounds = Rounds(
            server, hub, plan.num_shards, self._window, settings.asynchronous, settings.worker_timeout_s, self._tell
        )
        self._flight: list[Round] = []  # training rounds, oldest first
        self._stopping = Stopping(settings.early_stopping, settings.convergence, settings.target)
        self._noise_scale = NoiseScale()
        self._stop_reason: str | None = None
        self.step = 0
        self._last_snapshot = -1
        self._snapshot_at = time.monotonic()
        self._validation: dict[str, float] = {}
        self._validated_at = -1
        self._last_loss = math.nan
        self._epoch_ended = False
        self._mark = 0.0

    def stop(self, reason: str) -> None:
        """Finish the step in flight, then end the run."""
        self._stop_reason = self._stop_reason or reason

    def abort(self, error: DistrainError) -> None:
        """End the run now; `run` raises `error`."""
        self._rounds.abort(error)

    def retire(self, launch: int) -> None:
        """Let the worker of this launch go at the next step."""
        self._rounds.retire(launch)

    def restore(
        self, step: int, model: dict[str, torch.Tensor], state: dict[str, Any], optimizer: dict[str, torch.Tensor]
    ) -> None:
        """Go on from a checkpoint: `model`, `state` and `optimizer` as a snapshot holds them."""
        self.step = step
        self._last_snapshot = step
        self._server.restore(step, model, optimizer)
        unpack_optimizer(self._server.optimizer, optimizer, state["optimizer"])
        self._server.schedule.load_state_dict(state["schedule"])
        self._stopping.load_state_dict(state["stopping"])
        self._agenda.load_state_dict(state["agenda"])
        self._validation = dict(state["validation"])
        self._last_loss = state["train_loss"] if state["train_loss"] is not None else math.nan

    def run(self) -> Outcome:
        """Train to the end. Raises DivergenceError, TrainingError or what a worker reported."""
        try:
            return self._run()
        finally:
            self._rounds.end()

    def _run(self) -> Outcome:
        first_step = self.step
        samples = timed_samples = 0
        timed_s = 0.0
        status, reason = "finished", "all epochs done"
        self._rounds.stepped(self.step)
        self._await_workers()
        start = self._mark = time.perf_counter()
        while not self._done():
            if self._stop_reason is not None:
                status, reason = "stopped", self._stop_reason
                break
            try:
                record, why = self._train_step()
            except _Stopped:
                status, reason = "stopped", self._stop_reason or "stopped"
                break
            samples += record.samples
            if self.step > first_step + 1:
                timed_samples += record.samples
                timed_s += record.step_s
            why = self._after_step() or why
            if why is not None:
                reason = why
                self._tell("stopped", why)
                break
        if self._validation_plan is not None and status == "finished" and self._validated_at != self.step:
            self._validate()
        if self._last_snapshot != self.step:
            self._snapshot()
        self._server.load_buffers()
        return Outcome(
            status=status,
            reason=reason,
            step=self.step,
            epoch=self._agenda.epoch,
            samples=samples,
            samples_per_second=timed_samples / timed_s if timed_s > 0 else 0.0,
            train_loss=self._last_loss,
            validation=self._validation,
            parameters_sha256=parameters_sha256(self._server.model),
            training_s=time.perf_counter() - start,
            refused_pushes=self._rounds.refused,
            copied_microbatches=self._rounds.copied,
        )

    def _done(self) -> bool:
        return self._agenda.finished or self.step >= (self._settings.max_steps or math.inf)

    @property
    def _may_begin(self) -> bool:
        """Whether a further update is wanted beside those in flight."""
        return self.step + len(self._flight) < (self._settings.max_steps or math.inf)

    def _await_workers(self) -> None:
        """Let the workers join, so that the first step is dealt to all of them."""
        enough_at = time.monotonic() + self._settings.grace_s
        while self._rounds.num_members < self._settings.num_workers and self._stop_reason is None:
            if time.monotonic() > enough_at and self._rounds.num_members >= self._settings.min_workers:
                return
            self._rounds.poll()

    def _train_step(self) -> tuple[StepRecord, str | None]:
        """One update: exchange, average, publish. Returns its record, and a reason to stop if the run has converged."""
        round_ = self._next_round()
        taken, dropped = self._rounds.close(round_)
        read, lag = None, self.step - round_.read
        if self._settings.asynchronous:
            assert round_.owner is not None
            read, lag = round_.owner.own, self.step - round_.reads[round_.owner.incarnation]
        parts = round_.tree.fold()
        update = self._server.apply(parts, self.step + 1, read)
        if squares := sum(part.squares for part in parts):
            microbatches = [self._plan.num_rows_of(*m) for m in round_.microbatches if m not in dropped]
            self._noise_scale.add(squares, (update.data_norm * update.weight) ** 2, microbatches)
        epoch, _ = self._plan.position(round_.microbatches[0][0])
        self.step += 1
        self._rounds.stepped(self.step)
        self._epoch_ended = self._agenda.applied([m for m in round_.microbatches if m not in dropped], dropped)
        self._last_loss = update.loss
        now = time.perf_counter()
        step_s, self._mark = now - self._mark, now
        # Asynchronous workers compute while others do: an update's share of the time is what there was of each.
        beside = max(1, self._rounds.num_members) if self._settings.asynchronous else 1
        data_s, compute_s = (fmean(seconds.values()) / beside for seconds in (round_.data_s, round_.compute_s))
        slowest_s = max(round_.data_s[rank] + round_.compute_s[rank] for rank in round_.data_s) / beside
        record = StepRecord(
            step=self.step,
            epoch=epoch,
            time_ms=time.time_ns() // 1_000_000,
            loss=update.loss,
            grad_norm=update.grad_norm,
            lr=update.lr,
            clipped=update.clipped,
            samples=update.samples,
            num_bytes=round_.num_bytes,
            data_s=data_s,
            compute_s=compute_s,
            exchange_s=max(0.0, step_s - slowest_s - update.seconds),
            update_s=update.seconds,
            step_s=step_s,
            workers=self._rounds.num_members,
            waiting_s=slowest_s - data_s - compute_s,
            penalty=update.penalty,
            staleness=lag,
            dropped=len(dropped),
            noise_scale=self._noise_scale.now,
            critical_batch_size=self._noise_scale.overall,
            taken=taken,
        )
        self._reports.step(record)
        return record, self._stopping.stepped(update.loss, update.grad_norm)

    def _next_round(self) -> Round:
        """Keep rounds in flight until the one to apply next is there: the oldest, or in asynchronous training the first
        to be whole."""
        while True:
            self._begin_rounds()
            candidates = self._flight if self._settings.asynchronous else self._flight[:1]
            whole = [round_ for round_ in candidates if round_.whole_at is not None]
            found = min(whole, key=lambda round_: round_.whole_at or 0, default=None)
            if found is not None:
                self._flight.remove(found)
                return found
            self._poll()

    def _begin_rounds(self) -> None:
        if self._settings.asynchronous:
            for member, shards in self._rounds.idle():
                if not self._may_begin or not (microbatches := self._agenda.next(shards)):
                    return
                self._flight.append(self._rounds.begin(Kind.TRAIN, microbatches, self.step, to=member))
            return
        while len(self._flight) < self._window and self._may_begin:
            update = self.step + len(self._flight)
            if not (microbatches := self._agenda.next()):
                return
            read = max(0, update - self._window + 1)
            needed = self._settings.quorum
            self._flight.append(self._rounds.begin(Kind.TRAIN, microbatches, read, update, needed=needed))

    def _poll(self) -> None:
        self._rounds.poll()
        if self._stop_reason is not None and not self._rounds.num_members:
            raise _Stopped

    def _after_step(self) -> str | None:
        """Validate and snapshot where they are due. Returns a reason to stop, if validation gave one."""
        why = None
        epoch_end = self._epoch_ended
        if self._validation_plan is not None and (epoch_end or _due(self.step, self._settings.validation_every_steps)):
            why = self._validate()
        every_s = self._settings.checkpoint_every_s
        is_time = every_s is not None and time.monotonic() - self._snapshot_at >= every_s
        if epoch_end or is_time or _due(self.step, self._settings.checkpoint_every_steps):
            self._snapshot()
        return why

    def _validate(self) -> str | None:
        assert self._validation_plan is not None
        start = time.perf_counter()
        sums, samples, loss = torch.zeros(self._metrics.num_sums, dtype=torch.float64), 0, 0.0
        weight = 0.0
        for step in range(self._validation_plan.steps_per_epoch):
            shards = [(step, shard) for shard in range(self._validation_plan.num_shards)]
            round_ = self._rounds.begin(Kind.VALIDATE, shards, self.step)
            try:
                while round_.whole_at is None:
                    self._poll()
            except _Stopped:
                return None
            self._rounds.close(round_)
            for part in round_.tree.fold():
                sums += part.vector
                samples += part.samples
                loss += part.loss
                weight += part.weight
        if not weight:
            raise TrainingDataError("the weights of all validation rows add up to 0")
        self._validation = {"loss": loss / weight, **self._metrics.combine(sums.tolist())}
        self._validated_at = self.step
        now = time.perf_counter()
        self._mark += now - start
        epoch = self._agenda.epoch - self._epoch_ended
        self._reports.validation(
            ValidationRecord(
                self.step, epoch, time.time_ns() // 1_000_000, dict(self._validation), samples, now - start
            )
        )
        self._server.schedule.validated(self._validation["loss"])
        return self._stopping.validated(self._validation)

    def _snapshot(self) -> None:
        """Copy the run's state, which is all that a checkpoint costs the step; whoever takes it serializes it."""
        self._server.load_buffers()
        tensors, scalars = pack_optimizer(self._server.optimizer)
        state = {
            "optimizer": scalars,
            "schedule": self._server.schedule.state_dict(),
            "stopping": self._stopping.state_dict(),
            "agenda": self._agenda.state_dict(),
            "validation": self._validation,
            "train_loss": self._last_loss if math.isfinite(self._last_loss) else None,
        }
        metrics = self._validation if self._validated_at == self.step else {}
        self._reports.snapshot(
            Captured(
                step=self.step,
                epoch=self._agenda.epoch,
                epoch_finished=self._epoch_ended,
                model=copied(model_state(self._server.model)),
                optimizer=copied({**tensors, **self._server.stale(self.step)}),
                state=state,
                metrics=dict(metrics),
            )
        )
        self._last_snapshot = self.step
        self._snapshot_at = time.monotonic()

    def _tell(self, kind: str, message: str, member: Member | None = None, seconds: float | None = None) -> None:
        rank, launch = (member.rank, member.launch) if member is not None else (-1, -1)
        self._reports.event(
            Event(time.time_ns() // 1_000_000, kind, message, self.step, rank, launch=launch, seconds=seconds)
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
