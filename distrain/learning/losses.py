"""Losses, one value for each row, so that sums over microbatches of any size add up right."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from distrain.config import LossConfig, ModelConfig
from distrain.errors import ConfigError, DataError, TrainingError
from distrain.imports import load_object

if TYPE_CHECKING:
    from distrain.data.dataset import Dataset

PerRow = Callable[[Tensor, Tensor], Tensor]


def align(outputs: Tensor, label: Tensor) -> Tensor:
    """Outputs in the label's shape. Only [rows, 1] for a label of [rows] is taken as the same; nothing broadcasts."""
    if outputs.shape == label.shape:
        return outputs
    if outputs.shape == (*label.shape, 1):
        return outputs.squeeze(-1)
    raise TrainingError(
        f"the model gives {tuple(outputs.shape)} where the label is {tuple(label.shape)}: the model's outputs must "
        "match the label columns (model.outputs)"
    )


def _rows(values: Tensor) -> Tensor:
    """The mean over a row's outputs: [rows, ...] -> [rows]."""
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def mse(outputs: Tensor, label: Tensor) -> Tensor:
    """Mean squared error, (output - label)^2, averaged over a row's outputs."""
    return _rows(functional.mse_loss(align(outputs, label), label.to(outputs.dtype), reduction="none"))


def cross_entropy(outputs: Tensor, label: Tensor) -> Tensor:
    """Categorical cross-entropy, -log softmax(outputs)[label], from logits [rows, classes] and int64 labels [rows]."""
    if outputs.ndim != 2 or label.ndim != 1:
        raise TrainingError(
            f"cross_entropy takes outputs [rows, classes] and one label a row, got {tuple(outputs.shape)} and "
            f"{tuple(label.shape)}; for several label columns use binary_cross_entropy or mse"
        )
    return functional.cross_entropy(outputs, label, reduction="none")


def binary_cross_entropy(outputs: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy from logits, averaged over a row's labels."""
    logits = align(outputs, label)
    return _rows(functional.binary_cross_entropy_with_logits(logits, label.to(outputs.dtype), reduction="none"))


LOSSES: dict[str, PerRow] = {"mse": mse, "cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}


class Loss:
    """A loss by name, or the user's own."""

    def __init__(self, config: LossConfig) -> None:
        self.name = config.name if config.factory is None else None
        if self.name is not None:
            self._function = LOSSES[self.name]
        else:
            assert config.factory is not None
            self._factory = config.factory
            self._function = load_object(config.factory, "loss.factory")(**config.args)

    def per_sample(self, outputs: Tensor, label: Tensor) -> Tensor:
        """The loss of each row, float32 [rows].

        Raises DataError for a label the loss cannot take, TrainingError where shapes do not fit.
        """
        self._check_label(outputs, label)
        values = self._function(outputs, label)
        if self.name is None and values.shape != label.shape[:1]:
            raise TrainingError(
                f"loss.factory: {self._factory} gave {tuple(values.shape)} for {len(label)} rows; a loss must give one "
                'value for each row (reduction="none")'
            )
        return values

    def _check_label(self, outputs: Tensor, label: Tensor) -> None:
        if self.name == "cross_entropy":
            low, high = torch.aminmax(label)
            classes = outputs.shape[-1]
            if low < 0 or high >= classes:
                value = int(low) if low < 0 else int(high)
                raise LabelError(f"label {value} is out of range: cross_entropy over {classes} classes takes labels "
                                 f"0..{classes - 1}", value)  # fmt: skip
        elif self.name == "binary_cross_entropy":
            low, high = torch.aminmax(label)
            if low < 0 or high > 1:
                bad = float(low) if low < 0 else float(high)
                raise LabelError(f"label {bad:g} is out of range: binary_cross_entropy takes labels in [0, 1]", bad)


class LabelError(DataError):
    """A label that the loss cannot take; the worker adds where it is."""

    def __init__(self, message: str, value: float = 0.0) -> None:
        super().__init__(message)
        self.value = value


def build_loss(config: LossConfig) -> Loss:
    """The loss that the configuration names."""
    return Loss(config)


def num_outputs(model: ModelConfig, loss: LossConfig, dataset: Dataset) -> int:
    """How many outputs the model needs for this loss and label.

    Raises ConfigError when the label's type does not fit the loss, or when the classes cannot be counted; DataError
    when the footers already show a label out of range.
    """
    columns = dataset.columns
    if loss.name != "cross_entropy" or loss.factory is not None:
        return model.outputs or len(columns.labels)
    name = columns.labels[0]
    if len(columns.labels) > 1:
        raise ConfigError(
            f"loss: cross_entropy takes one label column, data.label names {len(columns.labels)}; for several use "
            "binary_cross_entropy or mse"
        )
    if not columns.label_is_integer:
        raise ConfigError(f"loss: cross_entropy needs integer labels, and column {name!r} is not; use mse")
    if dataset.label_range is None:
        if model.outputs is None:
            raise ConfigError(
                f"model.outputs: the footers do not say how many classes column {name!r} has; give their number"
            )
        return model.outputs
    low, high = dataset.label_range
    outputs = model.outputs or high + 1
    if low < 0 or high >= outputs:
        value = low if low < 0 else high
        raise DataError(
            f"{dataset.label_place(value)}, column {name!r}: label {value} is out of range: cross_entropy over "
            f"{outputs} classes takes labels 0..{outputs - 1}"
        )
    return outputs
