"""What the person at the terminal sees. Everything goes to standard error, but what a command was asked to print."""

from __future__ import annotations

import sys

from distrain.progress.checkpoints import show_checkpoints
from distrain.progress.findings import show_finding
from distrain.progress.gradients import show_gradients
from distrain.progress.lines import LineProgress
from distrain.progress.plan import show_plan
from distrain.progress.protocol import Progress, RunInfo, SilentProgress
from distrain.progress.sweep import SweepLines, SweepProgress, show_comparison, show_forecasts, show_points
from distrain.progress.terminal import TerminalProgress

__all__ = [
    "LineProgress",
    "Progress",
    "RunInfo",
    "SilentProgress",
    "SweepLines",
    "SweepProgress",
    "TerminalProgress",
    "make_progress",
    "show_checkpoints",
    "show_comparison",
    "show_finding",
    "show_forecasts",
    "show_gradients",
    "show_plan",
    "show_points",
]


def make_progress() -> Progress:
    """Live lines when standard error is a terminal, else a line every few seconds."""
    return TerminalProgress() if sys.stderr.isatty() else LineProgress()
