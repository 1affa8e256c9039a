"""Steps against samples to a target, over batch sizes: the fit that gives the critical batch size. Pure.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", equation 2.11: training to a target takes S steps
and E = B S samples with (S / S_min - 1)(E / E_min - 1) = 1. So S = S_min + E_min / B, a line in 1 / B, and the critical
batch size is E_min / S_min: there a run takes twice the fewest steps and twice the fewest samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True)
class CriticalBatch:
    """The fit: fewest steps, fewest samples, and the root mean square of its relative errors in steps."""

    min_steps: float
    min_samples: float
    error: float

    @property
    def batch_size(self) -> float:
        """The critical batch size, in rows; infinite where even the largest batch still paid in full."""
        return self.min_samples / self.min_steps if self.min_steps > 0 else float("inf")

    def steps(self, batch_size: float) -> float:
        """Steps to the target."""
        return self.min_steps + self.min_samples / batch_size


def fit_critical_batch(batch_sizes: Sequence[float], steps: Sequence[float]) -> CriticalBatch | None:
    """Fit the steps to target that runs of these batch sizes took, by relative least squares. None below two sizes."""
    if len(set(batch_sizes)) < 2:
        return None
    sizes, taken = np.asarray(batch_sizes, float), np.asarray(steps, float)
    design = np.stack([np.ones_like(sizes), 1 / sizes], axis=1) / taken[:, None]
    scale = np.abs(design).max(axis=0)  # so that neither column is lost to rounding
    (few, samples), _ = nnls(design / scale, np.ones_like(taken))
    few, samples = few / scale[0], samples / scale[1]
    errors = (few + samples / sizes) / taken - 1
    return CriticalBatch(float(few), float(samples), float(np.sqrt(np.mean(errors**2))))
