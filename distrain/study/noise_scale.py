"""The gradient noise scale, from norms that training has anyway. Pure.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.1. The gradient of a batch of B rows
has an expected squared norm of |G|^2 + tr(S) / B, G being the true gradient and S the covariance of single rows'
gradients. Two sizes of batch, the step's microbatches and the step itself, give two equations for the two unknowns.
Written for sums of gradients V (of the step's B rows) and v_i (of its microbatches' b_i rows, which may differ):

    E sum |v_i|^2 = |G|^2 sum b_i^2 + tr(S) B
    E |V|^2       = |G|^2 B^2       + tr(S) B

The simple noise scale is tr(S) / |G|^2, in rows: a batch much smaller than it is mostly noise, one much larger mostly
repeats itself. Both unknowns are averaged before the division, since the quotient of single estimates is biased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EVERY_STEPS = 8  # microbatches' norms are taken so often: one costs up to 2 % of its forward and backward
_DECAY = 0.9  # of the moving averages


class NoiseScale:
    """Averages the estimates of a run: moving averages for `now`, totals for `overall`."""

    def __init__(self) -> None:
        self._moving = [0.0, 0.0]  # tr(S), |G|^2
        self._total = [0.0, 0.0]

    def add(self, squares: float, step_square: float, sizes: Sequence[int]) -> None:
        """Take in one step: the sum of |v_i|^2, |V|^2, and the microbatches' rows. One microbatch says nothing."""
        sizes = [size for size in sizes if size]
        rows = sum(sizes)
        if len(sizes) < 2 or not (math.isfinite(squares) and math.isfinite(step_square)):
            return
        share = sum(size * size for size in sizes) / rows**2
        noise = (squares - share * step_square) / (rows * (1 - share))
        signal = (step_square - rows * noise) / rows**2
        for total, moving, value, index in zip(self._total, self._moving, (noise, signal), (0, 1), strict=True):
            self._total[index] = total + value
            self._moving[index] = _DECAY * moving + (1 - _DECAY) * value

    @property
    def now(self) -> float | None:
        """The noise scale of late, in rows; None while noise drowns the estimate."""
        return _quotient(*self._moving)

    @property
    def overall(self) -> float | None:
        """That of the whole run: the paper's estimate of the critical batch size."""
        return _quotient(*self._total)


def _quotient(noise: float, signal: float) -> float | None:
    return noise / signal if noise > 0 and signal > 0 else None
