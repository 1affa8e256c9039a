"""What `distrain check-gradients` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Compared(Protocol):
    """A parameter whose gradient was checked."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def forward(self) -> float | None: ...
    @property
    def central(self) -> float: ...
    @property
    def entry(self) -> tuple[int, ...]: ...
    @property
    def verdict(self) -> str: ...
    @property
    def note(self) -> str: ...


def show_gradients(parameters: Sequence[Compared], console: Console | None = None) -> None:
    """Print a row for each parameter on standard output."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("parameter", "shape", "reverse - forward", "reverse - central", "worst at", "verdict"):
        table.add_column(column, overflow="fold")
    for each in parameters:
        style = "bold red" if each.verdict == "wrong" else ""
        table.add_row(
            each.name,
            " x ".join(map(str, each.shape)) or "scalar",
            "-" if each.forward is None else f"{each.forward:.1e}",
            f"{each.central:.1e}",
            str(list(each.entry)) if each.entry else "",
            Text(each.verdict, style),
        )
    console = console or Console(highlight=False)
    console.print(table)
    for note in dict.fromkeys(each.note for each in parameters if each.note):
        console.print(Text(note, "yellow"), soft_wrap=True)
