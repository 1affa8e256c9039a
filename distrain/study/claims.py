"""What textbooks claim of minibatches, checked against a sweep's points: a sentence with numbers each. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from distrain.study.advice import seconds
from distrain.study.point import Point


def claims(points: Sequence[Point]) -> list[str]:
    """The sentences for which there are measurements: several batch sizes, and several worker counts."""
    finished = [point for point in points if point.is_finished]
    found = [_same_time(finished), _regularization(finished), _memory(finished), _speed_up(finished)]
    return [sentence for sentence in found if sentence]


def loss_after(point: Point, time_s: float) -> float | None:
    """The last validation loss by then; None before the first validation."""
    losses = [moment.metrics["loss"] for moment in point.moments if moment.seconds <= time_s]
    return losses[-1] if losses else None


def _by_size(points: Sequence[Point]) -> dict[int, list[Point]]:
    return {size: [p for p in points if p.batch_size == size] for size in sorted({p.batch_size for p in points})}


def _same_time(points: Sequence[Point]) -> str | None:
    """Validation loss after the same time: as long as the run that ended first took."""
    by_size = _by_size([point for point in points if len(point.moments) > 1])
    if len(by_size) < 2:
        return None
    time_s = min(point.moments[-1].seconds for group in by_size.values() for point in group)
    losses = {
        size: min(losses)
        for size, group in by_size.items()
        if (losses := [loss for point in group if (loss := loss_after(point, time_s)) is not None])
    }
    told = ", ".join(f"{loss:.4g} with {size:,}" for size, loss in losses.items())
    return f"convergence: after the same {seconds(time_s)} of training, validation loss was {told} rows a step."


def _regularization(points: Sequence[Point]) -> str | None:
    """The least validation loss. None where runs ended at a target: they might have come further."""
    by_size = _by_size([point for point in points if len(point.moments) > 1])
    if len(by_size) < 2 or any(point.target for point in points):
        return None
    least = {s: min(min(m.metrics["loss"] for m in p.moments) for p in group) for s, group in by_size.items()}
    best = min(least, key=lambda size: least[size])
    told = ", ".join(f"{loss:.4g} with {size:,}" for size, loss in least.items())
    return f"regularization: the least validation loss of each batch size was {told}; the lowest with {best:,} rows."


def _memory(points: Sequence[Point]) -> str | None:
    peaks = {s: max(p.peak_worker_bytes for p in group) for s, group in _by_size(points).items()}
    peaks = {size: peak for size, peak in peaks.items() if peak}
    if len(peaks) < 2:
        return None
    small, large = min(peaks), max(peaks)
    return (
        f"memory: a worker held {peaks[small] / 2**20:.0f} MiB at most with {small:,} rows a step and "
        f"{peaks[large] / 2**20:.0f} MiB with {large:,}."
    )


def _speed_up(points: Sequence[Point]) -> str | None:
    """The most that more workers gave at any batch size."""
    gains = []
    for size, group in _by_size([point for point in points if point.samples_per_second]).items():
        fewest, most = min(p.workers for p in group), max(p.workers for p in group)
        if fewest < most:
            speeds = {w: max(p.samples_per_second for p in group if p.workers == w) for w in (fewest, most)}
            gains.append((speeds[most] / speeds[fewest], size, fewest, most))
    if not gains:
        return None
    gain, size, fewest, most = max(gains)
    worst, at, *_ = min(gains)
    return (
        f"speed-up: {most} workers were {gain:.2f} times as fast as {fewest} with {size:,} rows a step, the most,"
        f" and {worst:.2f} times with {at:,}, the least."
    )
