"""A sweep's figures. Each takes points and gives a figure, or None where the points do not have what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from distrain.study.advice import seconds
from distrain.study.critical_batch import CriticalBatch, fit_critical_batch
from distrain.study.point import PARTS, Point

_PART_COLORS = dict(zip(PARTS, ("#4c9a2a", "#1f6feb", "#e3b341", "#d1580f", "#8250df"), strict=True))
_IDEAL = "#8c959f"
_MANY_DECADES = 300.0  # the ratio of an axis' ends from which on it is labelled at powers of ten only
_MOST_STRETCHES = 40  # of a training loss's curve
_ENOUGH_MOMENTS = 5  # validations that make a curve


def throughput(points: Sequence[Point]) -> Figure | None:
    """Samples a second, and scaling efficiency, against workers: a line for each batch size, and the ideal."""
    measured = [point for point in points if point.samples_per_second]
    if len({point.workers for point in measured}) < 2:
        return None
    figure, (left, right) = _figure(1, 2)
    for label, color, line in _lines(measured):
        line = _best(line, lambda p: p.workers, lambda p: -p.samples_per_second)
        counts, speeds = [p.workers for p in line], [p.samples_per_second for p in line]
        errors = [2 * p.speed_error * p.samples_per_second for p in line]
        left.errorbar(counts, speeds, errors, color=color, marker="o", markersize=4, capsize=2, label=label)
        ideal = speeds[0] / counts[0]
        left.plot(counts, [ideal * w for w in counts], color=color, linestyle=":", alpha=0.6)
        efficiency = [100 * speed / (ideal * w) for speed, w in zip(speeds, counts, strict=True)]
        right.plot(counts, efficiency, color=color, marker="o", markersize=4, label=label)
    left.plot([], [], color=_IDEAL, linestyle=":", label="ideal: in proportion to workers")
    right.axhline(100, color=_IDEAL, linestyle=":")
    left.set(xlabel="workers", ylabel="samples a second", title="Throughput", ylim=(0, None))
    right.set(xlabel="workers", ylabel="% of the ideal", title="Scaling efficiency", ylim=(0, None))
    for axes in (left, right):
        _ticks(axes, sorted({point.workers for point in measured}))
    _plain(left.yaxis)
    left.legend(frameon=False, fontsize=8)
    return figure


def loss_curves(points: Sequence[Point]) -> Figure | None:
    """The validation (else training) loss over samples, steps and seconds: for each batch size its fastest point."""
    shown = [p for p in points if p.losses]
    if not shown:
        return None
    figure, panels = _figure(1, 3, width=13)
    has_validation = all(len(point.moments) >= _ENOUGH_MOMENTS for point in shown)
    for label, color, line in _lines(shown):
        point = min(line, key=lambda p: p.seconds)
        curve: list[tuple[float, float, float, float]]
        if has_validation:
            curve = [(m.samples, m.step, m.seconds, m.metrics["loss"]) for m in point.moments]
        else:
            curve = _smoothed(point.losses)
        for number, axes in enumerate(panels):
            axes.plot([c[number] for c in curve], [c[3] for c in curve], color=color, linewidth=1.4, label=label)
    for axes, label in zip(panels, ("samples", "steps", "seconds of training"), strict=True):
        axes.set(xlabel=label, xscale="log")
        _log_if_wide(axes)
        _plain(axes.xaxis)
        _plain(axes.yaxis)
    kind = "validation loss" if has_validation else "training loss"
    panels[0].set_ylabel(kind)
    figure.suptitle(f"The {kind} of each batch size: over samples, steps, seconds")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def time_to_target(points: Sequence[Point]) -> Figure | None:
    """A heat map of seconds to the target over batch size and workers; of several points in a cell the fastest."""
    if not any(point.target for point in points):
        return None
    sizes, counts = (
        sorted({p.batch_size for p in points if p.workers}),
        sorted({p.workers for p in points if p.workers}),
    )
    values = np.full((len(sizes), len(counts)), np.nan)
    for p in points:
        if p.target is not None:
            cell = sizes.index(p.batch_size), counts.index(p.workers)
            values[cell] = np.nanmin([values[cell], p.target.seconds])
    figure, (axes,) = _figure(1, 1, width=2.5 + 1.3 * len(counts), height=1.8 + 0.55 * len(sizes))
    axes.grid(False)
    norm = LogNorm(np.nanmin(values), max(np.nanmax(values), np.nanmin(values) * 1.01))
    axes.imshow(values, cmap="viridis_r", norm=norm, aspect="auto")
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_yticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    for (row, column), value in np.ndenumerate(values):
        text = "not\nreached" if math.isnan(value) else seconds(value)
        dark = not math.isnan(value) and norm(value) > 0.55
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
    axes.set(xlabel="workers", ylabel="batch size", title="Time to target")
    return figure


def steps_against_samples(points: Sequence[Point]) -> Figure | None:
    """Steps against samples to the target, a dot for each batch size, with the fitted hyperbola."""
    fitted = critical_batch(points)
    if fitted is None:
        return None
    fit, chosen = fitted
    figure, (axes,) = _figure(1, 1)
    sizes = sorted(chosen)
    for size, color in zip(sizes, _colors(len(sizes)), strict=True):
        steps, samples = chosen[size]
        axes.plot(samples, steps, "o", color=color, markersize=7)
        axes.annotate(f"{size:,}", (samples, steps), textcoords="offset points", xytext=(7, 5), fontsize=9)
    batch = np.geomspace(sizes[0] / 2, sizes[-1] * 2, 200)
    curve = np.array([fit.steps(size) for size in batch])
    axes.plot(batch * curve, curve, color=_IDEAL, zorder=0)
    title = "Steps against samples to the target; numbers are batch sizes"
    if math.isfinite(fit.batch_size) and fit.batch_size > 0:
        critical = fit.steps(fit.batch_size)
        axes.plot(fit.batch_size * critical, critical, "*", color="#d1580f", markersize=15)
        title += f"\nstar: the fitted critical batch size, {fit.batch_size:,.0f}"
    axes.set(xscale="log", yscale="log", xlabel="samples", ylabel="steps")
    axes.set_title(title, fontsize=11)
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    return figure


def critical_batch(points: Sequence[Point]) -> tuple[CriticalBatch, dict[int, tuple[int, int]]] | None:
    """The fit, and (steps, samples) to the target for each batch size: the best where there are several."""
    best: dict[int, tuple[int, int]] = {}
    for p in points:
        if p.target is not None and (p.batch_size not in best or p.target.step < best[p.batch_size][0]):
            best[p.batch_size] = (p.target.step, p.target.samples)
    fit = fit_critical_batch(list(best), [steps for steps, _ in best.values()])
    return (fit, best) if fit is not None else None


def where_time_goes(points: Sequence[Point]) -> Figure | None:
    """The parts of a step's time as stacked bars, in milliseconds."""
    measured = [point for point in points if point.blocks]
    if not measured:
        return None
    figure, (axes,) = _figure(1, 1, width=9, height=1.4 + 0.34 * len(measured))
    places = np.arange(len(measured))
    before = np.zeros(len(measured))
    for part in PARTS:
        values = np.array([1000 * point.parts[part] for point in measured])
        axes.barh(places, values, left=before, color=_PART_COLORS[part], label=part, height=0.72)
        before += values
    axes.set_yticks(places, [point.name for point in measured], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds of a step", title="Where a step's time goes")
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=len(PARTS),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12 - 0.5 / len(measured)),
    )
    return figure


def memory(points: Sequence[Point]) -> Figure | None:
    """The most memory a worker held, against batch size."""
    measured = [point for point in points if point.peak_worker_bytes]
    if len({point.batch_size for point in measured}) < 2:
        return None
    figure, (axes,) = _figure(1, 1)
    sizes = sorted({point.batch_size for point in measured})
    peaks = [max(p.peak_worker_bytes for p in measured if p.batch_size == size) / 2**20 for size in sizes]
    axes.plot(sizes, peaks, marker="o", color="#1f6feb")
    axes.set(xscale="log", xlabel="batch size", ylabel="MiB", title="The most memory that a worker held")
    axes.set_ylim(0, 1.2 * max(peaks))
    _ticks(axes, sizes)
    return figure


def regularization(points: Sequence[Point]) -> Figure | None:
    """The least and the last validation loss each batch size reached, and the training loss of its last epoch, the mean
    over that. None where runs ended at a target: they might have come further."""
    measured = [p for p in points if len(p.moments) > 1]
    sizes = sorted({p.batch_size for p in measured})
    if len(sizes) < 2 or any(p.target for p in points):
        return None
    figure, (axes,) = _figure(1, 1)
    least = [min(min(m.metrics["loss"] for m in p.moments) for p in measured if p.batch_size == s) for s in sizes]
    last = [min(p.moments[-1].metrics["loss"] for p in measured if p.batch_size == s) for s in sizes]
    training = [min(p.train_loss for p in measured if p.batch_size == s) for s in sizes]
    axes.plot(sizes, least, marker="o", color="#d1580f", label="least validation loss")
    axes.plot(sizes, last, marker="o", color="#e3b341", linestyle="--", label="last validation loss")
    axes.plot(sizes, training, marker="o", color="#1f6feb", label="training loss of the last epoch")
    axes.set(xscale="log", xlabel="batch size", ylabel="loss", title="Loss reached by each batch size")
    _log_if_wide(axes)
    _ticks(axes, sizes)
    axes.legend(frameon=False)
    return figure


FIGURES: Mapping[str, tuple[Callable[[Sequence[Point]], Figure | None], str]] = {
    "throughput": (
        throughput,
        "Solid: measured, with two standard errors. Dotted: in proportion to the smallest count's.",
    ),
    "loss_curves": (
        loss_curves,
        "Each line is the fastest run of its batch size. Large batches take fewer steps, small ones fewer samples; the "
        "seconds decide.",
    ),
    "time_to_target": (time_to_target, "Training time until validation first reached the target; darker is longer."),
    "steps_against_samples": (
        steps_against_samples,
        "The line: (S/S_min - 1)(E/E_min - 1) = 1, McCandlish et al. 2018.",
    ),
    "where_time_goes": (
        where_time_goes,
        "Data and compute: mean over the workers. Waiting: for the slowest of them. Exchange: links and summing. "
        "Update: average, clip, optimizer.",
    ),
    "regularization": (
        regularization,
        "Smaller batches are noisier, and the noise regularizes where their validation loss ends lower at a like "
        "training loss.",
    ),
    "memory": (memory, "A worker reads its rows as a stream, so what it holds hardly depends on the batch size."),
}


def _figure(rows: int, columns: int, width: float = 9.0, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(rows, columns, number + 1) for number in range(rows * columns)]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, panels


def _lines(points: Sequence[Point]) -> list[tuple[str, str, list[Point]]]:
    """(label, colour, points) of each batch size and each combination of the grid's other values."""
    keys = sorted({(point.batch_size, point.others) for point in points})
    colors = _colors(len(keys))
    return [
        (f"batch {size:,} {others}".strip(), color, [p for p in points if (p.batch_size, p.others) == (size, others)])
        for (size, others), color in zip(keys, colors, strict=True)
    ]


def _smoothed(losses: Sequence[tuple[int, int, float, float]]) -> list[tuple[float, float, float, float]]:
    """(samples, step, seconds, mean loss) of stretches, at most so many, at each stretch's end."""
    size = -(-len(losses) // _MOST_STRETCHES)
    stretches = [losses[first : first + size] for first in range(0, len(losses), size)]
    return [(part[-1][1], part[-1][0], part[-1][2], sum(p[3] for p in part) / len(part)) for part in stretches]


def _best(points: Sequence[Point], key: Callable[[Point], int], cost: Callable[[Point], float]) -> list[Point]:
    """For each value of `key` the point of least cost, in the order of the values."""
    return [min((p for p in points if key(p) == value), key=cost) for value in sorted({key(p) for p in points})]


def _colors(count: int) -> list[str]:
    places = np.linspace(0.05, 0.85, count) if count > 1 else [0.3]
    return [to_hex(colormaps["plasma"](place)) for place in places]


def _ticks(axes: Axes, values: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator([float(value) for value in values]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _plain(axis: Axis) -> None:
    """Numbers in full, 20,000 rather than 2 x 10^4, on an axis that may be logarithmic."""
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        subs = (1.0, 2.0, 5.0) if high < _MANY_DECADES * low else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _log_if_wide(axes: Axes) -> None:
    values = [float(y) for line in axes.get_lines() for y in np.atleast_1d(line.get_ydata()) if np.isfinite(y)]
    if values and min(values) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
