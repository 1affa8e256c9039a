"""What is learned: model, loss and metrics that fit together, built the same on the server and on every worker."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrain.config import LossConfig, ModelConfig
from distrain.learning.losses import Loss, build_loss
from distrain.learning.metrics import Metrics
from distrain.learning.models import build_model


@dataclass(frozen=True)
class TaskSpec:
    """All it takes to build a task anywhere. `num_features` is None with a transform."""

    model: ModelConfig
    loss: LossConfig
    num_features: int | None
    num_outputs: int
    standardize: bool
    seed: int


@dataclass(frozen=True)
class Task:
    model: nn.Module
    loss: Loss
    metrics: Metrics


def build_task(spec: TaskSpec, statistics: tuple[Tensor, Tensor] | None = None) -> Task:
    """Build the model (seeded), the loss and its metrics.

    `statistics` is (mean, deviation), float32 [num_features] each; a worker leaves it out and gets the values with the
    published buffers.
    """
    if spec.standardize and statistics is None:
        assert spec.num_features is not None
        statistics = torch.zeros(spec.num_features), torch.ones(spec.num_features)
    torch.manual_seed(spec.seed)
    model = build_model(spec.model, spec.num_features, spec.num_outputs, statistics)
    return Task(model, build_loss(spec.loss), Metrics(spec.loss))
