"""Progress on a terminal."""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from distrain.progress.protocol import HasJson, RunInfo
from distrain.progress.standing import (
    Standing,
    duration,
    event_line,
    headline,
    metrics_line,
    number,
    plural,
    remaining_s,
    samples_per_second,
    shares,
    validation_line,
)
from distrain.progress.stream import lasting
from distrain.progress.summary import show_summary
from distrain.records import Report

_BAR_CELLS = 30
# Fillings that can be told apart without colour.
_LOOKS = {"data": ("█", "#", "cyan"), "compute": ("▓", "=", "green"),
          "waiting": ("·", "_", "white"), "exchange": ("▒", "-", "yellow"),
          "update": ("░", ".", "magenta")}  # fmt: skip


class TerminalProgress:
    """A few live lines at the bottom of the terminal; validations and events scroll by above them."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=lasting(sys.stderr), highlight=False)
        self._lock = threading.Lock()
        self._standing: Standing | None = None
        self._phase: Spinner | None = None
        self._started_at = time.monotonic()
        self._live: Live | None = None

    def phase(self, text: str) -> None:
        """See Progress."""
        with self._lock:
            self._phase = Spinner("dots", Text(text)) if not self._console.options.ascii_only else Spinner("line", text)
        self._show()

    def started(self, info: RunInfo) -> None:
        """See Progress."""
        self.note(headline(info))
        with self._lock:
            self._standing, self._started_at, self._phase = Standing(info), time.monotonic(), None
        self._show()

    def report(self, report: Report) -> None:
        """See Progress."""
        for event in report.events:
            self.note(event_line(event))
        for validation in report.validations:
            self.note(validation_line(validation))
        with self._lock:
            if self._standing is not None:
                self._standing.add(report)

    def note(self, message: str) -> None:
        """See Progress."""
        self._console.print(Text(message), soft_wrap=True)

    def finished(self, result: Mapping[str, Any] | HasJson) -> None:
        """See Progress."""
        self.close()
        show_summary(result, self._standing, self._console)

    def close(self) -> None:
        """See Progress."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
            atexit.unregister(self.close)

    def _show(self) -> None:
        if self._live is None:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # a result in a pipe stays there
            )
            self._live.start()
            atexit.register(self.close)  # a hidden cursor would outlive us

    def _render(self) -> RenderableType:
        with self._lock:
            if self._standing is None:
                return self._phase or Text()
            elapsed_s = time.monotonic() - self._started_at
            lines = render(self._standing, elapsed_s, self._console.options.ascii_only)
            return lines if self._phase is None else Group(lines, self._phase)


def render(standing: Standing, elapsed_s: float, ascii_only: bool = False) -> RenderableType:
    """The live lines: where the run is, how it learns, where its time goes."""
    info, now, left = standing.info, standing.now, remaining_s(standing)
    where = Table.grid(padding=(0, 2))
    where.add_row(
        Text(f"epoch {standing.epoch}/{info.epochs}", "bold"),
        Text(f"step {standing.step:,}/{info.total_steps:,}"),
        ProgressBar(total=max(info.total_steps, 1), completed=standing.step, width=_BAR_CELLS),
        Text(f"{min(1.0, standing.step / max(info.total_steps, 1)):.0%}"),
        Text(f"{duration(elapsed_s)} elapsed" + (f", {duration(left)} left" if left is not None else ""), "dim"),
    )
    if now is None:
        return Group(where, Text("waiting for the first step", "dim"))
    learns = Text.assemble(
        ("loss ", "bold"), (number(now.loss), "bold"),
        f"   {samples_per_second(now):,.0f} samples/s   {plural(now.workers, 'worker')}",
        ("" if now.workers >= info.num_workers else f" of {info.num_workers}", "bold red"),
        f"   gradient {number(now.grad_norm / now.num_steps)}   rate {number(now.lr)}",
    )  # fmt: skip
    lines: list[RenderableType] = [where, learns, _time_bar(shares(now), ascii_only)]
    if standing.validation is not None:
        best = standing.validation
        lines.insert(2, Text(f"validation {metrics_line(best.metrics)} (step {best.step:,})"))
    return Group(*lines)


def _time_bar(parts: Mapping[str, float], ascii_only: bool) -> Text:
    """A bar of 40 cells divided among the parts, with a legend."""
    bar, legend, filled, before = Text("time "), Text("  "), 0, 0.0
    for part, share in parts.items():
        filling, plain, colour = _LOOKS[part]
        glyph = plain if ascii_only else filling
        before += share
        cells = round(before * _BAR_CELLS) - filled
        filled += cells
        bar.append(glyph * cells, colour)
        legend.append(f"{glyph} ", colour).append(f"{part} {share:.0%}  ")
    return bar.append_text(legend)
