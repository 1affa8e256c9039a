"""Losses, one value for each row, so that sums over microbatches of any size add up right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from distrain.config import BINARY, CATEGORICAL, LossConfig
from distrain.errors import DataError, TrainingError
from distrain.imports import load_object

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
    """Mean squared error, (output - label)^2, averaged over a row's outputs (torch.nn.MSELoss)."""
    return _rows(functional.mse_loss(align(outputs, label), label.to(outputs.dtype), reduction="none"))


def mae(outputs: Tensor, label: Tensor) -> Tensor:
    """Mean absolute error, |output - label|, averaged over a row's outputs (torch.nn.L1Loss)."""
    return _rows(functional.l1_loss(align(outputs, label), label.to(outputs.dtype), reduction="none"))


def huber(outputs: Tensor, label: Tensor, delta: float = 1.0) -> Tensor:
    """Huber loss (Huber 1964), averaged over a row's outputs: with r = |output - label|, r^2 / 2 where r <= delta, else
    delta (r - delta / 2). Outliers pull with at most `delta`."""
    return _rows(functional.huber_loss(align(outputs, label), label.to(outputs.dtype), reduction="none", delta=delta))


def cross_entropy(outputs: Tensor, label: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Categorical cross-entropy, -log softmax(outputs)[label], from logits [rows, classes] and int64 labels [rows].

    With smoothing s the target is 1 - s + s / classes for the label and s / classes for the others (Szegedy et al.
    2016, section 7).
    """
    _check_classes("cross_entropy", outputs, label)
    return functional.cross_entropy(outputs, label, reduction="none", label_smoothing=label_smoothing)


def focal(outputs: Tensor, label: Tensor, gamma: float = 2.0) -> Tensor:
    """Categorical focal loss, -(1 - p)^gamma log p with p = softmax(outputs)[label] (Lin et al. 2017, equation 4, over
    classes): rows that are right already count less. From logits [rows, classes] and int64 labels [rows]."""
    _check_classes("focal", outputs, label)
    log_p = functional.log_softmax(outputs, dim=1).gather(1, label[:, None])[:, 0]
    return -_least(-torch.expm1(log_p)).pow(gamma) * log_p


def binary_cross_entropy(outputs: Tensor, label: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy from logits, -y log p - (1 - y) log(1 - p) with p = sigmoid(output), averaged over a row's
    labels (several: multi-label). With smoothing s, y becomes y (1 - s) + s / 2."""
    logits = align(outputs, label)
    target = label.to(outputs.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return _rows(functional.binary_cross_entropy_with_logits(logits, target, reduction="none"))


def binary_focal(outputs: Tensor, label: Tensor, gamma: float = 2.0) -> Tensor:
    """Binary focal loss from logits (Lin et al. 2017, equation 4): binary cross-entropy times (1 - p_t)^gamma, where
    p_t is the probability given to the label; averaged over a row's labels."""
    logits, target = align(outputs, label), label.to(outputs.dtype)
    cross = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = torch.sigmoid(logits) * (1 - target) + torch.sigmoid(-logits) * target  # 1 - p_t, without cancellation
    return _rows(_least(wrong).pow(gamma) * cross)


def _least(wrong: Tensor) -> Tensor:
    """A probability as what it is raised to a power of, whose derivative at 0 is infinite below a power of 1."""
    return wrong.clamp(min=torch.finfo(wrong.dtype).tiny)


def _check_classes(name: str, outputs: Tensor, label: Tensor) -> None:
    if outputs.ndim != 2 or label.ndim != 1:
        raise TrainingError(
            f"{name} takes outputs [rows, classes] and one label a row, got {tuple(outputs.shape)} and "
            f"{tuple(label.shape)}; for several label columns use binary_cross_entropy or mse"
        )


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": mse,
    "mae": mae,
    "huber": huber,
    "cross_entropy": cross_entropy,
    "focal": focal,
    "binary_cross_entropy": binary_cross_entropy,
    "binary_focal": binary_focal,
}


class Loss:
    """A loss by name, or the user's own.

    `class_weights`, float32 [classes], multiply the loss of each row by its class's weight.
    """

    def __init__(self, config: LossConfig, class_weights: Tensor | None = None) -> None:
        self.name = config.name if config.factory is None else None
        self._options = config.options
        if class_weights is None and isinstance(config.class_weights, list):
            class_weights = torch.tensor(config.class_weights)
        self._class_weights = class_weights
        if self.name is not None:
            self._function: PerRow = LOSSES[self.name]
        else:
            assert config.factory is not None
            self._factory = config.factory
            self._function = load_object(config.factory, "loss.factory")(**config.args)

    def to(self, device: torch.device) -> None:
        """Compute on this device from now on."""
        if self._class_weights is not None and self._class_weights.device != device:
            self._class_weights = self._class_weights.to(device)
        if isinstance(self._function, nn.Module):
            self._function.to(device)

    def per_sample(self, outputs: Tensor, label: Tensor) -> Tensor:
        """The loss of each row, float32 [rows], before weights.

        Raises DataError for a label the loss cannot take, TrainingError where shapes do not fit.
        """
        self._check_label(outputs, label)
        values = self._function(outputs, label, **self._options)
        if self.name is None and values.shape != label.shape[:1]:
            raise TrainingError(
                f"loss.factory: {self._factory} gave {tuple(values.shape)} for {len(label)} rows; a loss must give one "
                'value for each row (reduction="none")'
            )
        return values

    def weights(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The weight of each row, float32 [rows]: its own times its class's. None where all count the same."""
        weights = batch.get("weight")
        if self._class_weights is not None:
            of_class = self._class_weights[batch["label"].to(torch.int64)]
            weights = of_class if weights is None else weights * of_class
        return weights

    def total(
        self, outputs: Tensor, batch: dict[str, Tensor], dtype: torch.dtype | None = None
    ) -> tuple[Tensor, float]:
        """The weighted sum of the rows' losses, a scalar to be differentiated, and the sum of the weights.

        A step's loss is the first over the second, each added up over its microbatches: the weighted mean, as
        torch.nn.CrossEntropyLoss(weight) and scikit-learn's log_loss have it. Without weights the second is the number
        of rows. `dtype` is that of the sum, where not the loss's own.
        """
        values = self.per_sample(outputs, batch["label"])
        weights = self.weights(batch)
        if weights is None:
            return values.sum(dtype=dtype), float(len(values))
        return (values * weights).sum(dtype=dtype), float(weights.sum(dtype=torch.float64))

    def _check_label(self, outputs: Tensor, label: Tensor) -> None:
        if self.name in CATEGORICAL:
            low, high = torch.aminmax(label)
            classes = outputs.shape[-1]
            if low < 0 or high >= classes:
                value = int(low) if low < 0 else int(high)
                raise LabelError(f"label {value} is out of range: {self.name} over {classes} classes takes labels "
                                 f"0..{classes - 1}", value)  # fmt: skip
        elif self.name in BINARY:
            low, high = torch.aminmax(label)
            if low < 0 or high > 1:
                bad = float(low) if low < 0 else float(high)
                raise LabelError(f"label {bad:g} is out of range: {self.name} takes labels in [0, 1]", bad)


class LabelError(DataError):
    """A label that the loss cannot take; the worker adds where it is."""

    def __init__(self, message: str, value: float = 0.0) -> None:
        super().__init__(message)
        self.value = value
