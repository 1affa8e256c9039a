"""The end of a run, for a person, with the commands to look further."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distrain.progress.protocol import HasJson
from distrain.progress.standing import Standing, duration, metrics_line, number, plural

_DEFAULT_URI = "sqlite:///mlflow.db"


def show_summary(result: Mapping[str, Any] | HasJson, standing: Standing | None, console: Console) -> None:
    """Print the summary. `result` has the keys of the `--json` line; those that are missing or null are left out."""
    values = result if isinstance(result, Mapping) else result.to_json()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _rows(values):
        table.add_row(name, Text(text))
    if standing is not None and _is_server(standing.info.tracking_uri):
        table.add_row("MLflow page", Text(str(standing.info.tracking_uri)))
    console.print()
    console.print(table)
    console.print()
    commands = _commands(values, standing)
    width = max((len(command) for command, _ in commands), default=0)
    for command, meaning in commands:
        # Not wrapped, so that it can be copied.
        console.print(Text.assemble((f"  {command:<{width}}", "bold cyan"), f"  # {meaning}"), soft_wrap=True)


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []

    def add(name: str, key: str, form: str = "{}") -> None:
        if values.get(key) is not None:
            rows.append((name, form.format(values[key])))

    status = str(values.get("status", ""))
    rows.append(("status", f"{status}: {values['reason']}" if values.get("reason") else status))
    if values.get("restarts"):
        rows.append(("restarts", f"the best of {len(values['restarts'])} is that of seed {values['seed']}"))
    add("epochs", "epochs", "{:,}")
    add("steps", "steps", "{:,}")
    add("samples/s", "samples_per_second", "{:,.0f}")
    if values.get("train_loss") is not None:
        rows.append(("train loss", number(values["train_loss"])))
    if metrics := _known(values.get("validation")):
        rows.append(("validation", metrics_line(metrics)))
    if values.get("overfitting"):
        rows.append(("note", str(values["overfitting"])))
    rows += [("warning", str(warning)) for warning in values.get("warnings") or ()]
    if values.get("skipped_microbatches"):
        count, left_out = values["skipped_microbatches"], values["skipped_rows"]
        rows.append(("skipped", f"{plural(count, 'microbatch', 'es')} whose loss or gradient was not finite, of "
                     f"{plural(left_out, 'row')}"))  # fmt: skip
    if values.get("worker_failures"):
        rows.append(("workers lost", f"{values['worker_failures']:,}"))
    if seconds := _known(values.get("seconds")):
        rows.append(("time", ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())))
    add("checkpoint", "checkpoint")
    add("MLflow run", "run_id")
    return rows


def _known(numbers: Mapping[str, float | None] | None) -> dict[str, float]:
    """Those that are not null."""
    return {name: value for name, value in (numbers or {}).items() if value is not None}


def _commands(values: Mapping[str, Any], standing: Standing | None) -> list[tuple[str, str]]:
    info = standing.info if standing is not None else None
    commands: list[tuple[str, str]] = []
    if values.get("run_id") and (info is None or not _is_server(info.tracking_uri)):
        is_default = info is None or info.tracking_uri in (None, _DEFAULT_URI)
        commands.append(("distrain ui" if is_default else "distrain ui CONFIG", "the curves, in MLflow"))
    if values.get("checkpoint"):
        run = values["checkpoint"].rpartition("/")[0]  # its folder, or URI
        if values.get("status") != "finished":
            commands.append((f"distrain resume {run}", "go on from the last checkpoint"))
        elif info is not None and info.train_on and values["steps"] >= info.total_steps:  # no rule ended it
            commands.append((f"distrain resume {run} {info.train_on}", "train on"))
        commands.append((f"distrain evaluate {values['checkpoint']} DATA", "measure it on other data"))
    return commands


def _is_server(uri: str | None) -> bool:
    return uri is not None and uri.startswith("http")
