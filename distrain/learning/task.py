"""What is learned: model, loss and metrics that fit together, built the same on the server and on every worker."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.config import LossConfig, ModelConfig
from distrain.data.statistics import Statistics
from distrain.learning.losses import Loss
from distrain.learning.metrics import Metrics
from distrain.learning.models import build_model


@dataclass(frozen=True)
class TaskSpec:
    """All it takes to build a task anywhere. `num_features` is None with a transform and for rows of different length;
    `image_shape` is that of encoded images."""

    model: ModelConfig
    loss: LossConfig
    num_features: int | None
    num_outputs: int
    standardize: bool
    seed: int
    image_shape: tuple[int, int, int] | None = None

    @property
    def num_classes(self) -> int | None:
        """How many classes' rows have to be counted beforehand: for balanced class weights."""
        if self.loss.class_weights != "balanced":
            return None
        return 2 if self.loss.kind == "binary" else self.num_outputs

    @property
    def needs_statistics(self) -> bool:
        """Whether the training rows have to be read once before training."""
        return self.standardize or self.num_classes is not None


@dataclass(frozen=True)
class Task:
    model: nn.Module
    loss: Loss
    metrics: Metrics


def build_task(spec: TaskSpec, statistics: Statistics | None = None) -> Task:
    """Build the model (seeded), the loss and its metrics.

    What `statistics` hold becomes buffers of the model; a worker leaves them out and gets the values with the published
    buffers.
    """
    scaling = None
    if spec.standardize:
        if statistics is not None:
            assert statistics.mean is not None and statistics.deviation is not None
            scaling = statistics.mean, statistics.deviation
        else:
            assert spec.num_features is not None
            scaling = torch.zeros(spec.num_features), torch.ones(spec.num_features)
    torch.manual_seed(spec.seed)
    model = build_model(spec.model, spec.num_features, spec.num_outputs, scaling, spec.image_shape)
    class_weights: Tensor | None = None
    if spec.num_classes is not None:
        class_weights = statistics.balanced_weights if statistics is not None else torch.ones(spec.num_classes)
        model.register_buffer("class_weights", class_weights)
    return Task(model, Loss(spec.loss, class_weights), Metrics(spec.loss))
