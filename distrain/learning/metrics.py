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
        self._kind = loss.kind
        self.num_sums = {"classes": 2, "binary": 2, "numbers": 5}.get(self._kind or "", 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics' names, beside "loss"."""
        if self._kind in ("classes", "binary"):
            return ("accuracy",)
        return ("mean_absolute_error", "r2") if self._kind == "numbers" else ()

    def sums(self, outputs: Tensor, label: Tensor) -> list[float]:
        """The sums over one microbatch."""
        if self._kind == "classes":
            return [float((outputs.argmax(1) == label).sum()), float(len(label))]
        if self._kind == "binary":
            right = (align(outputs, label) > 0) == (label > 0.5)
            return [float(right.sum()), float(right.numel())]
        if self._kind == "numbers":
            target = label.to(torch.float64)
            error = align(outputs, label).to(torch.float64) - target
            spread = target if target.numel() == len(target) else torch.zeros(())  # several labels: see `combine`
            totals = (error.abs(), error.square(), spread, spread.square())
            return [*(float(values.sum()) for values in totals), float(target.numel())]
        return [float(len(label))]

    def combine(self, sums: list[float]) -> dict[str, float]:
        """The metrics over everything that was summed. R^2 = 1 - sum of squared errors / sum of squares about the
        mean; left out where the label is constant, as far as sums in float64 can tell, and where there are several
        labels, each of which has a mean of its own."""
        if self._kind in ("classes", "binary"):
            return {"accuracy": sums[0] / sums[1]}
        if self._kind == "numbers":
            absolute, squared, total, squares, count = sums
            spread = squares - total * total / count
            metrics = {"mean_absolute_error": absolute / count}
            return {**metrics, "r2": 1.0 - squared / spread} if spread > _LEAST_SPREAD * squares else metrics
        return {}
