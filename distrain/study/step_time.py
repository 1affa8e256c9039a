"""A model of a step's time, fitted on measured points, that says what worker counts not run would give. Pure.

With w workers, S shards and B rows a step, a worker computes for

    work = a (S / w) + b (B / w)                 seconds: a for each microbatch, b for each row.

The slowest worker keeps the others waiting: shards that do not divide evenly, and chance, whose largest of w normal
draws grows as sqrt(2 ln w) (the extreme-value bound):

    waiting = work (ceil(S / w) / (S / w) - 1) + work c sqrt(2 ln w)

and the server exchanges one push and one pull with each worker, then updates:

    exchange = d + e w + f w m                   m: megabytes of a push
    update = g

All coefficients are non-negative, found by relative least squares (Lawson and Hanson's NNLS). The model takes for
granted that each worker has its cores, or accelerator, to itself, and that the rows keep coming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from distrain.study.point import Point

_LEAST_S = 1e-12  # less is a difference's rounding, and no time
_RESAMPLES = 200
_SEED = 0


@dataclass(frozen=True)
class Setting:
    """What a step's time depends on."""

    workers: int
    batch_size: int
    shards: int
    num_bytes: int  # of a push

    @property
    def imbalance(self) -> float:
        """The most shards that one worker has, over the mean."""
        return math.ceil(self.shards / self.workers) / (self.shards / self.workers)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, and the bounds within which nine of ten fits to resampled measurements lie."""

    setting: Setting
    step_s: float
    low_s: float
    high_s: float
    parts: dict[str, float]

    @property
    def samples_per_second(self) -> float:
        return self.setting.batch_size / self.step_s


@dataclass(frozen=True)
class StepTime:
    """The fitted coefficients, as in the module's formulae; seconds."""

    per_microbatch: float
    per_row: float
    straggling: float
    exchange: float
    per_message: float
    per_megabyte: float
    update: float

    def parts(self, setting: Setting) -> dict[str, float]:
        """Seconds of each part of a step."""
        w = setting.workers
        work = self.per_microbatch * setting.shards / w + self.per_row * setting.batch_size / w
        return {
            "work": work,
            "waiting": work * (setting.imbalance - 1 + self.straggling * _extreme(w)),
            "exchange": self.exchange + w * (self.per_message + self.per_megabyte * setting.num_bytes / 1e6),
            "update": self.update,
        }

    def step_s(self, setting: Setting) -> float:
        """Seconds of a step."""
        return sum(self.parts(setting).values())


class StepTimeFit:
    """The model fitted to points, and how sure it is. Raises ValueError where no point has step times."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._settings = [Setting(p.workers, p.batch_size, p.shards, p.num_bytes) for p in points if p.blocks]
        self._blocks = [np.asarray(p.blocks) for p in points if p.blocks]
        if not self._settings:
            raise ValueError("no point has measured step times")
        self.model = _fit(self._settings, [blocks.mean(axis=0) for blocks in self._blocks])
        rng = np.random.default_rng(_SEED)
        self._resampled = [
            _fit(self._settings, [b[rng.integers(len(b), size=len(b))].mean(axis=0) for b in self._blocks])
            for _ in range(_RESAMPLES)
        ]
        measured = np.array([blocks.mean(axis=0).sum() for blocks in self._blocks])
        predicted = np.array([self.model.step_s(setting) for setting in self._settings])
        self.error = float(np.sqrt(np.mean((predicted / measured - 1) ** 2)))

    @property
    def most_workers(self) -> int:
        """The largest count measured."""
        return max(setting.workers for setting in self._settings)

    def predict(self, setting: Setting) -> Prediction:
        """Seconds of a step. The band is from the 5th to the 95th percentile of fits to resampled measurements, widened
        by the fit's own error."""
        seconds = [model.step_s(setting) for model in self._resampled]
        low, high = np.percentile(seconds, [5, 95])
        step_s = self.model.step_s(setting)
        low, high = min(low, step_s) * (1 - self.error), max(high, step_s) * (1 + self.error)
        return Prediction(setting, step_s, float(low), float(high), self.model.parts(setting))


def _fit(settings: Sequence[Setting], means: Sequence[NDArray[np.float64]]) -> StepTime:
    data, compute, waiting, exchange, update = np.asarray(means).T
    work = data + compute
    w = np.array([setting.workers for setting in settings], float)
    shards = np.array([setting.shards for setting in settings], float)
    rows = np.array([setting.batch_size for setting in settings], float)
    megabytes = np.array([setting.num_bytes for setting in settings]) / 1e6
    a, b = _solve([shards / w, rows / w], work)
    imbalance = np.array([setting.imbalance - 1 for setting in settings])
    extreme = np.array([_extreme(setting.workers) for setting in settings])
    several = w > 1
    (c,) = _solve([(work * extreme)[several]], np.maximum(waiting - work * imbalance, 0)[several])
    columns = [np.ones_like(w), w] + ([w * megabytes] if len(set(megabytes)) > 1 else [])
    d, e, *f = _solve(columns, exchange)
    return StepTime(a, b, c, d, e, f[0] if f else 0.0, float(update.mean()))


def _solve(columns: Sequence[NDArray[np.float64]], values: NDArray[np.float64]) -> list[float]:
    """Non-negative coefficients whose relative errors are least; 0 where there is nothing to fit."""
    keep = values > _LEAST_S
    if not keep.any():
        return [0.0] * len(columns)
    design = np.stack([column[keep] / values[keep] for column in columns], axis=1)
    scale = np.abs(design).max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(design / scale, np.ones(int(keep.sum())))
    return [float(value) for value in found / scale]


def _extreme(workers: int) -> float:
    return math.sqrt(2 * math.log(workers))
