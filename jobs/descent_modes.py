"""Full-batch, single-sample and minibatch gradient descent: `python jobs/descent_modes.py`, from the repository's root.

Trains jobs/descent_modes.yaml for the same number of samples in each mode, then for the same seconds: two sweeps, with
their parent runs in MLflow. Prints a table and draws descent-modes.png, which is stored on both parents too.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from distrain.config import TrainConfig, load_config
from distrain.progress import SweepLines
from distrain.study.point import Point
from distrain.study.record import Study
from distrain.study.sweep import Sweep
from distrain.tracking import RunDescription
from distrain.tracking.study import open_parent

COLORS = {"full": "#8c564b", 32: "#1f77b4", 1: "#d1580f"}
NAMES = {"full": "full batch: 1,437 rows", 32: "minibatch: 32 rows", 1: "single sample"}


def run(config: TrainConfig, name: str) -> Study:
    """One sweep over the modes, one after the other, since they are timed. Raises ClickException where one fails."""
    study, _ = Sweep(config, name, SweepLines(), num_parallel=1).run()
    lost = [f"{point.name}: {point.reason}" for point in study.points if not point.is_finished]
    if lost:
        raise click.ClickException("\n".join(["there is nothing to compare, since a run did not end well:", *lost]))
    return study


def draw(samples: Study, seconds: Study) -> Figure:
    """Validation loss over the samples of one sweep, and over the seconds of the other."""
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for point in samples.points:
        plot(left, point, [moment.samples for moment in point.moments])
    for point in seconds.points:
        plot(right, point, [moment.seconds for moment in point.moments])
    left.set(title="the same number of samples", xlabel="samples", ylabel="validation loss", yscale="log")
    right.set(title="the same seconds", xlabel="seconds of training")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(f"{value:.0e}")[0] in "235" else "")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot(axes: Axes, point: Point, along: list[float]) -> None:
    mode = point.values["batch_size"]
    label = f"{NAMES[mode]} ({point.steps:,} step{'s' if point.steps > 1 else ''} on the left)"
    losses = [moment.metrics["loss"] for moment in point.moments]
    axes.plot(along, losses, marker="o" if len(along) < 30 else "", markersize=3, color=COLORS[mode], label=label)


def store(config: TrainConfig, study: Study, figure: Figure) -> None:
    """Put the figure beside the sweep's others."""
    description = RunDescription(
        config_yaml=config.to_yaml(),
        config_sha256=config.sha256(),
        run_name=study.name,
        resume_run_id=study.parent_run_id,
    )
    parent = open_parent(config.tracking, description)
    parent.figure("descent_modes.png", figure)
    parent.finish("FINISHED")


@click.command()
@click.option("--epochs", default=5, show_default=True, help="Of the runs with the same number of samples.")
@click.option("--seconds", default=4.0, show_default=True, help="Of training, for the others.")
@click.option("--output", default="descent-modes.png", show_default=True, type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
def main(epochs: int, seconds: float, output: Path, overrides: tuple[str, ...]) -> None:
    """Compare the three modes of gradient descent."""
    config = load_config(Path(__file__).parent / "descent_modes.yaml", [*overrides, f"epochs={epochs}"])
    timed = TrainConfig.from_mapping(config.to_mapping(), ["epochs=100000", f"max_seconds={seconds}"])
    name = f"descent-modes-{time.strftime('%Y%m%d-%H%M%S')}"
    studies = [run(config, f"{name}-samples"), run(timed, f"{name}-seconds")]
    table = Table(title="1,437 digits, one worker")
    for column in ("mode", "steps", "samples", "seconds", "validation loss", "accuracy"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for study in studies:
        for point in study.points:
            last = point.moments[-1]
            table.add_row(
                NAMES[point.values["batch_size"]],
                f"{point.steps:,}",
                f"{point.samples:,}",
                f"{last.seconds:.2f}",
                f"{point.validation['loss']:.4f}",
                f"{point.validation['accuracy']:.4f}",
            )
        table.add_section()
    Console(width=110).print(table)
    figure = draw(*studies)
    figure.savefig(output)
    for each, study in zip((config, timed), studies, strict=True):
        store(each, study, figure)
    click.echo(f"the curves: {output}")


if __name__ == "__main__":
    main()
