"""What `distrain checkpoints` shows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distrain.checkpoint import Listed
from distrain.progress.standing import size


def show_checkpoints(listed: Sequence[Listed], console: Console | None = None) -> None:
    """Print a table: on standard output unless another console is given, since it is what was asked for."""
    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("checkpoint", overflow="fold")
    for name in ("step", "epoch", "size"):
        table.add_column(name, justify="right")
    for name in ("written", "validation", "state"):
        table.add_column(name, overflow="fold")
    for entry in listed:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in entry.metrics.items())
        state = Text("good" + (", the best" if entry.is_best else ""))
        if entry.problem is not None:
            state = Text(entry.problem.removeprefix(f"{entry.path}/"), "bold red")
        table.add_row(
            Text(str(entry.path)),
            f"{entry.step:,}",
            "" if entry.epoch is None else f"{entry.epoch:,}",
            size(entry.num_bytes),
            (entry.created or "").replace("T", " ").removesuffix("+00:00"),
            metrics,
            state,
        )
    console.print(table)
