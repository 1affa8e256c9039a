"""From step records to points on curves: every step at first, means later, in bounded memory. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from distrain.records import StepRecord, ValidationRecord
from distrain.step_sums import StepSums

_MEAN_MS = 500
_SHARE = 0.01  # of the time since the first step: so long may a mean be that is to look like a point on the curve
_ILLEGAL = re.compile(r"[^\w.\- /]")
_MAX_KEY_CHARS = 250
_MAX_WAITING = 20_000  # groups not yet drained; beyond, neighbours are merged


class Point(NamedTuple):
    """One value of one curve."""

    key: str
    value: float  # NaN where the value was not finite
    time_ms: int
    step: int


def step_speed_points(steps: StepSums) -> list[Point]:
    """Throughput, where the time goes, and the parameter server's state."""
    n, seconds = steps.num_steps, steps.step_s or math.nan
    values = {
        "throughput/samples_per_sec": steps.samples / seconds,
        "throughput/bytes_per_sec": steps.num_bytes / seconds,
        "time/data_sec": steps.data_s / n,
        "time/compute_sec": steps.compute_s / n,
        "time/waiting_sec": steps.waiting_s / n,
        "time/exchange_sec": steps.exchange_s / n,
        "time/update_sec": steps.update_s / n,
        "time/step_sec": steps.step_s / n,
        "ps/staleness": steps.staleness / n,
        "ps/clipped": steps.num_clipped / n,  # the share of the steps
        "workers/alive": float(steps.workers),
    }
    if steps.dropped:
        values["ps/dropped"] = steps.dropped / n  # microbatches that came too late for the quorum
    if steps.loss_scale is not None:
        values["train/loss_scale"] = steps.loss_scale
        values["ps/overflowed"] = steps.num_overflowed / n  # updates left out, since a gradient overflowed in fp16
    if steps.noise_scale is not None:
        values["study/noise_scale"] = steps.noise_scale
    if steps.critical_batch_size is not None:
        values["study/critical_batch_size"] = steps.critical_batch_size
    # Six digits: more are noise, which the charts would zoom into.
    return _points({key: float(f"{value:.6g}") for key, value in values.items()}, steps)


def step_learning_points(steps: StepSums) -> list[Point]:
    """The learning rate, the gradient's norm, the loss. The loss is last: where it was stored, all was."""
    values = {"train/penalty": steps.penalty / steps.num_steps} if steps.penalty else {}
    if steps.skipped_rows:
        values["train/skipped_rows"] = float(steps.skipped_rows)
    values |= {
        "train/lr": steps.lr,
        "train/grad_norm": steps.grad_norm / ((steps.num_steps - steps.num_overflowed) or math.nan),
        "train/loss": steps.loss,
    }
    return _points(values, steps)


def legal(key: str) -> str:
    """The name of a metric or param as MLflow takes it."""
    return _ILLEGAL.sub("_", key)[:_MAX_KEY_CHARS]


def layer_points(record: StepRecord) -> list[Point]:
    """What was seen of each layer, at this very step."""
    values = {
        legal(f"layer/{layer.name}/{name}"): value
        for layer in record.layers
        for name in ("grad_norm", "update_ratio", "activation_norm", "dead_share")
        if (value := getattr(layer, name)) is not None
    }
    return [Point(key, _finite(value), record.time_ms, record.step) for key, value in values.items()]


def _points(values: dict[str, float], steps: StepSums) -> list[Point]:
    return [Point(key, _finite(value), steps.time_ms, steps.step) for key, value in values.items()]


def validation_points(record: ValidationRecord) -> list[Point]:
    """One point for each metric, under val/. The loss is last."""
    keys = sorted(record.metrics, key=lambda key: (key == "loss", key))
    return [Point(f"val/{key}", _finite(record.metrics[key]), record.time_ms, record.step) for key in keys]


class Thinner:
    """Groups step records. `every_steps`: means over so many steps; None: means of the loss, the gradient's norm and
    the learning rate over a hundredth of the time since the first step, at most half a second, so that the first steps
    have a point each.

    Speeds and times of single steps are mostly noise, and each point costs 0.2 ms of processor to store: with
    `every_steps` None they are means over half a second from the first step on.
    """

    def __init__(self, every_steps: int | None) -> None:
        self._layers: list[Point] = []
        self._first_ms: int | None = None  # time of the first step
        if every_steps is not None:
            self._learning = self._speed = _Series(lambda group, _: group.num_steps >= every_steps)
        else:
            self._speed = _Series(_half_a_second)
            self._learning = _Series(self._is_wide_enough)

    def add(self, record: StepRecord) -> None:
        """Take in the next step. Constant time."""
        if self._first_ms is None:
            self._first_ms = record.time_ms
        self._speed.add(record)
        if self._learning is not self._speed:
            self._learning.add(record)
        if record.layers:
            self._layers += layer_points(record)

    def _is_wide_enough(self, group: StepSums, record: StepRecord) -> bool:
        assert self._first_ms is not None
        return record.time_ms - group.start_ms >= min(_MEAN_MS, _SHARE * (record.time_ms - self._first_ms))

    def drain(self, finish: bool = False) -> list[Point]:
        """The points finished since the last call; with `finish` also those of a group not yet full."""
        speed = self._speed.drain(finish)
        learning = speed if self._learning is self._speed else self._learning.drain(finish)
        layers, self._layers = self._layers[:_MAX_WAITING], []
        points = layers + [point for group in speed for point in step_speed_points(group)]
        points += [point for group in learning for point in step_learning_points(group)]
        points.sort(key=lambda point: point.step)  # stable: within a step the loss stays last
        return points


class _Series:
    """Groups at one resolution. `is_full(group, next_record)` closes a group before the record is added."""

    def __init__(self, is_full: Callable[[StepSums, StepRecord], bool]) -> None:
        self._is_full = is_full
        self._open: StepSums | None = None
        self._closed: list[StepSums] = []

    def add(self, record: StepRecord) -> None:
        if self._open is not None and self._is_full(self._open, record):
            self._close(self._open)
            self._open = None
        if self._open is None:
            self._open = StepSums.of(record)
        else:
            self._open.merge(StepSums.of(record))

    def _close(self, group: StepSums) -> None:
        self._closed.append(group)
        if len(self._closed) >= _MAX_WAITING:
            pairs = zip(self._closed[::2], self._closed[1::2], strict=True)
            self._closed = [_merged(first, second) for first, second in pairs]

    def drain(self, finish: bool) -> list[StepSums]:
        if finish and self._open is not None:
            self._close(self._open)
            self._open = None
        closed, self._closed = self._closed, []
        return closed


def _merged(first: StepSums, second: StepSums) -> StepSums:
    first.merge(second)
    return first


def _half_a_second(group: StepSums, record: StepRecord) -> bool:
    return record.time_ms - group.start_ms >= _MEAN_MS


def _finite(value: float) -> float:
    # MLflow stores inf as 1.8e308, which no chart survives.
    return value if math.isfinite(value) else math.nan
