"""What the server reports about a run: plain values that travel from the server to driver, terminal and tracking."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LayerLook:
    """One layer at one update; norms are L2. What does not apply, or is not known, is None."""

    name: str
    kind: str  # the module's class
    grad_norm: float  # of the averaged gradient, before clipping
    num_parameters: int
    weight_norm: float  # before the update
    update_ratio: float | None  # norm of the update over that of the weights
    activation_norm: float | None  # root mean square over the rows and units
    dead_share: float | None  # share of the units at a flat end of their activation (a ReLU's 0) for all rows


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished step. Seconds are wall-clock; data and compute are means over the workers."""

    step: int  # counts from 1: the number of updates applied
    epoch: int  # counts from 0
    time_ms: int  # Unix time of the update
    loss: float  # mean over the step's samples, by weight; 0 where they have none
    grad_norm: float  # L2 norm of the averaged gradient before clipping, in float64
    lr: float
    clipped: bool
    samples: int  # those without weight too
    weight: float  # theirs: their number where all count the same
    num_bytes: int  # Parquet bytes read by the workers for this step, as tensors
    data_s: float  # waiting for rows
    compute_s: float  # forward, loss, backward
    exchange_s: float  # the step's time less all the others: links, summing
    update_s: float  # average, clip, optimizer
    step_s: float
    workers: int
    waiting_s: float = 0.0  # for the slowest worker: its data and compute less the mean of all
    penalty: float = 0.0  # on the weights, beside the loss
    staleness: int = 0  # updates between the parameters that the gradient was computed from, and this update
    dropped: int = 0  # microbatches that came too late for the quorum
    skipped: int = 0  # microbatches whose loss or gradient was not finite
    skipped_rows: int = 0  # theirs, which are not among the samples
    noise_scale: float | None = None  # rows; see study.noise_scale. Of late, and of the whole run
    critical_batch_size: float | None = None
    loss_scale: float | None = None  # fp16: what the loss was multiplied by before it was differentiated
    overflowed: bool = False  # fp16: the gradient overflowed, and the update was left out
    layers: tuple[LayerLook, ...] = ()  # in the steps that are looked at
    # (incarnation, the plan's step from 0, first shard, stop), as the ledger took them
    taken: tuple[tuple[int, int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """One pass over the validation rows after update `step`. `metrics` always holds "loss"."""

    step: int
    epoch: int
    time_ms: int
    metrics: dict[str, float]
    samples: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Event:
    """Something a person should hear about: a worker joined or was lost, a push was refused, a run stopped early."""

    time_ms: int
    kind: str  # joined, left, lost, lost_host, recovered, refused, restored, checkpoint, skipped, warning, stopped
    message: str
    step: int = 0
    rank: int = -1  # the worker concerned
    launch: int = -1  # the process concerned: each start of a worker or relay has a number of its own
    seconds: float | None = None  # recovered: from the loss to a whole step


@dataclass(frozen=True, slots=True)
class Report:
    """What the server has to say since it was last asked."""

    steps: list[StepRecord] = field(default_factory=list)
    validations: list[ValidationRecord] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
