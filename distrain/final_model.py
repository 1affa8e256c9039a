"""A run's final model, handed to MLflow: one to load, with an example of its input, and a picture of its graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from distrain.checkpoint import Checkpoint
from distrain.data.ragged import pad
from distrain.learning.model_state import restore_model
from distrain.learning.models import inputs_of
from distrain.learning.task import Task, build_task
from distrain.preparation import Preparation
from distrain.tracking import ModelInput, Tracker
from distrain.worker import Batch, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXAMPLE_ROWS = 2


def log_model(checkpoint: Checkpoint, preparation: Preparation, tracker: Tracker, title: str) -> None:
    """Hand over the model of a checkpoint, and graph.png, of that title. What takes time is left to the tracker."""
    task = build_task(preparation.task)
    restore_model(task.model, checkpoint.model, checkpoint.optimizer)
    batch = _first_rows(preparation.train)
    example = {name: tensor[:_EXAMPLE_ROWS] for name, tensor in inputs_of(batch).items()}
    tracker.model(task.model.eval(), _described(example, preparation.train), checkpoint.manifest["step"])
    tracker.figure("graph.png", lambda: _graph(task, batch, title))


def _first_rows(source: Source) -> Batch:
    """As many rows as the first microbatch has, padded: where the first read gives fewer, they come again."""
    dataset, plan = source.dataset, source.plan
    start, stop = plan.piece(0, 0, 0)
    group = next(number for number, rows in enumerate(dataset.row_counts) if rows)
    count = max(_EXAMPLE_ROWS, stop - start)
    rows = pad(next(dataset.read(group, 0, min(count, dataset.row_counts[group]))))
    return {name: tensor[torch.arange(count) % len(tensor)] for name, tensor in rows.items()}


def _described(example: Batch, source: Source) -> list[ModelInput]:
    columns = source.dataset.columns
    kinds = dict(columns.types)
    # A transform makes its inputs from any columns: each is a column of its own in the model's signature.
    features = tuple((name, kinds[name]) for name in columns.features if columns.transform is None)
    form: Literal["dense", "ragged", "image"] = "dense"
    if columns.ragged:
        form = "ragged"
    elif columns.image_shape is not None:
        form = "image"
    return [
        ModelInput(name, tensor, features, form) if name == "features"
        else ModelInput(name, tensor, form="mask" if form == "ragged" else "dense")
        for name, tensor in example.items()
    ]  # fmt: skip


def _graph(task: Task, batch: Batch, title: str) -> Figure:
    # Here, since networkx and matplotlib take their time, which a run's start does not have.
    from distrain.study.graph import trace
    from distrain.study.graph_figure import draw

    return draw(trace(task, batch), title)
