"""What `distrain doctor` shows."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.text import Text

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


class Found(Protocol):
    """One thing that was looked at."""

    @property
    def subject(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def advice(self) -> str: ...


def show_finding(finding: Found, console: Console | None = None) -> None:
    """Print a line on standard output, and one with what to do about it."""
    console = console or Console(highlight=False)
    line = Text.assemble((f"{finding.verdict:<9}", _STYLES[finding.verdict]), f"{finding.subject:<15}{finding.message}")
    console.print(line, soft_wrap=True)
    if finding.advice:
        console.print(f"{'':<24}-> {finding.advice}", soft_wrap=True)
