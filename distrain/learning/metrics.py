"""Validation metrics as sums: added up over microbatches of any size, divided at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from distrain.config import LossConfig
from distrain.learning.losses import align

_LEAST_SPREAD = 1e-13  # of the sum of squares: rounding alone gives less


class Metrics:
    """The metrics that go with a loss: accuracy for classification, mean absolute error and R^2 for regression.

    `sums` gives `num_sums` float64 values for a microbatch; sums of any grouping add up, and `combine` turns the total
    into metrics.
    """

    def __init__(self, loss: LossConfig) -> None:
        self._loss = loss.name if loss.factory is None else None
        self.num_sums = {"cross_entropy": 2, "binary_cross_entropy": 2, "mse": 5}.get(self._loss or "", 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics' names, beside "loss"."""
        if self._loss in ("cross_entropy", "binary_cross_entropy"):
            return ("accuracy",)
        return ("mean_absolute_error", "r2") if self._loss == "mse" else ()

    def sums(self, outputs: Tensor, label: Tensor) -> list[float]:
        """The sums over one microbatch."""
        if self._loss == "cross_entropy":
            return [float((outputs.argmax(1) == label).sum()), float(len(label))]
        if self._loss == "binary_cross_entropy":
            right = (align(outputs, label) > 0) == (label > 0.5)
            return [float(right.sum()), float(right.numel())]
        if self._loss == "mse":
            target = label.to(torch.float64)
            error = align(outputs, label).to(torch.float64) - target
            totals = (error.abs(), error.square(), target, target.square())
            return [*(float(values.sum()) for values in totals), float(target.numel())]
        return [float(len(label))]

    def combine(self, sums: list[float]) -> dict[str, float]:
        """The metrics over everything that was summed. R^2 = 1 - sum of squared errors / sum of squares about the
        mean; left out where the label is constant, as far as sums in float64 can tell."""
        if self._loss in ("cross_entropy", "binary_cross_entropy"):
            return {"accuracy": sums[0] / sums[1]}
        if self._loss == "mse":
            absolute, squared, total, squares, count = sums
            spread = squares - total * total / count
            metrics = {"mean_absolute_error": absolute / count}
            return {**metrics, "r2": 1.0 - squared / spread} if spread > _LEAST_SPREAD * squares else metrics
        return {}
