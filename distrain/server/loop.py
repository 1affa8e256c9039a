"""The server's loop: links -> ledger -> update -> publish, one round after another, until the run is over."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from distrain.config import ConvergenceConfig, EarlyStoppingConfig, TargetConfig
from distrain.data.plan import Plan
from distrain.errors import DistrainError, DivergenceError, TrainingDataError
from distrain.exchange.link import Hub, Kind
from distrain.learning.diagnostics import LayerWatch, is_look
from distrain.learning.fingerprint import parameters_sha256
from distrain.learning.metrics import Metrics
from distrain.learning.model_state import copied, model_state
from distrain.learning.symptoms import Symptoms
from distrain.records import Event, LayerLook, StepRecord, ValidationRecord
from distrain.reduction import Partial
from distrain.server.agenda import Agenda, FreeAgenda, Microbatch, StepAgenda
from distrain.server.members import Member
from distrain.server.parameter_server import ParameterServer, Update
from distrain.server.reports import Captured, Reports
from distrain.server.rounds import Round, Rounds
from distrain.server.skipping import Skipped, Skipping
from distrain.server.stopping import Stopping
from distrain.step_sums import EpochLoss
from distrain.study.noise_scale import NoiseScale


@dataclass(frozen=True)
class LoopSettings:
    """How long to train and how often to look up from it. Steps count updates; None means never."""

    epochs: int
    max_steps: int | None = None
    max_s: float | None = None
    spent_s: float = 0.0  # of max_s, by servers before this one
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
    look_every_steps: int | None = None  # how often layers are looked at
    max_skipped: int = 10  # microbatches whose loss or gradient is not finite, where workers leave them out
    slices: int = 1  # parameter servers that share the model; the others are relays


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `status` is finished or stopped; rates count the steps after the first. `train_loss` is the mean
    over the samples of the last epoch, by weight, as far as the run went into it."""

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
    skipped: Skipped


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
            server,
            hub,
            plan.num_shards,
            self._window,
            settings.asynchronous,
            settings.worker_timeout_s,
            self._tell,
            settings.slices,
        )
        self._hosts = self._rounds.hosts
        self._flight: list[Round] = []  # training rounds, oldest first
        self._stopping = Stopping(settings.early_stopping, settings.convergence, settings.target)
        self._noise_scale = NoiseScale()
        self._symptoms = Symptoms()
        self._skipping = Skipping(settings.max_skipped, plan.num_rows_of, self._tell)
        self._stop_reason: str | None = None
        self.is_over = False
        self.step = 0
        self._last_snapshot = -1
        self._snapshot_at = time.monotonic()
        self._validation: dict[str, float] = {}
        self._validated_at = self._best_at = -1  # steps
        self._epoch_loss = EpochLoss()
        self._epoch_ended = False
        self._start = self._mark = 0.0  # time.perf_counter() of the run, and of the last step's end

    def stop(self, reason: str) -> None:
        """Finish the step in flight, then end the run."""
        self._stop_reason = self._stop_reason or reason

    def abort(self, error: DistrainError) -> None:
        """End the run now; `run` raises `error`."""
        self._rounds.abort(error)

    def retire(self, launch: int) -> None:
        """Let the worker of this launch go at the next step."""
        self._rounds.retire(launch)

    def give_up(self, launch: int, cause: str) -> None:
        """The worker of this launch is lost, whatever its link says."""
        self._rounds.give_up(launch, cause)

    def restore(
        self, step: int, model: dict[str, torch.Tensor], state: dict[str, Any], optimizer: dict[str, torch.Tensor]
    ) -> None:
        """Go on from a checkpoint: `model`, `state` and `optimizer` as a snapshot holds them."""
        self.step = step
        self._last_snapshot = step
        self._server.restore(step, model, optimizer)
        self._server.load_state_dict(state)
        self._hosts.unpack_optimizer(step, optimizer, state["optimizer"])
        self._stopping.load_state_dict(state["stopping"])
        self._agenda.load_state_dict(state["agenda"])
        self._symptoms.load_state_dict(state.get("symptoms", {}))
        self._skipping.load_state_dict(state.get("skipped", {}))
        self._validation = dict(state["validation"])
        if "epoch_loss" in state:
            self._epoch_loss = EpochLoss(**state["epoch_loss"])
        elif (loss := state.get("train_loss")) is not None:  # an older checkpoint: of its last step, until the next one
            self._epoch_loss = EpochLoss(epoch=-1, weighted_loss=loss, weight=1.0)

    def run(self) -> Outcome:
        """Train to the end. Raises DivergenceError, TrainingError or what a worker reported."""
        try:
            return self._run()
        finally:
            self.is_over = True
            self._rounds.end()

    def _run(self) -> Outcome:
        first_step = self.step
        samples = timed_samples = 0
        timed_s = 0.0
        status, reason = "finished", "all epochs done"
        self._rounds.stepped(self.step)
        self._await_workers()
        self._start = self._mark = time.perf_counter()
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
            if self._is_validation_due:
                why = self._validate() or why
            if self._is_time_over:
                why = why or f"{self._settings.max_s:g} seconds of training are over"
            if why is not None:
                reason = why
                self._tell("stopped", why)
                break
            if self._is_snapshot_due and not self._done():  # the end takes one, once all is validated
                self._go_on()  # where a validation was waited for
                self._snapshot()
        else:
            if self._stopping.ended is not None:
                reason = self._stopping.ended
            elif not self._agenda.finished:
                reason = f"max_steps, {self._settings.max_steps:,}, are done"
        if self._validation_plan is not None and status == "finished" and self._validated_at != self.step:
            self._validate(is_extra=True)
        if self._last_snapshot != self.step:
            self._snapshot()
        self._hosts.take_parameters(self.step)
        with self._server.exported() as model:
            sha256 = parameters_sha256(model)
        return Outcome(
            status=status,
            reason=reason,
            step=self.step,
            epoch=self._agenda.epoch,
            samples=samples,
            samples_per_second=timed_samples / timed_s if timed_s > 0 else 0.0,
            train_loss=self._epoch_loss.mean,
            validation=self._validation,
            parameters_sha256=sha256,
            training_s=time.perf_counter() - self._start,
            refused_pushes=self._rounds.refused,
            copied_microbatches=self._rounds.copied,
            skipped=self._skipping.total,
        )

    def _done(self) -> bool:
        is_full = self._agenda.finished or self.step >= (self._settings.max_steps or math.inf)
        return is_full or self._stopping.ended is not None

    @property
    def _is_time_over(self) -> bool:
        if self._settings.max_s is None:
            return False
        return self._settings.spent_s + time.perf_counter() - self._start >= self._settings.max_s

    @property
    def _is_validation_due(self) -> bool:
        is_time = self._epoch_ended or _due(self.step, self._settings.validation_every_steps)
        return self._validation_plan is not None and is_time

    @property
    def _is_snapshot_due(self) -> bool:
        every_s = self._settings.checkpoint_every_s
        is_time = every_s is not None and time.monotonic() - self._snapshot_at >= every_s
        is_best = self._best_at == self.step
        return self._epoch_ended or is_time or is_best or _due(self.step, self._settings.checkpoint_every_steps)

    @property
    def _may_begin(self) -> bool:
        """Whether a further update is wanted beside those in flight."""
        return self.step + len(self._flight) < (self._settings.max_steps or math.inf)

    def _await_workers(self) -> None:
        """Let the workers join, so that the first step is dealt to all of them."""
        enough_at = time.monotonic() + self._settings.grace_s
        while self._stop_reason is None:
            found, is_late = self._rounds.num_members, time.monotonic() > enough_at
            enough = found >= self._settings.num_workers or (is_late and found >= self._settings.min_workers)
            if enough and self._hosts.are_ready:
                return
            self._rounds.poll()

    def _train_step(self) -> tuple[StepRecord, str | None]:
        """One update: exchange, average, publish. Returns its record, and a reason to stop if the run has converged."""
        round_ = self._next_round()
        taken, dropped = self._rounds.close(round_)
        is_looked_at = is_look(round_.microbatches[0][0], self._settings.look_every_steps)
        watch = LayerWatch(self._server.model, self._server.layout) if is_looked_at else None
        lag = self.step - (round_.reads[round_.owner.incarnation] if round_.owner and round_.reads else round_.read)
        try:
            update, parts = self._apply(round_, watch, lag)
            skipped = {m: why for m, why in round_.skipped.items() if m not in dropped}
        except DivergenceError:
            checked = self._checked([m for m in round_.microbatches if m not in dropped], round_.read)
            update, parts = self._apply(checked, watch, lag)
            skipped = checked.skipped
        left_out = self._skipping.leave_out(skipped)
        self.step += 1
        self._rounds.stepped(self.step)
        self._epoch_ended = self._agenda.applied([m for m in round_.microbatches if m not in dropped], dropped)
        why = self._stopping.stepped(update.loss, update.grad_norm) if update.weight else None
        now = time.perf_counter()
        step_s, self._mark = now - self._mark, now
        if not (why or self._is_time_over or self._is_validation_due):
            self._go_on()
        if (squares := sum(part.squares for part in parts)) and not update.overflowed:
            microbatches = [self._plan.num_rows_of(*m) for m in round_.microbatches if m not in {*dropped, *skipped}]
            self._noise_scale.add(squares, (update.data_norm * update.weight) ** 2, microbatches)
        layers: tuple[LayerLook, ...] = ()
        if watch is not None and update.weight and not update.overflowed:
            layers = watch.looks([round_.seen[m] for m in sorted(round_.seen) if m not in dropped], update.samples)
        for warning in self._symptoms.notice(self.step, layers, update.lr):
            self._tell("warning", warning)
        epoch, _ = self._plan.position(round_.microbatches[0][0])
        self._epoch_loss.add(epoch, update.loss, update.weight, update.samples)
        if self._epoch_ended and not self._epoch_loss.weight and self._epoch_loss.samples == self._plan.num_rows:
            raise TrainingDataError(
                f"step {self.step}: the weights of all rows of the epoch that it ends add up to 0, so it has no mean "
                "loss; look at data.weight and loss.class_weights"
            )
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
            weight=update.weight,
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
            skipped=left_out.microbatches,
            skipped_rows=left_out.rows,
            noise_scale=self._noise_scale.now,
            critical_batch_size=self._noise_scale.overall,
            loss_scale=round_.scale or None,
            overflowed=update.overflowed,
            layers=layers,
            taken=taken,
        )
        self._reports.step(record)
        return record, why

    def _apply(self, round_: Round, watch: LayerWatch | None, lag: int) -> tuple[Update, tuple[Partial, ...]]:
        """Apply what a round gave. Where all of it was skipped, or has no weight, the parameters stay as they are."""
        gathered = self._rounds.begin_update(round_, self.step + 1)
        try:
            if not any(half.weight for half in gathered.halves):
                update = self._server.skip(self.step + 1, sum(half.samples for half in gathered.halves))
            else:
                read = round_.owner.own if self._settings.asynchronous and round_.owner is not None else None
                update = self._server.apply(gathered, self.step + 1, read, round_.scale, watch, lag)
        finally:
            self._hosts.forget(round_.number)
        self._hosts.finish_update(self.step + 1)
        return update, gathered.halves

    def _checked(self, microbatches: Sequence[Microbatch], read: int) -> Round:
        """Have an update's microbatches computed again, each looked at by itself, since their sum is not finite: the
        worker that has it ends the run, or leaves it out. Nothing has changed, so the others are what they were."""
        if not self._server.is_finite:
            raise DivergenceError(
                f"step {self.step + 1}: the parameters are not finite: the update before overflowed. The last "
                "checkpoint is good. Try a lower optimizer.lr"
            )
        round_ = self._rounds.begin(Kind.CHECK, microbatches, read, self.step)
        while round_.whole_at is None:
            self._poll()
        self._rounds.close(round_)
        return round_

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

    def _go_on(self) -> None:
        """Begin what comes next, so that the workers compute while what follows here is done."""
        if self._stop_reason is None:
            self._begin_rounds()
            self._rounds.wake()

    def _begin_rounds(self) -> None:
        if self._settings.asynchronous:
            self._rounds.deal_orphans()
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

    def _validate(self, is_extra: bool = False) -> str | None:
        """Validate. Returns a reason to stop, if there is one. Of an extra one, at the run's end, neither schedule nor
        stopping hear, so that a run that is trained on is the one that would not have ended here."""
        assert self._validation_plan is not None
        start = time.perf_counter()
        sums, samples, loss = torch.zeros(self._metrics.num_sums, dtype=torch.float64), 0, 0.0
        weight = 0.0
        self._hosts.publish_averaged()
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
        if is_extra:
            return None
        self._server.schedule.validated(self._validation["loss"])
        self._hosts.validated(self._validation["loss"])
        why = self._stopping.validated(self._validation)
        if self._stopping.is_best:
            self._best_at = self.step
        return why

    def _snapshot(self) -> None:
        """Copy the run's state, which is all that a checkpoint costs the step; whoever takes it serializes it."""
        self._hosts.take_parameters(self.step)
        if not self._server.is_finite:
            raise DivergenceError(
                f"step {self.step}: the update made parameters that are not finite, so no checkpoint is written. Try a "
                "lower optimizer.lr"
            )
        with self._server.exported() as model:
            exported = copied(model_state(model))
        tensors, scalars = self._hosts.pack_optimizer()
        state = {
            "optimizer": scalars,
            **self._server.state_dict(),
            "stopping": self._stopping.state_dict(),
            "agenda": self._agenda.state_dict(),
            "skipped": self._skipping.state_dict(),
            "symptoms": self._symptoms.state_dict(),
            "validation": self._validation,
            "epoch_loss": asdict(self._epoch_loss),
        }
        metrics = self._validation if self._validated_at == self.step else {}
        self._reports.snapshot(
            Captured(
                step=self.step,
                epoch=self._agenda.epoch,
                epoch_finished=self._epoch_ended,
                model=exported,
                optimizer=copied({**tensors, **self._server.beside(self.step)}),
                state=state,
                metrics=dict(metrics),
                is_best=self._best_at == self.step,
            )
        )
        self._last_snapshot = self.step
        self._snapshot_at = time.monotonic()

    def _tell(
        self, kind: str, message: str, member: Member | None = None, seconds: float | None = None, launch: int = -1
    ) -> None:
        rank, launch = (member.rank, member.launch) if member is not None else (-1, launch)
        self._reports.event(
            Event(time.time_ns() // 1_000_000, kind, message, self.step, rank, launch=launch, seconds=seconds)
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
