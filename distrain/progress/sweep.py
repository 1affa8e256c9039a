"""What a sweep tells while it goes on, and its table."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distrain.progress.standing import metrics_line, number, plural
from distrain.progress.stream import lasting
from distrain.study.advice import seconds

if TYPE_CHECKING:
    from distrain.study.forecast import Forecast
    from distrain.study.point import Point


class SweepProgress:
    """Says nothing."""

    def began(self, name: str, num_points: int, num_finished: int) -> None:
        """A sweep of so many points begins, of which some are finished already."""

    def point_began(self, name: str) -> None: ...

    def point_ended(self, point: Point) -> None: ...

    def note(self, point: str, text: str) -> None:
        """Something about a point that a person should know. May be called from any thread."""


class SweepLines(SweepProgress):
    """A line on standard error for each point's beginning and end."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=lasting(sys.stderr), highlight=False)
        self._num_points = self._num_ended = 0

    def began(self, name: str, num_points: int, num_finished: int) -> None:
        self._num_points, self._num_ended = num_points, num_finished
        before = f", {num_finished} of them finished before" if num_finished else ""
        self._say(Text(f"sweep {name}: {plural(num_points, 'point')}{before}"))

    def point_began(self, name: str) -> None:
        self._say(Text(f"  {name}: begins", "dim"))

    def point_ended(self, point: Point) -> None:
        self._num_ended += 1
        style = "" if point.is_finished else "bold red"
        self._say(Text(f"[{self._num_ended}/{self._num_points}] {point_line(point)}", style))

    def note(self, point: str, text: str) -> None:
        self._say(Text(f"  {point}: {text}", "dim"))

    def _say(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


def point_line(point: Point) -> str:
    """A point in one line."""
    if not point.is_finished:
        return f"{point.name}: {point.status}: {point.reason.splitlines()[0] if point.reason else ''}"
    told = [f"{point.samples_per_second:,.0f} samples/s", metrics_line(point.validation)]
    if point.target is not None:
        target = point.target
        told.append(f"target after {plural(target.step, 'step')}, {plural(target.samples, 'sample')}, "
                    f"{seconds(target.seconds)}")  # fmt: skip
    return f"{point.name}: " + ", ".join(text for text in told if text)


def show_points(points: Sequence[Point], has_target: bool, console: Console | None = None) -> None:
    """Print a sweep's points as a table on standard output."""
    columns = [*points[0].values, "samples/s", "step", "loss", "metric"]
    columns += ["to target: steps", "samples", "time", "worker time"] if has_target else ["time"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for point in points:
        table.add_row(*map(str, point.values.values()), *_cells(point, has_target))
    (console or _wide()).print(table)


def _cells(point: Point, has_target: bool) -> list[str]:
    if not point.is_finished:
        return [point.status]
    loss = point.validation.get("loss", point.train_loss)
    others = {name: value for name, value in point.validation.items() if name != "loss"}
    first = next(iter(others.items()), None)
    cells = [
        f"{point.samples_per_second:,.0f}",
        f"{1000 * point.step_s:.2f} ms",
        number(loss) if math.isfinite(loss) else "-",
        f"{first[0]} {number(first[1])}" if first else "-",
    ]
    if not has_target:
        return [*cells, seconds(point.seconds)]
    if point.target is None:
        return [*cells, "not reached"]
    t = point.target
    return [*cells, f"{t.step:,}", f"{t.samples:,}", seconds(t.seconds), seconds(t.seconds * point.workers)]


def show_comparison(rows: Sequence[Mapping[str, str]], console: Console | None = None) -> None:
    """Print runs side by side: a row for each param or metric, a column for each run. Params that agree are left out by
    whoever calls this."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number_, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if number_ == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    (console or _wide()).print(table)


def show_forecasts(forecasts: Sequence[Forecast], console: Console | None = None) -> None:
    """Print what worker counts not run would give."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("workers", "step", "samples/s", "between", "epoch", "to target"):
        table.add_column(column, justify="right")
    for forecast in forecasts:
        p = forecast.prediction
        low, high = (p.setting.batch_size / bound for bound in (p.high_s, p.low_s))
        table.add_row(
            f"{p.setting.workers:,}",
            f"{1000 * p.step_s:.2f} ms",
            f"{p.samples_per_second:,.0f}",
            f"{low:,.0f} and {high:,.0f}",
            seconds(forecast.epoch_s),
            "-" if forecast.target_s is None else seconds(forecast.target_s),
        )
    (console or _wide()).print(table)


def _wide() -> Console:
    """Standard output; where it is no terminal, wide enough for any table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
