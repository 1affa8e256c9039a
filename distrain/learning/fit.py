"""Whether label, loss and model fit together, as far as that can be said before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from distrain.config import BINARY, CATEGORICAL, LossConfig, ModelConfig
from distrain.errors import ConfigError, DataError, DistrainError, TrainingError
from distrain.learning.models import forward
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


def _check_class_weights(loss: LossConfig, classes: int | None, num_labels: int) -> None:
    if loss.class_weights is None:
        return
    if classes is None or num_labels > 1:
        raise ConfigError(f"loss.class_weights: {loss.name or 'this loss'} has no classes, or several labels a row")
    if isinstance(loss.class_weights, list) and len(loss.class_weights) != classes:
        raise ConfigError(f"loss.class_weights: {len(loss.class_weights)} weights for {classes} classes")


def check_shapes(task: Task, dataset: Dataset) -> None:
    """Run the first rows through model and loss, and raise ConfigError where their shapes do not fit together.

    Whatever else is wrong is left to the workers, who say it with its step and place.
    """
    number = next(number for number, rows in enumerate(dataset.row_counts) if rows)
    try:
        batch = next(dataset.read(number, 0, min(2, dataset.row_counts[number])))
    except DistrainError:
        return
    training = task.model.training
    task.model.eval()
    try:
        with torch.no_grad():
            task.loss.per_sample(forward(task.model, batch), batch["label"])
    except TrainingError as error:
        raise ConfigError(error.message) from error
    except Exception:
        return
    finally:
        task.model.train(training)
