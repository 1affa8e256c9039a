"""What worker counts not run would give, from a sweep's points. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distrain.errors import ConfigError
from distrain.study.critical_batch import fit_critical_batch
from distrain.study.point import Point
from distrain.study.step_time import Prediction, Setting, StepTimeFit


@dataclass(frozen=True)
class Forecast:
    """A worker count's step, epoch, and training to the target where the points had one."""

    prediction: Prediction
    epoch_s: float
    target_s: float | None


def forecast(
    points: Sequence[Point], workers: Sequence[int], batch_size: int, shards: int | None, steps_per_epoch: int
) -> list[Forecast]:
    """Predict each worker count, with `shards` None for as many as workers.

    Steps to the target are those measured at this batch size, else of the fit over batch sizes: they do not depend on
    the worker count. Raises ConfigError where nothing was measured.
    """
    measured = [point for point in points if point.is_finished and point.blocks]
    try:
        fit = StepTimeFit(measured)
    except ValueError as error:
        raise ConfigError(f"the sweep cannot be used: {error}") from None
    num_bytes = max(point.num_bytes for point in measured)
    steps = steps_to_target(points, batch_size)
    found = []
    for count in workers:
        prediction = fit.predict(Setting(count, batch_size, shards or count, num_bytes))
        target_s = steps * prediction.step_s if steps is not None else None
        found.append(Forecast(prediction, steps_per_epoch * prediction.step_s, target_s))
    return found


def steps_to_target(points: Sequence[Point], batch_size: int) -> float | None:
    """Steps to the target at a batch size: measured (the mean), else fitted; None where neither is there."""
    reached = [(point.batch_size, point.target.step) for point in points if point.target is not None]
    same = [steps for size, steps in reached if size == batch_size]
    if same:
        return sum(same) / len(same)
    fit = fit_critical_batch([size for size, _ in reached], [steps for _, steps in reached])
    return fit.steps(batch_size) if fit is not None else None
