"""Progress where there is no terminal: a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console

from distrain.progress.protocol import HasJson, RunInfo
from distrain.progress.standing import (
    Standing,
    duration,
    event_line,
    headline,
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

_WIDTH = 160  # of the summary, so that paths stay whole in a log


class LineProgress:
    """One line every `every_s` seconds, and one for each validation and event."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 3.0) -> None:
        self._stream = lasting(stream if stream is not None else sys.stderr)
        self._every_s = every_s
        self._next_at = 0.0
        self._standing: Standing | None = None

    def phase(self, text: str) -> None:
        """See Progress."""
        self.note(text)

    def started(self, info: RunInfo) -> None:
        """See Progress."""
        self._standing = Standing(info)
        self._next_at = time.monotonic() + self._every_s
        self.note(headline(info))

    def report(self, report: Report) -> None:
        """See Progress."""
        for event in report.events:
            self.note(event_line(event))
        if self._standing is None:
            return
        self._standing.add(report)
        if time.monotonic() >= self._next_at and report.steps:
            self._next_at = time.monotonic() + self._every_s
            self.note(step_line(self._standing))
        for validation in report.validations:
            self.note(validation_line(validation))

    def note(self, message: str) -> None:
        """See Progress."""
        print(message, file=self._stream, flush=True)

    def finished(self, result: Mapping[str, Any] | HasJson) -> None:
        """See Progress."""
        show_summary(result, self._standing, Console(file=self._stream, width=_WIDTH, highlight=False))

    def close(self) -> None:
        """See Progress."""


def step_line(standing: Standing) -> str:
    """How the run stands, in one line."""
    now, info = standing.now, standing.info
    told = [f"epoch {standing.epoch}/{info.epochs}", f"step {standing.step:,}/{info.total_steps:,}"]
    if now is not None:
        told += [
            f"loss {number(now.loss)}",
            f"{samples_per_second(now):,.0f} samples/s",
            " ".join(f"{part} {share:.0%}" for part, share in shares(now).items()),
            plural(now.workers, "worker"),
        ]
    left = remaining_s(standing)
    if left is not None:
        told.append(f"{duration(left)} left")
    return "  ".join(told)
