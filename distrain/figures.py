"""Data to figure. No pyplot: a figure here belongs to whoever asked for it, and no screen is needed."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Curve = tuple[Sequence[int], Sequence[float]]  # steps, values

_TRAINING, _VALIDATION = "#1f6feb", "#d1580f"
_SMOOTH_ABOVE = 200  # points, from which on a running mean is drawn too


def loss_curve(training: Curve, validation: Curve = ((), ()), title: str = "Loss") -> Figure:
    """The loss over the steps: of training, with a running mean where there are many points, and of validation.

    Steps ascend. Values that are not finite are left out. The scale is logarithmic where the loss is positive and
    spans two decades.
    """
    steps, losses = _finite(training)
    validation_steps, validation_losses = _finite(validation)
    figure, axes = _axes()
    if len(steps) > _SMOOTH_ABOVE:
        axes.plot(steps, losses, color=_TRAINING, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(steps, losses), color=_TRAINING, label="training (running mean)")
    elif steps:
        axes.plot(steps, losses, color=_TRAINING, label="training", marker="o" if len(steps) == 1 else None)
    if validation_steps:
        axes.plot(validation_steps, validation_losses, color=_VALIDATION, marker="o", markersize=4, label="validation")
    _scale(axes, losses + validation_losses)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if steps or validation_steps:
        axes.legend(frameon=False)
    return figure


def staleness_histogram(updates: Mapping[int, int]) -> Figure:
    """How stale gradients were: `updates` counts the updates of each staleness, itself counted in updates."""
    figure, axes = _axes()
    values = range(max(updates) + 1)
    total = sum(updates.values())
    axes.bar(values, [100 * updates.get(value, 0) / total for value in values], width=0.85, color=_TRAINING)
    mean = sum(value * count for value, count in updates.items()) / total
    axes.axvline(mean, color=_VALIDATION, linestyle="--", label=f"mean {mean:.2f}")
    axes.set(xlabel="updates between reading the parameters and applying the gradient", ylabel="% of updates")
    axes.set_title(f"Staleness of {total:,} updates")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _finite(curve: Curve) -> tuple[list[int], list[float]]:
    pairs = [(step, value) for step, value in zip(*curve, strict=True) if math.isfinite(value)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _running_mean(steps: list[int], values: list[float]) -> list[float]:
    """Mean of the values at most 1 % of all steps away. In steps, since later points may stand for many steps each."""
    sums = [0.0, *accumulate(values)]
    reach = (steps[-1] - steps[0]) / 100
    bounds = [(bisect_left(steps, step - reach), bisect_right(steps, step + reach)) for step in steps]
    return [(sums[stop] - sums[first]) / (stop - first) for first, stop in bounds]


def _scale(axes: Axes, values: list[float]) -> None:
    if values and min(values) > 0 and max(values) / min(values) > 100:
        axes.set_yscale("log")
