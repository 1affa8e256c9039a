"""A run's loss landscape as a picture."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distrain.study.landscape import Landscape, Surface

_PATH = "#d1580f"
_ROWS = {"validation": "validation", "train": "training", "other": "other"}
_LEVELS = 22
_WIDE = 8.0  # the ratio of losses from which on levels are logarithmic
_HIGHEST = 0.97  # quantile of the losses, above which nothing is told apart


def draw(found: Landscape) -> Figure:
    """Contours of the loss: left over the plane of the run's path, with the path on it; right over random directions,
    about its last parameters."""
    surfaces = [surface for surface in (found.path, found.random) if surface is not None]
    figure = Figure(figsize=(6.1 * len(surfaces), 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for place, surface in enumerate(surfaces):
        axes = figure.add_subplot(1, len(surfaces), place + 1)
        _contours(figure, axes, surface)
        if surface is found.path:
            _path(axes, found)
        else:
            axes.plot(0, 0, "*", color=_PATH, markersize=14, markeredgecolor="white", zorder=4)
            axes.set(xlabel="first random direction", ylabel="second random direction")
            axes.set_title("Two random directions, scaled filter by filter;\nstar: the last parameters", fontsize=10)
    figure.suptitle(f"Loss of {found.num_rows:,} {_ROWS[found.rows_of]} rows around {found.run_name}", fontsize=12)
    return figure


def _contours(figure: Figure, axes: Axes, surface: Surface) -> None:
    loss = surface.loss
    finite = loss[np.isfinite(loss)]
    low, high = float(finite.min()), float(np.quantile(finite, _HIGHEST))
    high = max(high, low + 1e-9)
    norm: Normalize
    if low > 0 and high / low > _WIDE:
        norm, levels = LogNorm(low, high), np.geomspace(low, high, _LEVELS)
    else:
        norm, levels = Normalize(low, high), np.linspace(low, high, _LEVELS)
    shown = np.clip(np.nan_to_num(loss, posinf=high), low, high)
    filled = axes.contourf(surface.x, surface.y, shown, levels=levels, norm=norm, cmap="viridis", extend="max")
    lines = axes.contour(surface.x, surface.y, shown, levels=levels[1:-1:3], colors="white", linewidths=0.6, alpha=0.7)
    axes.clabel(lines, fmt="%.3g", fontsize=7)
    bar = figure.colorbar(filled, ax=axes, shrink=0.85, ticks=levels[::3], format="%.3g")
    bar.set_label("loss")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _path(axes: Axes, found: Landscape) -> None:
    assert found.path is not None and found.path.shares is not None
    x, y = found.path.path[:, 0], found.path.path[:, 1]
    axes.plot(x, y, "-", color="white", linewidth=3.2, zorder=3)
    axes.plot(x, y, "-o", color=_PATH, linewidth=1.6, markersize=4.5, markeredgecolor="white", zorder=4)
    axes.plot(x[-1], y[-1], "*", color=_PATH, markersize=15, markeredgecolor="white", zorder=5)
    every = max(1, len(x) // 5)
    for place in {0, len(x) - 1, *range(0, len(x) - 1, every)}:
        axes.annotate(f"step {found.steps[place]:,}", (x[place], y[place]), xytext=(7, 6), textcoords="offset points",
                      fontsize=7.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.75},
                      zorder=6)  # fmt: skip
    first, second = found.path.shares
    axes.set(xlabel=f"first direction of the path ({first:.0%} of its variation)",
             ylabel=f"second direction ({second:.0%})")  # fmt: skip
    axes.set_title("The plane of the run's path", fontsize=10)
