"""Loss against seconds, of each way to go about a slow worker: `python jobs/modes.py`, from the repository's root.

Trains on the digits with four workers whose compute is a sleep, one of them four times as slow as the others: so what
is seen is the waiting, whatever this machine's cores do. Prints a table and draws modes.png.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import ray
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from distrain import Result, Trainer
from distrain.config import load_config
from distrain.progress import SilentProgress
from distrain.records import Report

MODES = {
    "synchronous, 4 shards": ["shards=4"],
    "synchronous, 16 shards dealt by speed": ["shards=16"],
    "staleness 1, 16 shards": ["shards=16", "server.staleness=1"],
    "quorum 3 of 4": ["shards=4", "server.quorum=3"],
    "asynchronous, at most 2 steps ahead": ["shards=4", "server={mode: async, staleness: 2}"],
    "asynchronous, no bound": ["shards=4", "server={mode: async, staleness: null}"],
    "the same, delay compensated": [
        "shards=4", "server={mode: async, staleness: null, delay_compensation: 0.5}",
    ],
}  # fmt: skip
BATCH_SIZE = 64
SECONDS_A_ROW = 0.0005  # of a fast worker
SLOWER = 4


class Paced(nn.Module):
    """A layer that sleeps for each row in training; `SLOWER` times as long in the process that comes first."""

    def __init__(self, seconds: float, flag: str) -> None:
        super().__init__()
        self._seconds, self._flag, self._factor = seconds, flag, 0

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            if not self._factor:
                try:
                    Path(self._flag).touch(exist_ok=False)
                    self._factor = SLOWER
                except FileExistsError:
                    self._factor = 1
            time.sleep(self._seconds * self._factor * len(hidden))
        return hidden


def build(seconds: float, flag: str) -> nn.Module:
    """The digits' classifier, at the pace of a simulated machine."""
    return nn.Sequential(Paced(seconds, flag), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


@dataclass
class Curve(SilentProgress):
    """The validation loss over the seconds since the first step, and how stale gradients were."""

    points: list[tuple[float, float]] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    began: float | None = None

    def report(self, report: Report) -> None:
        for record in report.steps:
            self.began = self.began or record.time_ms / 1000 - record.step_s
            self.staleness.append(record.staleness)
        for validation in report.validations:
            self.points.append((validation.time_ms / 1000 - (self.began or 0.0), validation.metrics["loss"]))

    def seconds_to(self, loss: float) -> float | None:
        return next((seconds for seconds, value in self.points if value <= loss), None)


def run(overrides: list[str], epochs: int) -> tuple[Result, Curve]:
    """One mode."""
    curve = Curve()
    with tempfile.TemporaryDirectory() as folder:
        model = f"model={{factory: 'jobs.modes:build', args: {{seconds: {SECONDS_A_ROW}, flag: '{folder}/slow'}}}}"
        config = load_config(
            Path(__file__).parent / "digits.yaml",
            [
                model, "data.standardize=false", "tracking.enabled=false", f"checkpoint.dir={folder}/runs",
                f"batch_size={BATCH_SIZE}", f"epochs={epochs}", "schedule=null", "optimizer={name: SGD, lr: 0.02}",
                "workers.count=4", *overrides,
            ],
        )  # fmt: skip
        return Trainer(config, curve).fit(), curve


def draw(curves: dict[str, Curve]) -> Figure:
    """Loss against seconds, a line for each mode."""
    figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot(*zip(*curve.points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="seconds of training", ylabel="validation loss", yscale="log")
    axes.set_title(f"Four workers, one of them {SLOWER} times as slow")
    axes.grid(alpha=0.3)
    for axis in (axes.yaxis, axes.xaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@click.command()
@click.option("--epochs", default=10, show_default=True)
@click.option("--target", default=0.4, show_default=True, help="Validation loss to be reached.")
@click.option("--output", default="modes.png", show_default=True, type=click.Path(path_type=Path))
def main(epochs: int, target: float, output: Path) -> None:
    """Compare the modes with a slow worker."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    table = Table(title=f"Four workers, one of them {SLOWER} times as slow; {epochs} epochs of the digits")
    for column in ("mode", "updates", "seconds", f"to loss {target:g}", "final loss", "accuracy", "staleness, mean"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    curves: dict[str, Curve] = {}
    for name, overrides in MODES.items():
        result, curve = run(overrides, epochs)
        curves[name] = curve
        reached = curve.seconds_to(target)
        table.add_row(
            name,
            f"{result.steps:,}",
            f"{curve.points[-1][0]:.1f}",
            "never" if reached is None else f"{reached:.1f}",
            f"{result.validation['loss']:.4f}",
            f"{result.validation['accuracy']:.4f}",
            f"{sum(curve.staleness) / len(curve.staleness):.2f}",
        )
        click.echo(f"{name}: {curve.points[-1][0]:.1f} s", err=True)
    Console(width=130).print(table)
    draw(curves).savefig(output)
    click.echo(f"the curves: {output}")
    ray.shutdown()


if __name__ == "__main__":
    main()
