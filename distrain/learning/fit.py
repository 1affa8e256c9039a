"""Whether label, loss and model fit together, as far as that can be said before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from distrain.config import BINARY, CATEGORICAL, LossConfig, ModelConfig
from distrain.data.ragged import pad
from distrain.errors import ConfigError, DataError, DistrainError, TrainingError
from distrain.learning.models import forward, minimum_rows
from distrain.learning.task import Task

if TYPE_CHECKING:
    from distrain.data.dataset import Dataset


def num_outputs(model: ModelConfig, loss: LossConfig, dataset: Dataset) -> int:
    """How many outputs the model needs for this loss and label.

    Raises ConfigError when the label's type does not fit the loss, or when the classes cannot be counted; DataError
    when the footers already show a label out of range.
    """
    columns = dataset.columns
    if loss.name not in CATEGORICAL or loss.factory is not None:
        outputs = model.outputs or len(columns.labels)
        if model.factory is None and loss.factory is None:
            _check_outputs(loss, outputs, dataset)
        _check_class_weights(loss, 2 if loss.name in BINARY else None, len(columns.labels))
        return outputs
    name = columns.labels[0]
    if len(columns.labels) > 1:
        raise ConfigError(
            f"loss: {loss.name} takes one label column, data.label names {len(columns.labels)}; for several use "
            "binary_cross_entropy or mse"
        )
    if not columns.label_is_integer:
        raise ConfigError(f"loss: {loss.name} needs integer labels, and column {name!r} is not; use mse")
    if dataset.label_range is None:
        if model.outputs is None:
            raise ConfigError(
                f"model.outputs: the footers do not say how many classes column {name!r} has; give their number"
            )
        _check_class_weights(loss, model.outputs, 1)
        return model.outputs
    low, high = dataset.label_range
    outputs = model.outputs or high + 1
    if low < 0 or high >= outputs:
        value = low if low < 0 else high
        raise DataError(
            f"{dataset.label_place(value)}, column {name!r}: label {value} is out of range: {loss.name} over "
            f"{outputs} classes takes labels 0..{outputs - 1}"
        )
    _check_class_weights(loss, outputs, 1)
    return outputs


def check_labels(model: ModelConfig, loss: LossConfig, outputs: int, dataset: Dataset) -> None:
    """Raise what `num_outputs` does for a data set that a model of so many outputs was not made for."""
    num_outputs(model.model_copy(update={"outputs": outputs}), loss, dataset)


def _check_outputs(loss: LossConfig, outputs: int, dataset: Dataset) -> None:
    """A loss without classes takes one output for each label column; a binary one labels of 0 and 1."""
    labels = dataset.columns.labels
    if labels and outputs != len(labels):
        label = "[rows]" if len(labels) == 1 else f"[rows, {len(labels)}]"
        raise ConfigError(
            f"model.outputs: the model gives [rows, {outputs}] where the label is {label}: {loss.name} takes one "
            f"output for each label column, {len(labels)}"
        )
    if loss.name in BINARY and dataset.label_range is not None:
        low, high = dataset.label_range
        if low < 0 or high > 1:
            bad = low if low < 0 else high
            raise DataError(
                f"{dataset.label_place(bad)}, column {labels[0]!r}: label {bad} is out of range: {loss.name} takes "
                "labels in [0, 1]"
            )


def _check_class_weights(loss: LossConfig, classes: int | None, num_labels: int) -> None:
    if loss.class_weights is None:
        return
    if classes is None or num_labels > 1:
        raise ConfigError(f"loss.class_weights: {loss.name or 'this loss'} has no classes, or several labels a row")
    if isinstance(loss.class_weights, list) and len(loss.class_weights) != classes:
        raise ConfigError(f"loss.class_weights: {len(loss.class_weights)} weights for {classes} classes")


def check_task(task: Task, dataset: Dataset, smallest_forward: int, strict: bool = False) -> None:
    """Run the first rows through model and loss, and raise ConfigError where their shapes do not fit together, or where
    an epoch's smallest forward pass, of so many rows, is too small for the model.

    Whatever else is wrong is left to the workers, who say it with its step and place; with `strict` it is raised.
    """
    needed = minimum_rows(task.model)
    if smallest_forward < needed:
        raise ConfigError(
            f"the smallest microbatch of an epoch has {smallest_forward} rows, and the model's batch normalization "
            f"needs {needed}: choose another batch_size or fewer shards"
        )
    number = next(number for number, rows in enumerate(dataset.row_counts) if rows)
    try:
        batch = pad(next(dataset.read(number, 0, min(2, dataset.row_counts[number]))))
    except DistrainError:
        if strict:
            raise
        return
    training = task.model.training
    task.model.eval()
    try:
        with torch.no_grad():
            task.loss.per_sample(forward(task.model, batch), batch["label"])
    except TrainingError as error:
        raise ConfigError(error.message) from error
    except Exception:
        if strict:
            raise
    finally:
        task.model.train(training)
