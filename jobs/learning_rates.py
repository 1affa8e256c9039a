"""Draws gradient descent with a learning rate that is too small, right and too large, on real rows of
jobs/data/diabetes: with one parameter, the loss as a curve, and with two, as contours.

    python jobs/learning_rates.py [--output picture.png] [--run MLFLOW_RUN_ID]

A linear model foretells how far diabetes has come from body mass index (and blood pressure), features and label taken
about their mean. Every step is a step of distrain's parameter server over all rows. See: a rate too small hardly moves;
the right one is there in a few steps; one too large leaps over the valley, and further up each time. A rate above 2
over the largest curvature diverges.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from distrain.config import DataConfig, LossConfig, OptimizerConfig
from distrain.data.dataset import open_dataset
from distrain.exchange.layout import views
from distrain.learning.losses import Loss
from distrain.reduction import Partial
from distrain.server.parameter_server import Gathered, ParameterServer
from distrain.tracking.pictures import log_figure

ROWS = Path(__file__).parent / "data" / "diabetes" / "train.parquet"
STEPS = 15
START = (-75.0, 70.0)
RATES = {"too small": 0.03, "right": 0.6, "too large": 2.06}  # in units of 1 / curvature; above 2 it diverges
_SURFACE, _PATH = "#1f6feb", "#d1580f"


def rows(names: list[str]) -> tuple[Tensor, Tensor]:
    """Features, float32 [rows, features], in deviations from their mean; and labels less their mean."""
    dataset = open_dataset(str(ROWS), DataConfig(train=str(ROWS), features=names, label="label"))
    batches = [batch for number, count in enumerate(dataset.row_counts) for batch in dataset.read(number, 0, count)]
    features, label = (torch.cat([batch[key] for batch in batches]) for key in ("features", "label"))
    return (features - features.mean(0)) / features.std(0, correction=0), label - label.mean()


def descend(features: Tensor, label: Tensor, lr: float) -> tuple[np.ndarray, list[float]]:
    """Parameters [STEPS + 1, features] and losses along gradient descent."""
    model = nn.Linear(features.shape[1], 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([START[: features.shape[1]]]))
    server = ParameterServer(model, OptimizerConfig(name="SGD", lr=lr))
    loss = Loss(LossConfig(name="mse"))
    path, losses = [model.weight.detach().numpy().copy()[0]], []
    for step in range(1, STEPS + 1):
        total, weight = loss.total(model(features), {"features": features, "label": label})
        (gradient,) = torch.autograd.grad(total, list(model.parameters()))
        vector = torch.zeros(server.layout.num_floats)
        views(vector, server.layout.parameters)[0].copy_(gradient)
        update = server.apply(Gathered((Partial(vector, len(label), total.item(), weight),)), step)
        path.append(model.weight.detach().numpy().copy()[0])
        losses.append(update.loss)
    losses.append(loss.per_sample(model(features), label).mean().item())
    return np.array(path), losses


def curvatures(features: Tensor) -> np.ndarray:
    """Of the mean squared error, along its main directions, ascending: eigenvalues of 2 X'X / rows."""
    return np.linalg.eigvalsh((2 * features.T @ features / len(features)).double().numpy())


def draw() -> Figure:
    """Above with one parameter, below with two; left a rate too small, in the middle the right one, right too large."""
    figure = Figure(figsize=(13, 7.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(RATES))
    for line, names in zip(grid, (["bmi"], ["bmi", "bp"]), strict=True):
        features, label = rows(names)
        for axes, (word, share) in zip(line, RATES.items(), strict=True):
            lr = share / curvatures(features)[-1]
            path, losses = descend(features, label, lr)
            (one_parameter if len(names) == 1 else two_parameters)(axes, features, label, path, losses)
            axes.set_title(f"{word}: lr = {lr:.3g}, loss {losses[-1]:,.0f} after {STEPS} steps", fontsize=10)
    figure.suptitle("Gradient descent on the mean squared error of a linear model, 353 real rows", fontsize=13)
    return figure


def one_parameter(axes: Axes, features: Tensor, label: Tensor, path: np.ndarray, losses: Sequence[float]) -> None:
    weights = np.linspace(-175, 270, 200)
    curve = [float((features[:, 0] * w - label).square().mean()) for w in weights]
    axes.plot(weights, curve, color=_SURFACE, linewidth=2)
    axes.plot(path[:, 0], losses, "-o", color=_PATH, linewidth=1.2, markersize=4.5)
    axes.plot(path[0, 0], losses[0], "o", color="black", markersize=7)
    axes.set(xlabel="weight of body mass index", ylabel="loss", xlim=(-175, 270), ylim=(0, 52_000))


def two_parameters(axes: Axes, features: Tensor, label: Tensor, path: np.ndarray, _: Sequence[float]) -> None:
    x, y = np.linspace(-130, 190, 90), np.linspace(-130, 150, 90)
    surface = np.array([[float((features @ torch.tensor([a, b], dtype=torch.float32) - label).square().mean())
                         for a in x] for b in y])  # fmt: skip
    axes.contourf(x, y, surface, levels=np.geomspace(surface.min(), surface.max(), 18), cmap="Blues")
    axes.plot(path[:, 0], path[:, 1], "-o", color=_PATH, linewidth=1.2, markersize=4.5)
    axes.plot(*path[0], "o", color="black", markersize=7)
    best = np.unravel_index(surface.argmin(), surface.shape)
    axes.plot(x[best[1]], y[best[0]], "*", color="white", markersize=13, markeredgecolor="black")
    axes.set(xlabel="weight of body mass index", ylabel="weight of blood pressure", xlim=(x[0], x[-1]),
             ylim=(y[0], y[-1]))  # fmt: skip


@click.command()
@click.option("--output", default="learning-rates.png", show_default=True, type=click.Path(path_type=Path))
@click.option("--run", "run_id", help="Store it in this MLflow run too, by its id.")
@click.option("--tracking-uri", default="sqlite:///mlflow.db", show_default=True, envvar="MLFLOW_TRACKING_URI")
def main(output: Path, run_id: str | None, tracking_uri: str) -> None:
    """Draw gradient descent with three learning rates."""
    figure = draw()
    figure.savefig(output)
    if run_id is not None:
        log_figure(tracking_uri, run_id, "learning-rates.png", figure)
    click.echo(output)


if __name__ == "__main__":
    main()
