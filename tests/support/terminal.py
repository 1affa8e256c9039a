"""A terminal in memory."""

from __future__ import annotations

import io

from rich.console import Console


def terminal(width: int = 100, colour: bool = False) -> tuple[Console, io.StringIO]:
    """A console that takes itself for a terminal, and what it shows."""
    shown = io.StringIO()
    return Console(file=shown, force_terminal=True, width=width, no_color=not colour, highlight=False), shown
