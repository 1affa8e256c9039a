"""What `distrain plan` shows."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distrain.preview import Preview
from distrain.progress.standing import plural, size

_MAX_FILES = 12


def show_plan(preview: Preview, console: Console | None = None) -> None:
    """Print a preview: on standard output unless another console is given, since it is what was asked for."""
    console = console or Console(highlight=False)
    console.print(_files(preview))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _rows(preview):
        table.add_row(name, Text(text))
    console.print(table)
    for resource, amount in preview.lacking.items():
        text = f"too little {resource}: {_amount(resource, amount)} more would be needed"
        console.print(Text(text, "bold red"), soft_wrap=True)
    for warning in preview.warnings:
        console.print(Text(warning, "yellow"), soft_wrap=True)


def _files(preview: Preview) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("for")
    for name in ("rows", "row groups", "size"):
        table.add_column(name, justify="right")
    for file in preview.files[:_MAX_FILES]:
        table.add_row(
            Text(file.path), file.context, f"{file.num_rows:,}", f"{file.num_row_groups:,}", size(file.size_bytes)
        )
    others = preview.files[_MAX_FILES:]
    if others:
        rows, groups = sum(f.num_rows for f in others), sum(f.num_row_groups for f in others)
        table.add_row(
            f"and {plural(len(others), 'more file')}", "", f"{rows:,}", f"{groups:,}",
            size(sum(f.size_bytes for f in others)),
        )  # fmt: skip
    table.add_section()
    return table


def _rows(preview: Preview) -> list[tuple[str, str]]:
    p = preview
    rows = [
        ("", ""),
        ("rows", f"{p.num_rows:,} to train on, {p.num_validation_rows:,} to validate with"),
        ("minibatch", f"{plural(p.batch_size, 'row')} in {plural(p.num_shards, 'shard')}; the smallest microbatch has "
         f"{plural(p.smallest_microbatch, 'row')}"),
        ("steps", f"{p.steps_per_epoch:,} an epoch, {plural(p.epochs, 'epoch')}, {p.total_steps:,} in all"),
        ("model", f"{_count(p.num_features)} features, {_count(p.num_outputs)} outputs, "
         f"{plural(p.num_parameters, 'parameter')}"),
        ("a worker", _memory(p.worker_bytes)),
        ("the server", _memory(p.server_bytes)),
        ("cluster", p.cluster),
    ]  # fmt: skip
    for resource, asked in p.asked.items():
        there = _amount(resource, p.there.get(resource, 0.0))
        rows.append((f"  {resource}", f"{_amount(resource, asked)} asked for, {there} there"))
    return rows


def _memory(parts: Mapping[str, int]) -> str:
    told = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in parts.items())
    return f"about {size(sum(parts.values()))} of memory ({told})"


def _amount(resource: str, amount: float) -> str:
    return size(amount) if "memory" in resource else f"{amount:g}"


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
