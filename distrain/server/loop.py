"""The server's loop: links -> ledger -> update -> publish, one round after another, until the run is over."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from distrain import errors
from distrain.checkpoint import Snapshot
from distrain.config import ConvergenceConfig, EarlyStoppingConfig
from distrain.data.plan import Plan
from distrain.errors import DistrainError, LinkError, TrainingError
from distrain.exchange.link import Frame, Hub, Kind, SocketLink
from distrain.exchange.memory import PushSlots
from distrain.learning.fingerprint import parameters_sha256
from distrain.learning.metrics import Metrics
from distrain.learning.model_state import model_bytes
from distrain.learning.optimizer_state import pack_optimizer, unpack_optimizer
from distrain.records import Event, StepRecord, ValidationRecord
from distrain.reduction import Block, Partial, TreeSum
from distrain.server.ledger import Assignment, Ledger, Verdict
from distrain.server.parameter_server import ParameterServer
from distrain.server.reports import Reports
from distrain.server.stopping import Stopping

_POLL_SECONDS = 0.25  # how soon a request to stop is seen while nothing arrives


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
    num_workers: int = 1  # joined before the first step
    min_workers: int = 1  # enough for the first step after `grace_s`
    grace_s: float = 10.0
    worker_timeout_s: float = 60.0


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


@dataclass
class _Member:
    """A worker that joined: its link, its push buffer, and until when it must answer."""

    rank: int
    incarnation: int
    link: SocketLink
    slots: PushSlots
    launch: int
    deadline: float = math.inf
    published_round: int = -1


@dataclass
class _Round:
    """One exchange in flight. Seconds and bytes are added up for each worker."""

    kind: Kind
    step: int
    tree: TreeSum
    data_s: dict[int, float] = field(default_factory=dict)
    compute_s: dict[int, float] = field(default_factory=dict)
    num_bytes: int = 0
    lost_at: float | None = None  # time.perf_counter() when a worker that owed shards of it was given up


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
        self._ledger = Ledger(plan.num_shards)
        self._members: dict[int, _Member] = {}
        self._by_link: dict[SocketLink, _Member] = {}
        self._fenced: dict[SocketLink, _Member] = {}  # given up for their silence: what they still push is refused
        self._round_number = -1
        self._round: _Round | None = None
        self._stopping = Stopping(settings.early_stopping, settings.convergence)
        self._stop_reason: str | None = None
        self._abort: DistrainError | None = None
        self.step = 0
        self._last_snapshot = -1
        self._snapshot_at = time.monotonic()
        self._validation: dict[str, float] = {}
        self._validated_at = -1
        self._last_loss = math.nan
        self._refused = 0
        self._mark = 0.0

    def stop(self, reason: str) -> None:
        """Finish the step in flight, then end the run."""
        self._stop_reason = self._stop_reason or reason

    def abort(self, error: DistrainError) -> None:
        """End the run now; `run` raises `error`."""
        self._abort = self._abort or error

    def restore(self, step: int, state: dict[str, Any], optimizer: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint: `state` and `optimizer` as a snapshot holds them. The model is restored apart."""
        self.step = step
        self._last_snapshot = step
        unpack_optimizer(self._server.optimizer, optimizer, state["optimizer"])
        self._server.schedule.load_state_dict(state["schedule"])
        self._stopping.load_state_dict(state["stopping"])
        self._validation = dict(state["validation"])
        self._last_loss = state["train_loss"] if state["train_loss"] is not None else math.nan

    def run(self) -> Outcome:
        """Train to the end. Raises DivergenceError, TrainingError or what a worker reported."""
        try:
            return self._run()
        finally:
            for member in self._members.values():
                self._hub.send(member.link, Frame(Kind.STOP))
            self._hub.close()

    def _run(self) -> Outcome:
        first_step = self.step
        samples = timed_samples = 0
        timed_s = 0.0
        status, reason = "finished", "all epochs done"
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
            epoch=self.step // self._plan.steps_per_epoch,
            samples=samples,
            samples_per_second=timed_samples / timed_s if timed_s > 0 else 0.0,
            train_loss=self._last_loss,
            validation=self._validation,
            parameters_sha256=parameters_sha256(self._server.model),
            training_s=time.perf_counter() - start,
            refused_pushes=self._refused,
        )

    def _done(self) -> bool:
        limit = self._settings.epochs * self._plan.steps_per_epoch
        if self._settings.max_steps is not None:
            limit = min(limit, self._settings.max_steps)
        return self.step >= limit

    def _await_workers(self) -> None:
        """Let the workers join, so that the first step is dealt to all of them."""
        enough_at = time.monotonic() + self._settings.grace_s
        while len(self._members) < self._settings.num_workers and self._stop_reason is None:
            if time.monotonic() > enough_at and len(self._members) >= self._settings.min_workers:
                return
            self._poll()

    def _train_step(self) -> tuple[StepRecord, str | None]:
        """One step: exchange, update, publish. Returns its record, and a reason to stop if the run has converged."""
        round_, halves = self._exchange(Kind.TRAIN, self.step, self._plan)
        update = self._server.apply(halves, self.step + 1)
        epoch, _ = self._plan.position(self.step)
        self.step += 1
        self._last_loss = update.loss
        now = time.perf_counter()
        step_s, self._mark = now - self._mark, now
        data_s, compute_s = max(round_.data_s.values()), max(round_.compute_s.values())
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
            exchange_s=max(0.0, step_s - data_s - compute_s - update.seconds),
            update_s=update.seconds,
            step_s=step_s,
            workers=len(self._members),
            taken=self._ledger.taken,
        )
        self._reports.step(record)
        return record, self._stopping.stepped(update.loss, update.grad_norm)

    def _after_step(self) -> str | None:
        """Validate and snapshot where they are due. Returns a reason to stop, if validation gave one."""
        why = None
        epoch_end = self.step % self._plan.steps_per_epoch == 0
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
        for step in range(self._validation_plan.steps_per_epoch):
            try:
                _, halves = self._exchange(Kind.VALIDATE, step, self._validation_plan)
            except _Stopped:
                return None
            for part in halves:
                sums += part.vector
                samples += part.samples
                loss += part.loss
        self._validation = {"loss": loss / samples, **self._metrics.combine(sums.tolist())}
        self._validated_at = self.step
        now = time.perf_counter()
        self._mark += now - start
        epoch = (self.step - 1) // self._plan.steps_per_epoch
        self._reports.validation(
            ValidationRecord(
                self.step, epoch, time.time_ns() // 1_000_000, dict(self._validation), samples, now - start
            )
        )
        self._server.schedule.validated(self._validation["loss"])
        return self._stopping.validated(self._validation)

    def _snapshot(self) -> None:
        self._server.load_buffers()
        optimizer, scalars = pack_optimizer(self._server.optimizer)
        state = {
            "optimizer": scalars,
            "schedule": self._server.schedule.state_dict(),
            "stopping": self._stopping.state_dict(),
            "validation": self._validation,
            "train_loss": self._last_loss if math.isfinite(self._last_loss) else None,
        }
        metrics = self._validation if self._validated_at == self.step else {}
        self._reports.snapshot(
            Snapshot(
                step=self.step,
                epoch=self.step // self._plan.steps_per_epoch,
                model=model_bytes(self._server.model),
                optimizer=optimizer,
                state=state,
                metrics=dict(metrics),
            )
        )
        self._last_snapshot = self.step
        self._snapshot_at = time.monotonic()

    def _exchange(self, kind: Kind, step: int, plan: Plan) -> tuple[_Round, tuple[Partial, ...]]:
        """Have every shard of a step computed once. Returns the last two halves of the sum over all of them."""
        self._round_number += 1
        self._round = _Round(kind, step, TreeSum(plan.num_shards))
        for assignment in self._ledger.begin(self._round_number):
            self._assign(assignment)
        while not self._ledger.complete:
            self._poll()
            if self._stop_reason is not None and not self._members:
                raise _Stopped
        halves = self._round.tree.halves
        assert halves is not None
        if self._round.lost_at is not None:
            seconds = time.perf_counter() - self._round.lost_at
            message = f"the step in flight was whole {seconds:.2f} s after the worker was given up"
            self._tell("recovered", message, seconds=seconds)
        return self._round, halves

    def _assign(self, assignment: Assignment) -> None:
        """Ask a worker for its shards; one without shared memory gets the parameters first."""
        assert self._round is not None
        member = self._members[assignment.incarnation]
        if not member.link.shared and member.published_round != self._round_number:
            self._hub.send(member.link, Frame(Kind.PUBLISH, payload=self._server.published.bytes()))
            member.published_round = self._round_number
        member.deadline = time.monotonic() + self._settings.worker_timeout_s
        self._hub.send(
            member.link,
            Frame(self._round.kind, self._round_number, self._round.step, assignment.first, assignment.stop),
        )

    def _poll(self) -> None:
        """Wait for whatever comes next and deal with it."""
        if self._abort is not None:
            raise self._abort
        for link, what in self._hub.poll(_POLL_SECONDS):
            member = self._by_link.get(link)
            if isinstance(what, LinkError):
                if member is not None:
                    self._lose(member, what.message)
                self._fenced.pop(link, None)
            elif what.kind is Kind.HELLO:
                self._welcome(link, what)
            elif link in self._fenced:
                if what.kind is Kind.PUSH:
                    self._take_push(self._fenced[link], what)
            elif member is None:
                continue  # a link dropped a moment ago
            elif what.kind is Kind.PUSH:
                self._take_push(member, what)
            elif what.kind is Kind.FAILED:
                raise _reported(what.json())
            else:
                self._lose(member, f"it sent a {what.kind.name} frame, which only a server may")
        now = time.monotonic()
        for member in list(self._members.values()):
            if now > member.deadline and self._ledger.owes(member.incarnation):
                self._fenced[member.link] = member
                self._lose(member, f"it was silent for {self._settings.worker_timeout_s:g} s")

    def _welcome(self, link: SocketLink, frame: Frame) -> None:
        """Take a proven worker in and hand it its buffers."""
        hello = frame.json()
        rank = int(hello["rank"])
        if hello["layout"] != self._server.layout.digest:
            raise TrainingError(
                f"worker {rank} built another model than the server: names or shapes differ. The model factory must "
                "give the same model on every host"
            )
        slots = PushSlots(self._server.layout, self._plan.num_shards)
        if not link.shared:
            link.sink = lambda push: slots.bytes(push.slot) if push.kind is Kind.PUSH and self._training else None
        incarnation, assignments = self._ledger.join(rank)
        member = _Member(rank, incarnation, link, slots, int(hello["launch"]))
        self._members[incarnation] = self._by_link[link] = member
        try:
            link.send(Frame(Kind.WELCOME, incarnation=incarnation))
            if link.shared:
                link.send_descriptors([self._server.published.buffer.fd, slots.buffer.fd])
        except LinkError as error:
            self._lose(member, error.message)
            return
        slots.buffer.close()
        self._tell("joined", f"worker {rank} joined (incarnation {incarnation})", member)
        for assignment in assignments:
            self._assign(assignment)

    @property
    def _training(self) -> bool:
        return self._round is not None and self._round.kind is Kind.TRAIN

    def _take_push(self, member: _Member, frame: Frame) -> None:
        """Enter a push into the ledger and, if it counts, into the sum."""
        block = Block(frame.first, frame.stop)
        verdict = self._ledger.push(member.incarnation, frame.round, block)
        if verdict is not Verdict.ACCEPTED or self._round is None:
            self._refused += 1
            self._tell(
                "refused",
                f"a push of worker {member.rank} for shards {block.first}..{block.stop - 1} of step {frame.step + 1} "
                f"was refused: {verdict.value}",
                member,
            )
            return
        member.deadline = time.monotonic() + self._settings.worker_timeout_s
        round_ = self._round
        if round_.kind is Kind.TRAIN:
            vector = member.slots[frame.slot]
        else:
            vector = torch.frombuffer(frame.payload, dtype=torch.float64)
        round_.data_s[member.rank] = round_.data_s.get(member.rank, 0.0) + frame.data_s
        round_.compute_s[member.rank] = round_.compute_s.get(member.rank, 0.0) + frame.compute_s
        round_.num_bytes += frame.data_bytes
        round_.tree.put(block, Partial(vector, frame.samples, frame.loss))

    def _lose(self, member: _Member, cause: str) -> None:
        """Fence a worker and have the others do what it still owed."""
        if self._members.pop(member.incarnation, None) is None:
            return
        del self._by_link[member.link]
        if member.link not in self._fenced:
            self._hub.drop(member.link)
        self._tell("lost", f"worker {member.rank} was given up: {cause}", member)
        if self._round is not None and self._round.lost_at is None and self._ledger.owes(member.incarnation):
            self._round.lost_at = time.perf_counter()
        for assignment in self._ledger.leave(member.incarnation):
            self._assign(assignment)

    def _tell(self, kind: str, message: str, member: _Member | None = None, seconds: float | None = None) -> None:
        rank, launch = (member.rank, member.launch) if member is not None else (-1, -1)
        self._reports.event(
            Event(time.time_ns() // 1_000_000, kind, message, self.step, rank, launch=launch, seconds=seconds)
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _reported(report: dict[str, Any]) -> DistrainError:
    """The error a worker reported, as the same class here."""
    kind = getattr(errors, str(report.get("error")), TrainingError)
    message = str(report.get("message", json.dumps(report)))
    return kind(message) if isinstance(kind, type) and issubclass(kind, DistrainError) else TrainingError(message)
