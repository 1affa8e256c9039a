"""Consecutive steps added up. Means are exact however often sums are merged: they are divided when they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from distrain.records import StepRecord


@dataclass(slots=True)
class StepSums:
    """Sums over consecutive steps, and the state at the last of them."""

    step: int  # the last
    epoch: int  # of the last
    start_ms: int  # Unix time of the first step's update
    time_ms: int  # of the last one's
    lr: float  # at the last
    workers: int  # at the last
    num_steps: int
    num_clipped: int
    num_overflowed: int  # updates left out, which have no gradient norm
    samples: int
    weight: float  # of the samples
    staleness: int
    dropped: int  # microbatches
    skipped_rows: int
    num_bytes: int
    weighted_loss: float  # loss x weight
    penalty: float
    grad_norm: float
    data_s: float
    compute_s: float
    waiting_s: float
    exchange_s: float
    update_s: float
    step_s: float
    noise_scale: float | None  # at the last
    critical_batch_size: float | None  # at the last
    loss_scale: float | None  # at the last

    @classmethod
    def of(cls, record: StepRecord) -> StepSums:
        """One step."""
        return cls(
            step=record.step,
            epoch=record.epoch,
            start_ms=record.time_ms,
            time_ms=record.time_ms,
            lr=record.lr,
            workers=record.workers,
            num_steps=1,
            num_clipped=int(record.clipped),
            num_overflowed=int(record.overflowed),
            samples=record.samples,
            weight=record.weight,
            staleness=record.staleness,
            dropped=record.dropped,
            skipped_rows=record.skipped_rows,
            num_bytes=record.num_bytes,
            weighted_loss=record.loss * record.weight,
            penalty=record.penalty,
            grad_norm=0.0 if record.overflowed else record.grad_norm,
            data_s=record.data_s,
            compute_s=record.compute_s,
            waiting_s=record.waiting_s,
            exchange_s=record.exchange_s,
            update_s=record.update_s,
            step_s=record.step_s,
            noise_scale=record.noise_scale,
            critical_batch_size=record.critical_batch_size,
            loss_scale=record.loss_scale,
        )

    def copy(self) -> StepSums:
        """The same sums, to be merged apart from these."""
        return replace(self)

    def merge(self, later: StepSums) -> None:
        """Take in the steps that came right after."""
        self.step, self.epoch, self.time_ms = later.step, later.epoch, later.time_ms
        self.lr, self.workers = later.lr, later.workers
        self.noise_scale, self.critical_batch_size = later.noise_scale, later.critical_batch_size
        self.loss_scale = later.loss_scale
        self.num_steps += later.num_steps
        self.num_clipped += later.num_clipped
        self.num_overflowed += later.num_overflowed
        self.samples += later.samples
        self.weight += later.weight
        self.staleness += later.staleness
        self.dropped += later.dropped
        self.skipped_rows += later.skipped_rows
        self.num_bytes += later.num_bytes
        self.weighted_loss += later.weighted_loss
        self.penalty += later.penalty
        self.grad_norm += later.grad_norm
        self.data_s += later.data_s
        self.compute_s += later.compute_s
        self.waiting_s += later.waiting_s
        self.exchange_s += later.exchange_s
        self.update_s += later.update_s
        self.step_s += later.step_s

    @property
    def loss(self) -> float:
        """Mean over the samples, by weight; NaN where they have none."""
        return self.weighted_loss / self.weight if self.weight else math.nan


@dataclass(slots=True)
class EpochLoss:
    """The training loss of the epoch that the last step was of, as far as it has come."""

    epoch: int = 0
    weighted_loss: float = 0.0  # loss x weight
    weight: float = 0.0  # of the samples
    samples: int = 0

    def add(self, epoch: int, loss: float, weight: float, samples: int) -> None:
        """Take in the next step. With another epoch, its sums begin anew."""
        if epoch != self.epoch:
            self.epoch, self.weighted_loss, self.weight, self.samples = epoch, 0.0, 0.0, 0
        self.weighted_loss += loss * weight
        self.weight += weight
        self.samples += samples

    @property
    def mean(self) -> float:
        """Mean over the samples, by weight; NaN where they have none."""
        return self.weighted_loss / self.weight if self.weight else math.nan
